"""Products with what surrounds them as one node each, for runtimes that have our kernels."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.activation import Activation, activation
from ivc_export.lowering.edit import Editor, called, made_by

ATTENTION = ("Attention", "EncoderAttention", "WindowAttention")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class FuseLinearsPass(ir.passes.InPlacePass):
    """Compute a product, the norm before it and what is done with it behind it in one node.

    1. Needs: a portable graph, or one in scale (ScaleResidualsPass).
    2. Leaves: no Gemm over a weight of floats, but FusedLinear(x [rows, K], weight [N, K], norm? [K], bias? [N],
       residual? [rows, N]) -> y [rows, N] {activation, gated, slope, scale, epsilon}, which computes
       y = f(scale n(x) W^T + bias) + residual in float32. n is RMSNorm with `norm` and `epsilon`, where nothing else
       reads what it gives; f is "none", "swish" (x sigmoid(slope x)), "gelu" or "gelu_tanh". Where gated, weight and
       bias have 2 N rows, and f of the first half multiplies the second: gate and up of a feed-forward. One such node
       gives the rows of query, key and value, which a Split along the last axis takes apart, where one attention reads
       products of the same rows. Weights that are joined, and biases that are scaled, are made when they are read.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Join what is read as one, and fuse product by product."""
        edit = Editor(model.graph)
        products = [node for node in model.graph if is_product(node)]
        for node in [node for node in model.graph if node.domain == IVC_DOMAIN and node.op_type in ATTENTION]:
            join_projections(edit, node)
        for node in [node for node in model.graph if is_product(node)]:
            if node.graph is not None:  # else it was the second half of a gated one
                fuse_product(edit, node)
        if products:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, bool(products))

    def ensures(self, model: ir.Model) -> None:
        """Check that no such product is left."""
        left = [node.name for node in model.graph if is_product(node)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not replaced")


@dataclass
class FusedProduct:
    """What becomes one node. last: the node whose result it gives."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    last: ir.Node
    norm: ir.Value | None = None
    residual: ir.Value | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> ir.Value:
        """What the last node gives."""
        return self.last.outputs[0]

    @property
    def reader(self) -> ir.Node | None:
        """The only node that reads the result, if there is one."""
        users = [use.node for use in self.result.uses()]
        return users[0] if len(users) == 1 and not self.result.is_graph_output() else None


def is_product(node: ir.Node) -> bool:
    """Whether a node is a linear layer over a weight of floats [N, K]."""
    if node.domain != "" or node.op_type != "Gemm":
        return False
    attributes, constants = node.attributes, node.inputs[1:]
    return (
        "transA" not in attributes
        and "transB" in attributes
        and attributes["transB"].as_int() == 1
        and all(c is not None and c.const_value is not None and c.const_value.dtype in FLOATS for c in constants)
    )


def factor(product: ir.Node, name: str) -> float:
    """`alpha` or `beta` of a product."""
    given = product.attributes.get(name)
    return 1.0 if given is None else given.as_float()


def alike(products: Collection[ir.Node]) -> bool:
    """Whether several products can be one: of the same rows, all with biases or none, in the same scale."""
    kinds = {(p.inputs[0], len(p.inputs), factor(p, "alpha"), factor(p, "beta")) for p in products}
    return len(kinds) == 1 and len(products) > 1


def join_projections(edit: Editor, attention: ir.Node) -> None:
    """Let one product give the rows of query, key and value, if three products of the same rows give them."""
    products = [node for value in attention.inputs[:3] if (node := product_of(value)) is not None]
    if len(products) != 3 or len(set(products)) != 3 or not alike(products):
        return
    first = min(products, key=list(edit.graph).index)
    weights = zip(*(product.inputs[1:] for product in products), strict=True)
    joined = [stacked(edit.graph, [w for w in column if w is not None]) for column in weights]
    attributes: dict[str, Any] = {name: value.value for name, value in first.attributes.items()}
    (y,) = edit.op(first, "Gemm", first.inputs[0], *joined, **attributes)
    parts = edit.op(first, "Split", y, edit.ints(*map(columns_of, products)), outputs=3, axis=-1)
    for value in (y, *parts):
        edit.types[value] = edit.types[products[0].outputs[0]]
    for product, part in zip(products, parts, strict=True):
        edit.replace(product.outputs[0], part)
        edit.graph.remove(product, safe=True)


def product_of(value: ir.Value | None) -> ir.Node | None:
    """The product that gives an input of attention, whether or not its heads are normed and turned."""
    for name in ("Rotate", "RMSNorm"):
        node = called(value, name)
        value = node.inputs[0] if node is not None else value
    split = called(value, "SplitHeads")
    product = made_by(split.inputs[0], "Gemm") if split is not None else None
    return product if product is not None and is_product(product) else None


def columns_of(product: ir.Node) -> int:
    """What a product gives for each row."""
    weight = product.inputs[1]
    assert weight is not None and weight.const_value is not None
    return int(weight.const_value.shape.numpy()[0])


def fuse_product(edit: Editor, product: ir.Node) -> None:
    """Put one node in the place of a product and of what surrounds it."""
    x, weight = product.inputs[:2]
    assert x is not None and weight is not None
    linear = FusedProduct(x, weight, bias_of(edit.graph, product), product)
    linear.attributes = {"activation": "none", "gated": 0, "slope": 1.0, "scale": factor(product, "alpha")}
    products = {product}
    behind = activation_behind(product)
    if behind is not None:
        linear.last = next(node for node in behind.nodes if not behind.nodes & set(node.outputs[0].consumers()))
        linear.attributes |= {"activation": behind.name, "slope": behind.slope}
        products |= take_gate(edit, linear, product)
    take_residual(edit, linear)
    take_norm(edit, linear, products)
    operands = [linear.x, linear.weight, linear.norm, linear.bias, linear.residual]
    while operands[-1] is None:
        operands.pop()
    (y,) = edit.op(linear.last, "FusedLinear", *operands, domain=IVC_DOMAIN, **linear.attributes)
    edit.types[y] = edit.types[linear.x]
    edit.replace(linear.result, y)
    edit.graph.remove(linear.last, safe=True)
    for one in products - {linear.last}:
        remove_unread(one)


def bias_of(graph: ir.Graph, product: ir.Node) -> ir.Value | None:
    """What a product adds: its bias, `beta` times."""
    bias, beta = (product.inputs[2] if len(product.inputs) > 2 else None), factor(product, "beta")
    if bias is None or bias.const_value is None or beta == 1.0:
        return bias
    return derived(graph, [bias], f"{bias.name}/{beta:g}", lambda parts: parts[0] * parts[0].dtype.type(beta))


def activation_behind(product: ir.Node) -> Activation | None:
    """The activation that alone reads what a product gives."""
    result = product.outputs[0]
    seen, nodes = set[ir.Node](), list(result.consumers())
    while nodes:  # an activation's last node is a few steps on
        node = nodes.pop()
        found = activation(node) if node not in seen else None
        if found is not None and found.x is result and found.alone:
            return found
        if node not in seen and len(seen) < 8:
            seen.add(node)
            nodes += [user for y in node.outputs for user in y.consumers()]
    return None


def take_gate(edit: Editor, linear: FusedProduct, gate: ir.Node) -> set[ir.Node]:
    """Take in the product that the activation of another one multiplies, if one does; returns it."""
    times = linear.reader
    if times is None or times.domain != "" or times.op_type != "Mul":
        return set()
    other = times.inputs[1] if times.inputs[0] is linear.result else times.inputs[0]
    up = made_by(other, "Gemm")
    if other is None or up is None or not is_product(up) or not alike((gate, up)) or columns_of(up) != columns_of(gate):
        return set()
    if len(other.uses()) > 1 or other.is_graph_output():
        return set()
    linear.last = times
    linear.attributes["gated"] = 1
    weights = [value for product in (gate, up) if (value := product.inputs[1]) is not None]
    linear.weight = stacked(edit.graph, weights)
    if linear.bias is not None and (bias := bias_of(edit.graph, up)) is not None:
        linear.bias = stacked(edit.graph, [linear.bias, bias])
    return {up}


def take_residual(edit: Editor, linear: FusedProduct) -> None:
    """Take in the sum with other rows, if nothing else reads the result."""
    total = linear.reader
    if total is None or total.domain != "" or total.op_type != "Add":
        return
    other = total.inputs[1] if total.inputs[0] is linear.result else total.inputs[0]
    if other is None or other is linear.result or other.const_value is not None:
        return
    if edit.types.get(other) == edit.types[linear.x]:
        linear.residual, linear.last = other, total


def take_norm(edit: Editor, linear: FusedProduct, products: set[ir.Node]) -> None:
    """Take in the norm of the rows, if these products alone read what it gives."""
    norm, dtype = called(linear.x, "RMSNorm"), edit.types[linear.x]
    linear.attributes["epsilon"] = 0.0
    if norm is None or linear.x.is_graph_output() or not products >= set(linear.x.consumers()):
        return
    if edit.types[norm.inputs[0]] == dtype:  # type: ignore[index]
        linear.x, linear.norm = norm.inputs[0], norm.inputs[1]  # type: ignore[assignment]
        linear.attributes["epsilon"] = norm.attributes["epsilon"].as_float()


def remove_unread(node: ir.Node) -> None:
    """Remove a node and what alone reads it: what a fused node replaced."""
    for value in node.outputs:
        for user in tuple(value.consumers()):
            remove_unread(user)
    if node.graph is not None:
        node.graph.remove(node, safe=True)


def stacked(graph: ir.Graph, values: list[ir.Value]) -> ir.Value:
    """A weight with the rows of several, added to the graph."""
    return derived(graph, values, f"{values[0].name}/packed", np.concatenate)


def derived(
    graph: ir.Graph, values: list[ir.Value], name: str, make: Callable[[list[npt.NDArray[Any]]], npt.NDArray[Any]]
) -> ir.Value:
    """A weight that is made of others along their first axis when it is read, added to the graph."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    dtype, shapes = tensors[0].dtype, [tensor.shape.numpy() for tensor in tensors]

    def read() -> ir.TensorProtocol:
        return ir.Tensor(make([read_values(tensor) for tensor in tensors]), dtype=dtype, name=name)

    if name not in graph.initializers:
        shape = ir.Shape([sum(shape[0] for shape in shapes), *shapes[0][1:]])
        tensor = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
        graph.initializers[name] = ir.val(name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    return graph.initializers[name]
