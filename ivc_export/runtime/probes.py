"""What every runtime can time alone: selection and compaction, and the limits of its device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.contract.manifest import Manifest
from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, OPSET
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.graph.functions import function
from ivc_export.lowering.edit import remove_unused
from ivc_export.runtime.plan import Run
from ivc_export.selection.operators import SELECTIONS

SIZES: Mapping[str, tuple[int, int]] = {"cuda": (8192, 2**30), "cpu": (1024, 2**27)}
"""Side of the product's matrices, and bytes of the copy, by device."""
CEILING_RUNS, WARMUPS = 10, 3
SELECTION_RUNS = 9


@dataclass(frozen=True)
class SelectionTimes:
    """Seconds of the selection and of the compaction in a prefill, and of both in a decode step."""

    select: float
    compact: float
    decode: float


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second, read and written, of a large copy, and FLOPs a second of a large matrix product.

    source: what ran them.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: FloatName
    source: str

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        copied = max(self.bytes_per_second, other.bytes_per_second)
        return replace(
            self, bytes_per_second=copied, flops_per_second=max(self.flops_per_second, other.flops_per_second)
        )

    def seconds(self, flops: float, size: float) -> float:
        """The least time for so many FLOPs and bytes."""
        return max(flops / self.flops_per_second, size / self.bytes_per_second)


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs: a limit is the best that can be reached."""
    found = []
    for number in range(WARMUPS + CEILING_RUNS):
        start = time.perf_counter()
        call()
        if number >= WARMUPS:
            found.append(time.perf_counter() - start)
    return min(found)


def one_node(op_type: str, shape: tuple[int, ...], inputs: int, dtype: FloatName) -> ir.Model:
    """A graph that applies an operator to `x` as each of its inputs; `y` has the same shape."""
    element = FLOATS[dtype].onnx
    x = ir.val("x", dtype=element, shape=ir.Shape(shape))
    node = ir.node(op_type, [x] * inputs)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(element)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": OPSET}, name=op_type.lower())
    return ir.Model(graph, ir_version=IR_VERSION)


def selection_part(prefix: ir.Model) -> ir.Model:
    """The selection's node of a prefix graph, and the nodes that compute cache_index from its choice. Uses the graph
    up."""
    graph = prefix.graph
    (select,) = [node for node in graph if node.domain == IVC_DOMAIN and node.op_type in SELECTIONS]
    given = []
    for index, formal in enumerate(function(select.op_type).inputs):
        if shape := LOOKED_AT.get(str(formal.name)):
            value = select.inputs[index]
            assert value is not None
            kind = value.type or ir.TensorType(graph_dtype(prefix))
            given.append(ir.val(formal.name, type=kind, shape=ir.Shape(shape)))
            select.replace_input_with(index, given[-1])
    return only(prefix, [v for v in graph.outputs if v in select.outputs or v.name == "cache_index"], given)


LOOKED_AT: Mapping[str, tuple[int | str, ...]] = {
    "values": (1, "kv_heads", "S", "value_dim"),
    "query": (1, "heads", "S", "head_dim"),
    "key": (1, "kv_heads", "S", "head_dim"),
}
"""Shapes of a layer's tensors that selections take, by their names in the bodies."""


def fix_sizes(part: ir.Model, m: Manifest) -> None:
    """Write constant sizes for the layer's tensors that the selection takes, which TensorRT's profiles need."""
    sizes = layer_sizes(m)
    for value in part.graph.inputs:
        if shape := LOOKED_AT.get(str(value.name)):
            value.shape = ir.Shape([sizes.get(str(axis), axis) for axis in shape])


def layer_sizes(m: Manifest) -> dict[str, int]:
    """Sizes of the axes of one layer's tensors."""
    d = m.decoder
    return {"heads": d.heads, "kv_heads": d.kv_heads, "head_dim": d.head_dim, "value_dim": d.value_dim}


def graph_dtype(prefix: ir.Model) -> ir.DataType:
    """The dtype in which a prefix graph computes."""
    (embeds,) = [value for value in prefix.graph.inputs if value.name == "inputs_embeds"]
    assert embeds.dtype is not None
    return embeds.dtype


def compaction_part(decoder: ir.Model) -> ir.Model:
    """The nodes of a decoder graph that gather kept rows, from caches that may be joined. Uses the graph up."""
    graph = decoder.graph
    indices = [value for value in graph.inputs if value.name in ("keep_index", "cache_index")]
    gathers = [node for node in graph if any(value in indices for value in node.inputs)]
    splits = {use.node for node in gathers for use in node.outputs[0].uses() if use.node.op_type == "Split"}
    gathers = [node for node in gathers if not any(use.node in splits for use in node.outputs[0].uses())] + [*splits]
    for node in gathers:
        for value in node.outputs:
            value.type = value.type or (node.inputs[0].type if node.inputs[0] is not None else None)
            value.shape = None
    return only(decoder, [value for node in gathers for value in node.outputs], [])


def only(model: ir.Model, outputs: Sequence[ir.Value], inputs: Sequence[ir.Value]) -> ir.Model:
    """The part of a graph that its `outputs` need. inputs: the new inputs."""
    graph = model.graph
    graph.outputs[:] = outputs
    remove_unused(model.graph)
    graph.inputs[:] = [value for value in (*graph.inputs, *inputs) if value.uses()]
    return model


def extents(m: Manifest, plan: Run, rows: int) -> dict[str, int]:
    """Sizes of symbolic axes, in a prefill over caches of `rows` rows."""
    return {"S": plan.rows, "P": rows, "W": rows} | layer_sizes(m)


def selection_feeds(plan: Run) -> dict[str, npt.NDArray[Any]]:
    """The selection's inputs that follow from a plan."""
    counted = {"position_ids": plan.position_ids, "keep_count": np.array([plan.keep_count], np.int32)}
    return plan.selection_inputs | counted | {"past_length": np.zeros(1, np.int32)}


def compaction_feeds(plan: Run, rows: int) -> dict[str, npt.NDArray[Any]]:
    """The compaction's inputs, without the tensors to gather from: every n-th visual token is kept."""
    every = np.linspace(0, len(plan.visual_index) - 1, plan.keep_count).astype(np.int32)
    keep = np.sort(np.concatenate([plan.text_index, plan.visual_index[every]])).astype(np.int32)
    cache = np.arange(rows, dtype=np.int32)
    cache[: len(keep)] = keep[:rows]
    return {"keep_index": keep, "cache_index": cache, "position_ids": plan.position_ids}
