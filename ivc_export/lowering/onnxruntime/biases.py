"""Turns biases of matrix products into sums behind them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ivc_export.lowering.edit import Editor


class AddBiasesPass(ir.passes.InPlacePass):
    """Replace each product with a bias by a product without a bias and an Add.

    With a bias, onnxruntime's CUDA provider first writes it to every row of the result. That takes twice as long as
    adding it afterwards.

    1. Needs: products in the form of linear layers of floats.
    2. Leaves: no Gemm with a bias.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Product by product."""
        edit, changed = Editor(model.graph), False
        for node in list(model.graph):
            if has_bias(node):
                attributes: dict[str, Any] = {name: value.value for name, value in node.attributes.items()}
                (product,) = edit.op(node, "Gemm", *node.inputs[:2], **attributes)
                (total,) = edit.op(node, "Add", product, edit.added_bias(node))
                edit.replace(node.outputs[0], total)
                model.graph.remove(node, safe=True)
                changed = True
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no product with a bias is left."""
        left = [node.name for node in model.graph if has_bias(node)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} has its bias still")


def has_bias(node: ir.Node) -> bool:
    """Whether a node is a product with a bias."""
    return node.op_type == "Gemm" and len(node.inputs) == 3
