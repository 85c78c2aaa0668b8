"""Fuses sigmoid-gated activations into one node each."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.lowering.edit import CONTRIB, Editor, remove_unused
from ivc_export.lowering.fused.activation import swish


class FuseActivationsPass(ir.passes.InPlacePass):
    """Replace `x sigmoid(a x)` by onnxruntime's QuickGelu: SiLU is that with alpha 1.

    1. Needs: activations as graph.activations writes them.
    2. Leaves: one node in the place of two or three.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find each activation by its last node, the product."""
        edit, changed = Editor(model.graph), False
        for node in list(model.graph):
            if (found := swish(node)) is not None:
                (y,) = edit.op(node, "QuickGelu", found.x, domain=CONTRIB, alpha=found.slope)
                edit.replace(node.outputs[0], y)
                changed = True
        if changed:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no such activation is left."""
        left = [node.name for node in model.graph if swish(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not replaced")
