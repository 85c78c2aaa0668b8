"""Counts the cost of a graph at concrete sizes: its products, and the memory of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.shape_inference
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from ivc_export.contract.operators import LINEAR_OPERATORS

ALIASES = frozenset(("Reshape", "Squeeze", "Unsqueeze"))
"""Operators whose output is their input's memory."""

MATMUL_SCRATCH, FEW_ROWS = 32 << 20, {"FusedLinear": 2, "FusedLinearInt4": 8, "FusedLinearInt8": 8}
"""Scratch memory of our kernels' products of many rows for cuBLASLt, and up to how many rows a product needs none."""

Value = npt.NDArray[Any]


class GraphCost(NamedTuple):
    """The cost of one graph at concrete sizes. outputs: bytes by name."""

    flops: int
    peak_bytes: int
    outputs: Mapping[str, int]


class Tensors:
    """Shapes and dtypes of a graph's tensors, by name, and the values of integers that can be computed.

    Sizes may depend on integers that nodes compute (from shapes, or from a picture's patch positions). So integer nodes
    with known inputs are evaluated, and the shapes of all other nodes are inferred one by one.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.types: dict[str, onnx.TypeProto] = {}
        self.values: dict[str, Value] = {}
        self._opsets = {opset.domain: opset.version for opset in model.opset_import}
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
            self.types[value.name] = value.type
        for tensor in model.graph.initializer:
            self.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                self.values[tensor.name] = onnx.numpy_helper.to_array(tensor)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its sizes; -1 if one is not known."""
        dims = self.types[name].tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

    def size(self, name: str) -> int:
        """Its bytes; 0 if a size is not known."""
        if name not in self.types or -1 in self.shape(name):
            return 0
        return int(math.prod(self.shape(name)) * ir.DataType(self.types[name].tensor_type.elem_type).itemsize)

    def know(self, name: str, value: Value) -> None:
        """Remember a value, if it consists of integers, and its type."""
        self.types[name] = onnx.helper.make_tensor_type_proto(int(ir.DataType.from_numpy(value.dtype)), value.shape)
        if value.dtype.kind in "iub":
            self.values[name] = value

    def add(self, node: onnx.NodeProto) -> None:
        """Infer a node's outputs. Outputs of our own operators must be the graph's, or have their shapes."""
        inputs = [name for name in node.input if name]
        if node.op_type == "Shape" and -1 not in self.shape(inputs[0]):
            self.know(node.output[0], np.array(self.shape(inputs[0]), np.int64))
        elif not node.domain and all(name in self.values and self.values[name].dtype.kind in "iub" for name in inputs):
            found = ReferenceEvaluator(node, opsets=self._opsets).run(
                None, {name: self.values[name] for name in inputs}
            )
            for name, value in zip(node.output, found, strict=True):
                self.know(name, np.asarray(value))
        elif node.op_type == "MatMulNBits":
            columns = next(attribute.i for attribute in node.attribute if attribute.name == "N")
            kind = self.types[inputs[0]].tensor_type.elem_type
            self.types[node.output[0]] = onnx.helper.make_tensor_type_proto(
                kind, [*self.shape(inputs[0])[:-1], columns]
            )
        elif node.op_type in LINEAR_OPERATORS:
            wide = node.op_type == "FusedLinearWide"
            kind = onnx.TensorProto.FLOAT if wide else self.types[inputs[0]].tensor_type.elem_type
            shape = [*self.shape(inputs[0])[:-1], self.shape(inputs[1])[0] // halves_of(node)]
            self.types[node.output[0]] = onnx.helper.make_tensor_type_proto(kind, shape)
        elif node.op_type in ("AttendJoined", "TurnHeads"):
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            rows, angles, size = self.shape(inputs[0])[0], self.shape(inputs[1])[0], sizes["head_dim"]
            kind = self.types[inputs[0]].tensor_type.elem_type
            shapes = [[rows, sizes["heads"] * size]]
            if node.op_type == "TurnHeads":
                shapes = [[rows // angles, sizes[name], angles, size] for name in ("heads", "kv_heads", "kv_heads")]
            for name, shape in zip(node.output, shapes, strict=False):
                self.types[name] = onnx.helper.make_tensor_type_proto(kind, shape)
        elif node.op_type in ("AttendInPlace", "EncodeAttend"):
            frames, heads, rows, size = self.shape(inputs[0])
            block = next((attribute.i for attribute in node.attribute if attribute.name == "block_size"), 0)
            shape = [frames, rows - 2 * block, heads * size] if block else [frames * rows, heads * size]
            kind = self.types[inputs[0]].tensor_type.elem_type
            self.types[node.output[0]] = onnx.helper.make_tensor_type_proto(kind, shape)
        elif not node.domain:
            data = {name: onnx.numpy_helper.from_array(self.values[name]) for name in inputs if name in self.values}
            inferred = onnx.shape_inference.infer_node_outputs(
                onnx.defs.get_schema(node.op_type, self._opsets[""]),
                node,
                {name: self.types[name] for name in inputs},
                data,
                opset_imports=[onnx.helper.make_opsetid(*opset) for opset in self._opsets.items()],
            )
            for name, found in inferred.items():
                if name not in self.types or all(d.HasField("dim_value") for d in found.tensor_type.shape.dim):
                    self.types[name] = found


def count(
    graph: onnx.ModelProto,
    axes: Mapping[str, int],
    inputs: Mapping[str, npt.NDArray[Any]] | None = None,
    score_bytes: int = 0,
) -> GraphCost:
    """Count on a graph. Operators of our own count nothing inside.

    axes: sizes of symbolic axes. inputs: arrays that replace inputs by their shapes, and by their values if they are
        integers.
    score_bytes: memory that an operator Attention takes while it runs for each score of a query and a key; 0 if it is
        one kernel that stores none.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if inputs and value.name in inputs:
                dimension.dim_value = inputs[value.name].shape[axis]
            elif dimension.dim_param in axes:
                dimension.dim_value = axes[dimension.dim_param]
    tensors = Tensors(model)
    for name, array in (inputs or {}).items():
        if array.dtype.kind in "iub":
            tensors.know(name, array)
    for node in model.graph.node:
        tensors.add(node)
    flops = sum(flops_of(node, tensors) for node in model.graph.node)
    most = peak(model.graph, tensors, score_bytes)
    return GraphCost(flops, most, {o.name: tensors.size(o.name) for o in model.graph.output})


def flops_of(node: onnx.NodeProto, tensors: Tensors) -> int:
    """Two for each multiply-add of a matrix product, whose left side is never transposed. 0 for other operators."""
    if is_attention(node):
        return 2 * scores_of(node, tensors) * sum(tensors.shape(name)[-1] for name in node.input[1:3])
    if node.op_type not in ("MatMul", "MatMulNBits", "Gemm", *LINEAR_OPERATORS):
        return 0
    flops = 2 * halves_of(node) * math.prod(tensors.shape(node.output[0])) * tensors.shape(node.input[0])[-1]
    assert flops > 0, f"{node.name}: the shapes of a product are unknown"
    return flops


def halves_of(node: onnx.NodeProto) -> int:
    """How many products a node computes side by side: two if one is the other's gate."""
    return 1 + next((attribute.i for attribute in node.attribute if attribute.name == "gated"), 0)


def linear_scratch(node: onnx.NodeProto, tensors: Tensors) -> int:
    """Scratch memory of a product of our kernels, as ivcLinearWorkspace computes it. It is nothing for few rows,
    and for logits.

    For more rows it is cuBLASLt's memory, normed rows, both halves of a gate, and packed weights as floats.
    """
    if node.op_type == "FusedLinearWide":
        return 0
    rows, features = math.prod(tensors.shape(node.input[0])[:-1]), tensors.shape(node.input[0])[-1]
    if rows <= FEW_ROWS[node.op_type]:
        return 0
    columns, width = tensors.shape(node.input[1])[0], tensors.size(node.input[0]) // (rows * features)
    gate = rows * columns * width if halves_of(node) > 1 else 0
    unpacked = columns * features * width if node.op_type != "FusedLinear" else 0
    return MATMUL_SCRATCH + tensors.size(node.input[0]) + gate + unpacked


def is_attention(node: onnx.NodeProto) -> bool:
    """Whether it is opset 23's operator."""
    return not node.domain and node.op_type == "Attention"


def scores_of(node: onnx.NodeProto, tensors: Tensors) -> int:
    """How many pairs of a query and a key an operator Attention compares, in all heads of all frames."""
    scores = math.prod(tensors.shape(node.input[0])[:-1]) * tensors.shape(node.input[1])[-2]
    assert scores >= 0, f"{node.name}: the shapes of attention are unknown"
    return scores


def peak(graph: onnx.GraphProto, tensors: Tensors, score_bytes: int) -> int:
    """The most bytes alive at once. A tensor lives from its node to its last reader, inputs and outputs throughout.

    score_bytes: see count.
    """
    ends = {name: number for number, node in enumerate(graph.node) for name in node.input}
    owner: dict[str, str] = {}  # the tensor whose memory another tensor shares
    for number, node in enumerate(graph.node):
        if node.op_type in ALIASES:
            first = owner.get(node.input[0], node.input[0])
            owner[node.output[0]] = first
            ends[first] = max(ends.get(first, number), ends.get(node.output[0], number))
    kept = {value.name for value in (*graph.input, *graph.output)} | {i.name for i in graph.initializer}
    kept |= {owner[name] for name in kept if name in owner}
    alive = most = sum(tensors.size(value.name) for value in graph.input)
    dying: dict[int, list[str]] = {}
    for number, node in enumerate(graph.node):
        for name in node.output:
            # a product reads what DequantizeLinear takes in its stored form
            if name and name not in owner and node.op_type != "DequantizeLinear":
                alive += tensors.size(name)
                if name not in kept:
                    dying.setdefault(ends.get(name, number), []).append(name)
        working = score_bytes * scores_of(node, tensors) if is_attention(node) else 0
        if node.op_type in LINEAR_OPERATORS:
            working = linear_scratch(node, tensors)
        most = max(most, alive + working)
        alive -= sum(tensors.size(name) for name in dying.pop(number, ()))
    return most
