"""Small graphs that prepare a bundle's inputs: pixels from 8-bit levels, rows of embeddings."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import IR_VERSION, OPSET
from ivc_export.contract.preprocessing import Scaling
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.lowering.onnxruntime.host_steps import Table
from ivc_export.runtime.onnxruntime.shared_memory import shared_array
from ivc_export.runtime.onnxruntime.stream import Place
from ivc_export.tensorrt.memory import available_bytes

INT64 = ir.DataType.INT64

SHARED_ROWS = 4096
"""Rows of the embedding table that are copied at a time."""


def pixels_graph(scaling: Scaling) -> ir.Model:
    """Normalise levels as families.pictures.Levels does.

    levels: uint8 [outer, 3, frames or 1, inner]. expanded: int64 [4], what they are repeated to. shape: int64 [rank] of
    pixel_values, float32.
    """
    levels = ir.val("levels", dtype=ir.DataType.UINT8, shape=["outer", 3, "given", "inner"])
    expanded, shape = ir.val("expanded", dtype=INT64, shape=[4]), ir.val("shape", dtype=INT64, shape=["rank"])
    made = Made()
    factor = made.constant("factor", np.array(scaling.rescale_factor, np.float32))
    mean = made.constant("mean", np.array(scaling.mean, np.float32)[:, None, None])
    std = made.constant("std", np.array(scaling.std, np.float32)[:, None, None])
    wide = made.op("Mul", made.op("Cast", levels, to=int(ir.DataType.FLOAT)), factor)
    normed = made.op("Div", made.op("Sub", wide, mean), std)
    pixels = made.op("Reshape", made.op("Expand", normed, expanded), shape)
    pixels.name, pixels.type = "pixel_values", ir.TensorType(ir.DataType.FLOAT)
    return made.model("pixels", [levels, expanded, shape], pixels)


def table_graph(name: str, table: ir.TensorProtocol) -> ir.Model:
    """Rows [1, S, hidden] of a table [vocab, hidden], an initializer of this name, for tokens int32 [S]."""
    tokens = ir.val("tokens", dtype=ir.DataType.INT32, shape=["S"])
    made = Made()
    values = made.initializer(name, table)
    rows = made.op("Unsqueeze", made.op("Gather", values, tokens, axis=0), made.constant("axis", np.array([0])))
    rows.name, rows.type = "inputs_embeds", ir.TensorType(table.dtype)
    return made.model("table", [tokens], rows)


def rows_graph(dtype: ir.DataType) -> ir.Model:
    """A copy of rows [1, n, hidden]."""
    rows, made = ir.val("rows", dtype=dtype, shape=[1, "n", "hidden"]), Made()
    copy = made.op("Identity", rows)
    copy.name, copy.type = "inputs_embeds", ir.TensorType(dtype)
    return made.model("rows", [rows], copy)


def tied_table(bundle: Bundle, decoder: ir.Model) -> Table | None:
    """lm_head's weight in a lowered decoder, if the embedding table is the same tensor."""
    table, portable = bundle.manifest.embedding, bundle.graph("decoder")
    for name, value in portable.graph.initializers.items():
        stored = value.const_value
        if isinstance(stored, ir.ExternalTensor) and stored.location == table.file and table.packed is None:
            lowered = decoder.graph.initializers.get(name)
            if stored.offset == table.offset and lowered is not None and lowered.const_value is not None:
                return Table(name, lowered.const_value)
    return None


def shared_table(bundle: Bundle, dtype: FloatName, library: Path) -> Place | None:
    """The embedding table in host memory that the device reads, if it is stored in this dtype and memory is not scarce:
    at most a quarter of what programs can still allocate."""
    table, free = bundle.manifest.embedding, available_bytes()
    size = int(np.prod(table.shape)) * np.dtype(dtype).itemsize
    if table.dtype != dtype or (free is not None and 4 * size > free):
        return None
    with suppress(UserError):
        rows = shared_array(library, table.shape, dtype)
        for start in range(0, len(rows), SHARED_ROWS):
            tokens = np.arange(start, min(start + SHARED_ROWS, len(rows)), dtype=np.int32)
            rows[tokens] = bundle.embed(tokens, np.dtype(dtype))
        return Place(rows.ctypes.data, rows.shape, rows.dtype, rows)
    return None


class Made:
    """Nodes and initializers of a graph that is being made."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Add a node, and return its output."""
        node = ir.node(op_type, inputs, attributes, name=f"{len(self.nodes)}/{op_type}")
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """Add an array."""
        return self.initializer(name, ir.tensor(array, name=name))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a tensor."""
        shape = ir.Shape([int(extent) for extent in tensor.shape.numpy()])
        self.initializers.append(ir.val(name, dtype=tensor.dtype, shape=shape, const_value=tensor))
        return self.initializers[-1]

    def model(self, name: str, inputs: list[ir.Value], output: ir.Value) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            inputs,
            [output],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": OPSET},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION)
