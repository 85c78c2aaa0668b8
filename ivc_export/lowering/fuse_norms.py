"""Norms, and the sums before them, as one node each."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ivc_export.lowering.match import CONTRIB, Editor, back, made_by, numbers


class FuseNormsPass(ir.passes.InPlacePass):
    """Replace RMS norms by onnxruntime's SimplifiedLayerNormalization, and let norms of both kinds add what they norm.

    1. Needs: norms as layers.rms_norm and layers.layer_norm write them.
    2. Leaves: SkipSimplifiedLayerNormalization and SkipLayerNormalization where what is normed is a sum, with the sum
       as an output, and with the bias of a product that is added; SimplifiedLayerNormalization and LayerNormalization
       elsewhere. All compute in float32, and apply the weight there, too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find RMS norms by their last node, the product with the weight."""
        edit = Editor(model.graph)
        for node in list(model.graph):
            rms = rms_norm(node)
            if rms is not None:
                (x, epsilon, _), op_type = rms, "SimplifiedLayerNormalization"
            elif node.op_type == "LayerNormalization" and node.inputs[0] is not None:
                x, epsilon, op_type = node.inputs[0], node.attributes["epsilon"].as_float(), node.op_type
            else:
                continue
            total = made_by(x, "Add")
            if total is not None:
                fuse_sum(edit, total, node, f"Skip{op_type}", epsilon)
            elif rms is not None:
                attributes: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
                (normed,) = edit.op(node, op_type, x, node.inputs[1], **attributes)
                edit.replace(node.outputs[0], normed)
        return ir.passes.PassResult(model, True)


def fuse_sum(edit: Editor, total: ir.Node, norm: ir.Node, op_type: str, epsilon: float) -> None:
    """Put one node in the place of a sum and its norm, whose last node is `norm`: weights follow its first input."""
    bias = detached_bias(total.inputs[1])
    inputs = [*total.inputs, *norm.inputs[1:], *([bias] if bias is not None else [])]
    values = edit.op(total, op_type, *inputs, outputs=4, domain=CONTRIB, epsilon=epsilon)
    for unused in (1, 2):
        values[unused].name = ""
    edit.replace(total.outputs[0], values[3])
    edit.replace(norm.outputs[0], values[0])


def detached_bias(value: ir.Value | None) -> ir.Value | None:
    """The bias of the product that makes `value`, taken from it, if nothing else reads the product."""
    product = made_by(value, "Gemm")
    if product is None or value is None or len(value.consumers()) > 1 or len(product.inputs) < 3:
        return None
    bias = product.inputs[2]
    product.resize_inputs(2)
    return bias


def rms_norm(node: ir.Node) -> tuple[ir.Value, float, ir.Node] | None:
    """What is normed, epsilon, and the node that adds it, if `node` is the last of a norm."""
    quotient = made_by(back(node.inputs[0], "Cast"), "Div") if node.op_type == "Mul" and node.inputs else None
    if quotient is None:
        return None
    x = back(quotient.inputs[0], "Cast")
    shifted = made_by(back(quotient.inputs[1], "Sqrt"), "Add")
    square = made_by(back(shifted.inputs[0], "ReduceMean"), "Mul") if shifted is not None else None
    if x is None or shifted is None or square is None or any(v is not quotient.inputs[0] for v in square.inputs):
        return None
    (epsilon,) = numbers(shifted.inputs[1])
    return x, epsilon, shifted
