"""How much memory a graph's values need, and how much there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir


def activation_bytes(model: ir.Model, extents: Mapping[str, int]) -> int:
    """Most bytes of values alive at once, nodes run in their order, with symbolic axes at `extents`.

    Values of unknown shape do not count; a runtime that fuses nodes needs less, one that lays out tensors anew more.
    """
    proto = ir.to_proto(model.clone())
    for value in (*proto.graph.input, *proto.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in extents:
                axis.dim_value = extents[axis.dim_param]
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    sizes = {value.name: nbytes(value) for value in (*graph.value_info, *graph.output, *graph.input)}
    last = {name: number for number, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive = {value.name: sizes[value.name] for value in graph.input}
    most = now = sum(alive.values())
    for number, node in enumerate(graph.node):
        new = {name: sizes.get(name, 0) for name in node.output}
        alive |= new
        now += sum(new.values())
        most = max(most, now)
        for name in {*node.input, *node.output}:
            if name in alive and last.get(name, number) == number:
                now -= alive.pop(name)
    return most


def nbytes(value: onnx.ValueInfoProto) -> int:
    """Bytes of a value, 0 if its shape is unknown."""
    tensor = value.type.tensor_type
    known = tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in tensor.shape.dim)
    if not known or not tensor.elem_type:
        return 0
    count = np.prod([axis.dim_value for axis in tensor.shape.dim], dtype=np.int64)
    return int(count * ir.DataType(tensor.elem_type).itemsize)


def available_bytes() -> int | None:
    """Memory that programs can still have, from Linux; None elsewhere."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return sum(1024 * int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree"))
