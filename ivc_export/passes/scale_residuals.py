"""Residual sums in units of a power of two, for graphs in float16."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.passes.fuse_norms import rms_norm
from ivc_export.passes.match import Editor, made_by

SCALE = 2.0**-4
"""Of the residual stream; sums may then reach 16 * 65504. Embeddings, 0.01 to 0.1 in size, stay normal numbers."""


class ScaleResidualsPass(ir.passes.InPlacePass):
    """Keep a decoder's residual stream at SCALE of its size: some models' sums leave float16's range, 65504.

    Pre-norm layers read the stream through RMS norms alone, which do not change with its scale where epsilon changes
    with its square: (c x) / sqrt(mean((c x)^2) + c^2 e) = x / sqrt(mean(x^2) + e). Powers of two round nothing.

    1. Needs: prefix or decoder as exported; what is added to the stream are products without a bias.
    2. Leaves: embeddings scaled where the stream begins; products that are added to it, by their `alpha`, before they
       are rounded; `hidden_states` between the graphs at SCALE; everything else as it was. Other graphs stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale where the stream begins, what is added to it, and the norms' epsilons."""
        graph, edit = model.graph, Editor(model.graph)
        if graph.name not in ("prefix", "decoder"):
            return ir.passes.PassResult(model, False)
        for value in graph.inputs:
            if value.name == "inputs_embeds":
                scale_embeddings(edit, value)
        for node in list(graph):
            rms = rms_norm(node)
            if rms is not None:
                _, epsilon, shifted = rms
                shifted.replace_input_with(1, edit.scalar(epsilon * SCALE**2, ir.DataType.FLOAT))
            product = made_by(node.inputs[1], "Gemm") if node.op_type == "Add" else None
            if product is not None:
                if len(product.inputs) > 2:
                    raise ir.passes.PreconditionError(
                        f"{product.name}: a product that is added to the stream has a bias"
                    )
                product.attributes["alpha"] = ir.AttrFloat32("alpha", SCALE)
        return ir.passes.PassResult(model, True)


def scale_embeddings(edit: Editor, embeds: ir.Value) -> None:
    """Scale inputs_embeds before anything reads them."""
    users, dtype = tuple(embeds.uses()), embeds.dtype
    assert dtype is not None
    (scaled,) = edit.op(edit.graph[0], "Mul", embeds, edit.scalar(SCALE, dtype))
    for user, index in users:
        user.replace_input_with(index, scaled)
