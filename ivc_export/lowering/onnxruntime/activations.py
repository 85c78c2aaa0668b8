"""Sigmoid-gated activations as one node each."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.lowering.edit import CONTRIB, Editor, made_by, numbers


class FuseActivationsPass(ir.passes.InPlacePass):
    """Replace `x sigmoid(a x)` by onnxruntime's QuickGelu: SiLU is that with alpha 1.

    1. Needs: activations as graph.activations writes them.
    2. Leaves: one node in the place of two or three.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find the activations by their last node, the product."""
        edit, changed = Editor(model.graph), False
        for node in list(model.graph):
            if (alpha := gate(node)) is not None:
                (y,) = edit.op(node, "QuickGelu", node.inputs[0], domain=CONTRIB, alpha=alpha)
                edit.replace(node.outputs[0], y)
                changed = True
        if changed:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no such activation is left."""
        left = [node.name for node in model.graph if gate(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not replaced")


def gate(node: ir.Node) -> float | None:
    """The a of `x sigmoid(a x)`, if that is what the node gives, x being its first input."""
    sigmoid = made_by(node.inputs[1], "Sigmoid") if node.op_type == "Mul" and len(node.inputs) == 2 else None
    if sigmoid is None:
        return None
    if sigmoid.inputs[0] is node.inputs[0]:
        return 1.0
    scaled = made_by(sigmoid.inputs[0], "Mul")
    if scaled is None or scaled.inputs[0] is not node.inputs[0]:
        return None
    factor = numbers(scaled.inputs[1])
    return factor[0] if len(factor) == 1 else None
