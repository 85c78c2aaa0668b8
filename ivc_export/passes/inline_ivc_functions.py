"""The `native` lowering."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ivc_export.contract import IVC_DOMAIN


class InlineIvcFunctionsPass(ir.passes.InPlacePass):
    """Replace every `ivc` call by its body, so that a runtime without our plugin can read the graph.

    1. Needs: each `ivc` node has a function body in the model.
    2. Leaves: no node, function or import of domain `ivc`; everything else untouched.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that every `ivc` node has a body."""
        bodies = {(function.domain, function.name) for function in model.functions.values()}
        for node in model.graph.all_nodes():
            if node.domain == IVC_DOMAIN and (node.domain, node.op_type) not in bodies:
                raise ir.passes.PreconditionError(
                    f"{node.name}: ivc::{node.op_type} has no body to inline; start from the portable graph"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline the functions of domain `ivc`."""
        result = InlinePass(lambda function: function.domain == IVC_DOMAIN)(model)
        model.graph.opset_imports.pop(IVC_DOMAIN, None)
        return ir.passes.PassResult(model, result.modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that nothing of domain `ivc` is left."""
        left = [node.name for node in model.graph.all_nodes() if node.domain == IVC_DOMAIN]
        if left:
            raise ir.passes.PostconditionError(f"ivc nodes are left: {left[:3]}")
