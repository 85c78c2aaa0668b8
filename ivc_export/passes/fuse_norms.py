"""Root-mean-square norms, and the sums before them, as one node each."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ivc_export.passes.match import Editor, back, made_by, numbers


class FuseNormsPass(ir.passes.InPlacePass):
    """Replace RMS norms by onnxruntime's SimplifiedLayerNormalization.

    1. Needs: norms as layers.rms_norm writes them.
    2. Leaves: SkipSimplifiedLayerNormalization where what is normed is a sum, with the sum as an output;
       SimplifiedLayerNormalization elsewhere. Both compute in float32, and apply the weight there, too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find the norms by their last node, the product with the weight."""
        edit = Editor(model.graph)
        for node in list(model.graph):
            found = rms_norm(node)
            if found is None:
                continue
            x, epsilon = found
            weight, total = node.inputs[1], made_by(x, "Add")
            if total is not None:
                attributes: dict[str, Any] = {"domain": "com.microsoft", "epsilon": epsilon}
                values = edit.op(
                    total, "SkipSimplifiedLayerNormalization", *total.inputs, weight, outputs=4, **attributes
                )
                for unused in (1, 2):
                    values[unused].name = ""
                edit.replace(x, values[3])
                edit.replace(node.outputs[0], values[0])
            else:
                attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
                (normed,) = edit.op(node, "SimplifiedLayerNormalization", x, weight, **attributes)
                edit.replace(node.outputs[0], normed)
        return ir.passes.PassResult(model, True)


def rms_norm(node: ir.Node) -> tuple[ir.Value, float] | None:
    """What is normed, and epsilon, if `node` is the last of a norm."""
    quotient = made_by(back(node.inputs[0], "Cast"), "Div") if node.op_type == "Mul" and node.inputs else None
    if quotient is None:
        return None
    x = back(quotient.inputs[0], "Cast")
    shifted = made_by(back(quotient.inputs[1], "Sqrt"), "Add")
    square = made_by(back(shifted.inputs[0], "ReduceMean"), "Mul") if shifted is not None else None
    if x is None or shifted is None or square is None or any(v is not quotient.inputs[0] for v in square.inputs):
        return None
    (epsilon,) = numbers(shifted.inputs[1])
    return x, epsilon
