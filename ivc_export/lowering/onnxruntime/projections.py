"""Query, key and value projections as one matrix product."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ivc_export.checkpoint.weights import read_values
from ivc_export.lowering.edit import Editor, back, made_by


class PackProjectionsPass(ir.passes.InPlacePass):
    """Replace the three products that feed a GroupQueryAttention by one, which is split behind it.

    1. Needs: attention as UseFusedAttentionPass leaves it; weights of floats as they are stored, [out, in].
    2. Leaves: one weight and one bias a layer in the place of three, their rows one below the other, put together when
       they are read. Layers whose projections do not read the same rows stay as they were.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Layer by layer."""
        edit, changed = Editor(model.graph), False
        place = {node: number for number, node in enumerate(model.graph)}
        for node in list(model.graph):
            if node.op_type == "GroupQueryAttention":
                found = [projection(value) for value in node.inputs[:3]]
                products = [product for product in found if product is not None]
                if len(products) == 3 and len({(p.inputs[0], len(p.inputs)) for p in products}) == 1:
                    pack(edit, min(products, key=place.__getitem__), products)
                    changed = True
        return ir.passes.PassResult(model, changed)


def projected(value: ir.Value | None) -> ir.Value | None:
    """What an input of attention was before it was turned, if it is, and got its batch axis."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "RotaryEmbedding":
        value = node.inputs[0]
    return back(value, "Reshape")


def projection(value: ir.Value | None) -> ir.Node | None:
    """The Gemm behind an input of attention, whether or not each head is normed in between."""
    value = projected(value)
    norm = made_by(value, "SimplifiedLayerNormalization")
    product = made_by(back(norm.inputs[0], "Reshape", "Reshape") if norm is not None else value, "Gemm")
    weights = [] if product is None else product.inputs[1:]
    return product if all(w is not None and w.const_value is not None for w in weights) else None


def pack(edit: Editor, before: ir.Node, products: list[ir.Node]) -> None:
    """Put one product before the first of several, and let its parts be read in their place."""
    columns = zip(*(product.inputs[1:] for product in products), strict=True)
    weights = [stacked(edit.graph, [value for value in column if value is not None]) for column in columns]
    attributes: dict[str, Any] = {name: value.value for name, value in before.attributes.items()}
    (y,) = edit.op(before, "Gemm", before.inputs[0], *weights, **attributes)
    parts = edit.op(before, "Split", y, edit.ints(*map(features, products)), outputs=len(products), axis=-1)
    for product, part in zip(products, parts, strict=True):
        edit.replace(product.outputs[0], part)
        edit.graph.remove(product, safe=True)


def features(product: ir.Node) -> int:
    """What a product gives for each row."""
    weight = product.inputs[1]
    assert weight is not None and weight.const_value is not None
    return int(weight.const_value.shape.numpy()[0])


def stacked(graph: ir.Graph, values: list[ir.Value]) -> ir.Value:
    """A weight with the rows of several, added to the graph."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    name, dtype = f"{values[0].name}/packed", tensors[0].dtype

    def stack() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([read_values(tensor) for tensor in tensors]), dtype=dtype, name=name)

    shapes = [tensor.shape.numpy() for tensor in tensors]
    shape = ir.Shape([sum(shape[0] for shape in shapes), *shapes[0][1:]])
    tensor = ir.LazyTensor(stack, dtype=dtype, shape=shape, name=name)
    graph.initializers[name] = ir.val(name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    return graph.initializers[name]
