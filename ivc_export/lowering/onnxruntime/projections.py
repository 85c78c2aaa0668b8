"""Joins the projections to query, key and value into one matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.contract.operators import ATTENDING, JOINED
from ivc_export.lowering.edit import Editor, back, made_by
from ivc_export.lowering.fused.linears import stacked


class PackProjectionsPass(ir.passes.InPlacePass):
    """Replace the three products before attention by one product, which is split behind it.

    1. Needs: attention as UseFusedAttentionPass or UseOwnAttentionPass leaves it; stored weights, floats [out, in] or
       packed.
    2. Leaves: one weight and one bias for each layer instead of three. Their rows are one below the other, joined when
       they are read. Layers whose projections read different rows stay unchanged.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Layer by layer."""
        edit, changed = Editor(model.graph), False
        place = {node: number for number, node in enumerate(model.graph)}
        for node in list(model.graph):
            if node.op_type in ("GroupQueryAttention", *ATTENDING) or joins(node):
                found = [projection(value if joins(node) else projected(value)) for value in node.inputs[:3]]
                parts = [part for part in found if part is not None]
                if len(parts) == 3 and len({part.kind for part in parts}) == 1:
                    pack(edit, min((part.product for part in parts), key=place.__getitem__), parts, node)
                    changed = True
        return ir.passes.PassResult(model, changed)


@dataclass(frozen=True)
class Projection:
    """A product of floats or packed weights. bias: added behind a packed product; the sum is the result."""

    product: ir.Node
    bias: ir.Value | None
    result: ir.Value

    @property
    def features(self) -> int:
        """How many values it gives for each row."""
        weight = self.product.inputs[1]
        assert weight is not None and weight.const_value is not None
        return int(weight.const_value.shape.numpy()[0])

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal in projections that are packed."""
        attributes = [(name, value.value) for name, value in sorted(self.product.attributes.items()) if name != "N"]
        inputs = (self.product.inputs[0], len(self.product.inputs), self.bias is None)
        return (self.product.op_type, *inputs, *attributes)


def projected(value: ir.Value | None) -> ir.Value | None:
    """The source of an input of attention, before rotation (if any) and the batch axis."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "RotaryEmbedding":
        value = node.inputs[0]
    return back(value, "Reshape")


def joins(node: ir.Node) -> bool:
    """Whether a node joins rows for operators of ours over joined rows."""
    readers = {(user.domain, user.op_type) for user, _ in node.outputs[0].uses()}
    return node.op_type == "Concat" and readers <= {(IVC_DOMAIN, name) for name in JOINED}


def projection(value: ir.Value | None) -> Projection | None:
    """The product behind rows that attention reads, whether or not each head is normed in between."""
    norm = made_by(value, "SimplifiedLayerNormalization")
    value = back(norm.inputs[0], "Reshape", "Reshape") if norm is not None else value
    total = made_by(value, "Add")
    behind, bias = (value, None) if total is None else (total.inputs[0], total.inputs[1])
    product = behind.producer() if behind is not None else None
    if product is None or product.op_type not in ("Gemm", "MatMulNBits"):
        return None
    if total is not None and (product.op_type == "Gemm" or len(product.outputs[0].uses()) > 1):
        return None
    weights = [*product.inputs[1:], *([bias] if bias is not None else [])]
    if value is None or any(w is None or w.const_value is None for w in weights):
        return None
    return Projection(product, bias, value)


def pack(edit: Editor, before: ir.Node, parts: list[Projection], reader: ir.Node) -> None:
    """Put one product before the first of several. Its parts replace their results. If `reader` joins these, the whole
    replaces it."""
    columns = zip(*(part.product.inputs[1:] for part in parts), strict=True)
    weights = [stacked(edit.graph, [value for value in column if value is not None]) for column in columns]
    sizes = [part.features for part in parts]
    attributes: dict[str, Any] = {name: value.value for name, value in before.attributes.items()}
    attributes |= {"N": sum(sizes)} if "N" in attributes else {}
    (y,) = edit.op(before, before.op_type, before.inputs[0], *weights, domain=before.domain, **attributes)
    biases = [part.bias for part in parts if part.bias is not None]
    if biases:
        (y,) = edit.op(before, "Add", y, stacked(edit.graph, biases))
    if joins(reader):
        edit.replace(reader.outputs[0], y)
        edit.graph.remove(reader, safe=True)
    slices = edit.op(before, "Split", y, edit.ints(*sizes), outputs=len(parts), axis=-1)
    for part, values in zip(parts, slices, strict=True):
        edit.replace(part.result, values)
        for node in [part.result.producer(), part.product] if part.bias is not None else [part.product]:
            assert node is not None
            edit.graph.remove(node, safe=True)
