"""Sigmoid-gated activations as one node each."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.lowering.edit import CONTRIB, Editor, made_by, numbers


class FuseActivationsPass(ir.passes.InPlacePass):
    """Replace `x sigmoid(a x)` by onnxruntime's QuickGelu: SiLU is that with alpha 1.

    1. Needs: activations as graph.activations writes them.
    2. Leaves: one node in the place of two or three.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find the activations by their last node, the product."""
        edit = Editor(model.graph)
        for node in list(model.graph):
            sigmoid = made_by(node.inputs[1], "Sigmoid") if node.op_type == "Mul" and len(node.inputs) == 2 else None
            if sigmoid is None:
                continue
            x, alpha = sigmoid.inputs[0], 1.0
            scaled = made_by(x, "Mul")
            if x is not node.inputs[0] and scaled is not None and scaled.inputs[0] is node.inputs[0]:
                x, (alpha,) = scaled.inputs[0], numbers(scaled.inputs[1])
            if x is node.inputs[0]:
                (y,) = edit.op(node, "QuickGelu", x, domain=CONTRIB, alpha=alpha)
                edit.replace(node.outputs[0], y)
        return ir.passes.PassResult(model, True)
