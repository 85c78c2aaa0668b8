"""Fuses a product with the operators around it into one node, for runtimes that have our kernels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.graph.functions import PACKED_LINEARS
from ivc_export.lowering.edit import Editor, called, made_by, numbers, remove_unused
from ivc_export.lowering.fused.activation import Activation, activation

ATTENTION = ("Attention", "EncoderAttention", "WindowAttention")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
BITS = (4, 8)
"""Of packed weights that our kernels take."""


class FuseLinearsPass(ir.passes.InPlacePass):
    """Compute a product, the norm before it and the operators after it in one node.

    1. Needs: a portable graph, or one in scale (ScaleResidualsPass).
    2. Leaves: no Gemm over a weight of floats, but FusedLinear(x [rows, K], weight [N, K], norm? [K] or [2 K],
       bias? [N], residual? [rows, N]) -> y [rows, N] {activation, gated, slope, scale, epsilon}, which computes y =
       f(scale n(x) W^T + bias) + residual in float32. n is a norm with `epsilon`, where nothing else reads what it
       gives: RMSNorm with `norm` [K], or LayerNormalization with its weight and then its bias as `norm` [2 K]; f is
       "none", "swish" (x sigmoid(slope x)), "gelu" or "gelu_tanh". Where gated, weight and bias have 2 N rows, and f of
       the first half multiplies the second: gate and up of a feed-forward. One such node gives the rows of query, key
       and value, which a Split along the last axis takes apart, where one attention reads products of the same rows. No
       LinearNBits of `bits` in float16 or bfloat16, but FusedLinearInt4 or FusedLinearInt8(x, packed, scales,
       zero_points?, norm?, bias?, residual?) {block_size and the same}. For logits, FusedLinearWide gives y in float32,
       so that none of them are equal by rounding. Weights that are joined, and biases that are scaled, are made when
       they are read.

    bits: of the packed weights that the runtime's kernels take.
    """

    def __init__(self, bits: Collection[int] = BITS) -> None:
        super().__init__()
        self.bits = bits

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Join products that are read as one, then fuse each product."""
        edit = Editor(model.graph)
        found = [node for node in model.graph if is_product(node, self.bits)]
        for node in [node for node in model.graph if node.domain == IVC_DOMAIN and node.op_type in ATTENTION]:
            join_projections(edit, node, self.bits)
        for node in [node for node in model.graph if is_product(node, self.bits)]:
            if node.graph is not None:  # otherwise it was the second half of a gated product
                fuse_product(edit, node)
        if found:
            remove_unused(model.graph)
            used = {(node.domain, node.op_type, "") for node in model.graph}
            for name in PACKED_LINEARS:
                if (IVC_DOMAIN, name, "") not in used:
                    model.functions.pop((IVC_DOMAIN, name, ""), None)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no such product is left."""
        left = [node.name for node in model.graph if is_product(node, self.bits)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not replaced")


@dataclass(frozen=True)
class BiasedProduct:
    """A product and its bias, which may be added behind it. result: of both. scale: of the product."""

    node: ir.Node
    x: ir.Value
    weights: Sequence[ir.Value | None]
    bias: ir.Value | None
    result: ir.Value
    scale: float

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal in products that become one."""
        attributes = [(n, a.value) for n, a in sorted(self.node.attributes.items()) if n not in ("N", "alpha", "beta")]
        return (self.node.op_type, self.x, len(self.weights), self.bias is None, self.scale, *attributes)

    @property
    def columns(self) -> int:
        """How many values it gives for each row."""
        weight = self.weights[0]
        assert weight is not None and weight.const_value is not None
        return int(weight.const_value.shape.numpy()[0])


@dataclass
class FusedProduct:
    """The parts that become one node. result: the output of the last node that it replaces."""

    x: ir.Value
    weights: Sequence[ir.Value | None]
    bias: ir.Value | None
    result: ir.Value
    attributes: dict[str, Any]
    norm: ir.Value | None = None
    residual: ir.Value | None = None

    @property
    def reader(self) -> ir.Node | None:
        """The only node that reads the result, if there is one."""
        return only_reader(self.result)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads a value, once, if there is one."""
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def is_product(node: ir.Node, bits: Collection[int] = BITS, packed: Collection[ir.DataType] = FLOATS[1:]) -> bool:
    """Whether a node is a linear layer over a weight of floats [N, K], or over a packed weight of `bits`.

    packed: dtypes of a packed weight's scales; by default those that our kernels take.
    """
    constants = [value.const_value if value is not None else None for value in node.inputs[1:]]
    if node.domain == IVC_DOMAIN and node.op_type in PACKED_LINEARS:
        scales = node.inputs[2]
        taken = scales is not None and scales.dtype in packed
        return taken and node.attributes["bits"].as_int() in bits and None not in constants
    if node.domain != "" or node.op_type != "Gemm" or "transA" in node.attributes:
        return False
    transposed = node.attributes.get("transB")
    given = transposed is not None and transposed.as_int() == 1
    return given and all(constant is not None and constant.dtype in FLOATS for constant in constants)


def product_at(graph: ir.Graph, node: ir.Node) -> BiasedProduct:
    """A product with its bias. With packed weights, the bias is added behind the product."""
    x, result = node.inputs[0], node.outputs[0]
    assert x is not None
    if node.op_type == "Gemm":
        alpha, beta = (node.attributes[n].as_float() if n in node.attributes else 1.0 for n in ("alpha", "beta"))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return BiasedProduct(
            node, x, node.inputs[1:2], None if bias is None else scaled_row(graph, bias, beta), result, alpha
        )
    times, scale = made_by(x, "Mul"), 1.0
    if times is not None and only_reader(x) is node and len(numbers(times.inputs[1])) == 1:
        x, scale = times.inputs[0], numbers(times.inputs[1])[0]
        assert x is not None
    total = only_reader(result)
    bias = constant_row(graph, total.inputs[1]) if total is not None and is_standard(total, "Add") else None
    if bias is None or total is None:
        return BiasedProduct(node, x, node.inputs[1:], None, result, scale)
    return BiasedProduct(node, x, node.inputs[1:], bias, total.outputs[0], scale)


def is_standard(node: ir.Node, op_type: str) -> bool:
    """Whether a node is this operator of the default domain."""
    return node.domain == "" and node.op_type == op_type


def constant_row(graph: ir.Graph, value: ir.Value | None) -> ir.Value | None:
    """A constant with one axis, also if it is multiplied by a number; else None."""
    times = made_by(value, "Mul")
    if times is not None and len(factor := numbers(times.inputs[1])) == 1:
        row = constant_row(graph, times.inputs[0])
        return None if row is None else scaled_row(graph, row, factor[0])
    tensor = value.const_value if value is not None else None
    return value if tensor is not None and len(tensor.shape) == 1 else None


def product_of(
    graph: ir.Graph, value: ir.Value | None, packed: Collection[ir.DataType] = FLOATS[1:]
) -> BiasedProduct | None:
    """The product that gives a value, with its bias."""
    total = made_by(value, "Add")
    node = (total.inputs[0] if total is not None else value).producer() if value is not None else None  # type: ignore[union-attr]
    if node is None or not is_product(node, packed=packed):
        return None
    found = product_at(graph, node)
    return found if found.result is value else None


def join_projections(
    edit: Editor, attention: ir.Node, bits: Collection[int], packed: Collection[ir.DataType] = FLOATS[1:]
) -> bool:
    """Let one product give the rows of query, key and value, if three products of the same rows give them, and say
    whether they do. packed: as in is_product."""
    rows = [rows_of(value) for value in attention.inputs[:3]]
    products = [found for value in rows if (found := product_of(edit.graph, value, packed)) is not None]
    products = [one for one in products if is_product(one.node, bits, packed)]
    if len({one.node for one in products}) != 3 or len({one.kind for one in products}) != 1:
        return False
    place = list(edit.graph).index
    first = min(products, key=lambda one: place(one.node)).node
    sizes = [one.columns for one in products]
    attributes: dict[str, Any] = {name: value.value for name, value in first.attributes.items() if name != "beta"}
    attributes |= {"N": sum(sizes)} if "N" in attributes else {}
    weights = joined_weights(edit.graph, products)
    (y,) = edit.op(first, first.op_type, first.inputs[0], *weights, domain=first.domain, **attributes)
    biases = [one.bias for one in products if one.bias is not None]
    if biases:
        (y,) = edit.op(first, "Add", y, stacked(edit.graph, biases))
    parts = edit.op(first, "Split", y, edit.ints(*sizes), outputs=3, axis=-1)
    for value in (y, *parts):
        edit.types[value] = edit.types[products[0].result]
    for one, part in zip(products, parts, strict=True):
        edit.replace(one.result, part)
        remove_unread(one.node)
    return True


def rows_of(value: ir.Value | None) -> ir.Value | None:
    """The rows from which an input of attention is made, whether or not its heads are normed and rotated."""
    for name in ("Rotate", "RMSNorm"):
        node = called(value, name)
        value = node.inputs[0] if node is not None else value
    split = called(value, "SplitHeads")
    return split.inputs[0] if split is not None else None


def joined_weights(graph: ir.Graph, products: list[BiasedProduct]) -> list[ir.Value]:
    """The weights of several products as those of one."""
    columns = zip(*(one.weights for one in products), strict=True)
    return [stacked(graph, [value for value in column if value is not None]) for column in columns]


def fuse_product(edit: Editor, node: ir.Node) -> None:
    """Replace a product and the operators around it by one node."""
    first = product_at(edit.graph, node)
    attributes: dict[str, Any] = {"activation": "none", "gated": 0, "slope": 1.0, "scale": first.scale, "epsilon": 0.0}
    fused = FusedProduct(first.x, first.weights, first.bias, first.result, attributes)
    readers = [node]
    behind = activation_of(fused.result)
    if behind is not None:
        fused.result = behind.result
        attributes |= {"activation": behind.name, "slope": behind.slope}
        readers += take_gate(edit, fused, first)
    take_bias(edit, fused)
    take_residual(edit, fused)
    take_norm(edit, fused, readers)
    operands = [fused.x, *fused.weights]
    op_type = "FusedLinearWide" if node.op_type == "Gemm" and take_cast(edit, fused) else "FusedLinear"
    if node.op_type != "Gemm":
        op_type = f"FusedLinearInt{node.attributes['bits'].as_int()}"
        operands += [None] * (4 - len(operands))
        attributes["block_size"] = node.attributes["block_size"].as_int()
    operands += [fused.norm, fused.bias, fused.residual]
    while operands[-1] is None:
        operands.pop()
    last = fused.result.producer()
    assert last is not None
    (y,) = edit.op(last, op_type, *operands, domain=IVC_DOMAIN, **attributes)
    edit.types[y] = ir.DataType.FLOAT if op_type == "FusedLinearWide" else edit.types[fused.x]
    edit.replace(fused.result, y)
    for one in readers:
        remove_unread(one)


def activation_of(value: ir.Value) -> Activation | None:
    """The activation that is the only reader of a value."""
    seen, nodes = set[ir.Node](), list(value.consumers())
    while nodes:  # an activation's last node is a few steps on
        node = nodes.pop()
        found = activation(node) if node not in seen else None
        if found is not None and found.x is value and found.alone:
            return found
        if node not in seen and len(seen) < 8:
            seen.add(node)
            nodes += [user for y in node.outputs for user in y.consumers()]
    return None


def take_gate(edit: Editor, fused: FusedProduct, gate: BiasedProduct) -> list[ir.Node]:
    """If the activation of another product multiplies this one, fuse this product too, and return it."""
    times = fused.reader
    if times is None or not is_standard(times, "Mul"):
        return []
    other = times.inputs[1] if times.inputs[0] is fused.result else times.inputs[0]
    up = product_of(edit.graph, other)
    if up is None or only_reader(up.result) is None or up.kind != gate.kind or up.columns != gate.columns:
        return []
    fused.result = times.outputs[0]
    fused.attributes["gated"] = 1
    fused.weights = joined_weights(edit.graph, [gate, up])
    if gate.bias is not None and up.bias is not None:
        fused.bias = stacked(edit.graph, [gate.bias, up.bias])
    return [up.node]


def take_bias(edit: Editor, fused: FusedProduct) -> None:
    """Fuse the addition of a constant row, if the product has no bias and no activation."""
    total = fused.reader
    if total is None or not is_standard(total, "Add") or fused.bias is not None:
        return
    row = constant_row(edit.graph, total.inputs[1])
    if row is not None and fused.attributes["activation"] == "none":
        fused.bias, fused.result = row, total.outputs[0]


def take_residual(edit: Editor, fused: FusedProduct) -> None:
    """Fuse the sum with other rows, if nothing else reads the result."""
    total = fused.reader
    if total is None or not is_standard(total, "Add"):
        return
    other = total.inputs[1] if total.inputs[0] is fused.result else total.inputs[0]
    if other is None or other.const_value is not None or constant_row(edit.graph, other) is not None:
        return
    if edit.types.get(other) == edit.types[fused.x]:
        fused.residual, fused.result = other, total.outputs[0]


def take_cast(edit: Editor, fused: FusedProduct) -> bool:
    """Whether the result is a graph's logits, which are cast to float32. The cast is then fused, and rounds nothing."""
    cast = fused.reader
    if cast is None or cast.op_type != "Cast" or edit.types[cast.outputs[0]] != ir.DataType.FLOAT:
        return False
    if edit.types[fused.x] == ir.DataType.FLOAT:
        return False
    batch = only_reader(cast.outputs[0])
    if batch is None or batch.op_type != "Unsqueeze" or not batch.outputs[0].is_graph_output():
        return False
    fused.result = cast.outputs[0]
    return True


def take_norm(edit: Editor, fused: FusedProduct, readers: list[ir.Node]) -> None:
    """Fuse the norm of the rows, if only these products read its output."""
    norm = called(fused.x, "RMSNorm") or made_by(fused.x, "LayerNormalization")
    if norm is None or fused.x.is_graph_output() or not {*readers} >= set(fused.x.consumers()):
        return
    x, *weights = [value for value in norm.inputs if value is not None]
    if edit.types[x] != edit.types[fused.x]:
        return
    if norm.op_type == "LayerNormalization":
        if not layer_norm_taken(edit, norm, weights):
            return
        weights = [stacked(edit.graph, weights)]
    fused.x, fused.norm = x, weights[0]
    fused.attributes["epsilon"] = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5


def layer_norm_taken(edit: Editor, norm: ir.Node, weights: list[ir.Value]) -> bool:
    """Whether our kernels compute a layer norm: over the last axis alone, with a constant weight and a bias."""
    axis = norm.attributes.get("axis")
    constant = len(weights) == 2 and all(value.const_value is not None for value in weights)
    alike = {edit.types[value] for value in (norm.inputs[0], *weights) if value is not None}
    return constant and len(alike) == 1 and (axis is None or axis.as_int() == -1)


def remove_unread(node: ir.Node) -> None:
    """Remove a node that a fused node replaced, and all nodes that read its outputs."""
    for value in node.outputs:
        for user in tuple(value.consumers()):
            remove_unread(user)
    if node.graph is not None:
        node.graph.remove(node, safe=True)


def scaled_row(graph: ir.Graph, row: ir.Value, factor: float) -> ir.Value:
    """A constant times a number, added to the graph."""
    if factor == 1.0:
        return row
    return derived(graph, [row], f"{row.name}/{factor!r}", lambda parts: parts[0] * parts[0].dtype.type(factor))


def stacked(graph: ir.Graph, values: list[ir.Value]) -> ir.Value:
    """A weight with the rows of several, added to the graph. All of them are in its name: others may begin alike."""
    return derived(graph, values, "+".join(str(value.name) for value in values) + "/packed", np.concatenate)


def derived(
    graph: ir.Graph, values: list[ir.Value], name: str, make: Callable[[list[npt.NDArray[Any]]], npt.NDArray[Any]]
) -> ir.Value:
    """A weight computed from others along their first axis when it is read, added to the graph."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    dtype, shapes = tensors[0].dtype, [tensor.shape.numpy() for tensor in tensors]

    def read() -> ir.TensorProtocol:
        return ir.Tensor(make([read_values(tensor) for tensor in tensors]), dtype=dtype, name=name)

    if name not in graph.initializers:
        shape = ir.Shape([sum(shape[0] for shape in shapes), *shapes[0][1:]])
        tensor = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
        graph.initializers[name] = ir.val(name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    return graph.initializers[name]
