"""Fuses norms with the sums before them into one node each."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import CONTRIB, Editor, made_by, remove_unused

NORMS = {"LayerNormalization": "LayerNormalization", "RMSNorm": "SimplifiedLayerNormalization"}
"""Norms of the portable graphs, and onnxruntime's operators for them."""


class FuseNormsPass(ir.passes.InPlacePass):
    """Replace RMS norms by onnxruntime's SimplifiedLayerNormalization, and fuse norms of both kinds with the sums
    before them.

    1. Needs: RMSNorm and LayerNormalization.
    2. Leaves: SkipSimplifiedLayerNormalization and SkipLayerNormalization for norms of a sum, with the sum as an
       output, and with the bias of a product that is added; SimplifiedLayerNormalization and LayerNormalization for
       others. All compute in float32, and apply the weight in float32 too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Norm by norm."""
        edit, changed = Editor(model.graph), False
        for node in list(model.graph):
            if node.op_type not in NORMS:
                continue
            epsilon, total = node.attributes["epsilon"].as_float(), made_by(node.inputs[0], "Add")
            if total is not None:
                fuse_sum(edit, total, node, f"Skip{NORMS[node.op_type]}", epsilon)
                changed = True
            elif node.op_type == "RMSNorm":
                attributes: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
                (normed,) = edit.op(node, NORMS[node.op_type], *node.inputs, **attributes)
                edit.replace(node.outputs[0], normed)
                changed = True
        if changed:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no RMS norm is left, and no norm of a sum."""
        norms = [node for node in model.graph if node.op_type in NORMS]
        left = [n.name for n in norms if n.domain == IVC_DOMAIN or made_by(n.inputs[0], "Add") is not None]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not replaced")


def fuse_sum(edit: Editor, total: ir.Node, norm: ir.Node, op_type: str, epsilon: float) -> None:
    """Replace a sum and its norm, whose last node is `norm`, by one node. The weights have the type of its first
    input."""
    bias = detached_bias(edit, total.inputs[1], {total})
    inputs = [*total.inputs, *norm.inputs[1:], *([bias] if bias is not None else [])]
    values = edit.op(total, op_type, *inputs, outputs=4, domain=CONTRIB, epsilon=epsilon)
    for unused in (1, 2):
        values[unused].name = ""
    edit.replace(total.outputs[0], values[3])
    edit.replace(norm.outputs[0], values[0])


def detached_bias(edit: Editor, value: ir.Value | None, readers: Set[ir.Node]) -> ir.Value | None:
    """Take the bias from the product that makes `value`, if nothing but `readers` reads the product."""
    product = made_by(value, "Gemm")
    if product is None or value is None or not readers >= {*value.consumers()} or len(product.inputs) < 3:
        return None
    bias = edit.added_bias(product)
    product.resize_inputs(2)
    return bias
