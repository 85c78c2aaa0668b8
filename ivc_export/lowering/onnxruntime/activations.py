"""Fuses activations into one node each."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.lowering.edit import CONTRIB, Editor, made_by, remove_unused
from ivc_export.lowering.fused.activation import Activation, erf_gelu, swish
from ivc_export.lowering.onnxruntime.norms import detached_bias


class FuseActivationsPass(ir.passes.InPlacePass):
    """Replace `x sigmoid(a x)` by onnxruntime's QuickGelu, which is SiLU for alpha 1, and GELU by its Gelu or BiasGelu.

    1. Needs: activations as graph.activations writes them, GELU behind a cast where x is narrow (WidenGeluPass).
    2. Leaves: one node in the place of two to five. BiasGelu adds the bias of the product before it, if nothing else
       reads the product.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find each activation by its last node, the product."""
        edit, changed = Editor(model.graph), False
        for node in list(model.graph):
            if (found := fusable(node)) is not None:
                fuse(edit, node, found)
                changed = True
        if changed:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no such activation is left."""
        left = [node.name for node in model.graph if fusable(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not replaced")


def fusable(node: ir.Node) -> Activation | None:
    """The activation that ends with this node, if onnxruntime has an operator for it."""
    return (swish(node) or erf_gelu(node)) if node.domain == "" and node.op_type == "Mul" else None


def fuse(edit: Editor, node: ir.Node, found: Activation) -> None:
    """Replace an activation, whose last node is `node`, by one node."""
    if found.name == "swish":
        (y,) = edit.op(node, "QuickGelu", found.x, domain=CONTRIB, alpha=found.slope)
    else:
        cast = made_by(found.x, "Cast") if found.alone else None
        product, readers = (found.x, found.nodes) if cast is None else (cast.inputs[0], {cast})
        bias = detached_bias(edit, product, readers)
        if bias is not None and cast is not None:
            (bias,) = edit.op(node, "Cast", bias, to=cast.attributes["to"].as_int())
        inputs = [found.x] if bias is None else [found.x, bias]
        (y,) = edit.op(node, "Gelu" if bias is None else "BiasGelu", *inputs, domain=CONTRIB)
    edit.replace(node.outputs[0], y)
