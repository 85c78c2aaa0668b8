"""Residual sums in units of a power of two, for graphs in float16."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import onnx_ir as ir

from ivc_export.contract import IVC_DOMAIN
from ivc_export.errors import UserError
from ivc_export.lowering.fuse_norms import rms_norm
from ivc_export.lowering.match import Editor, back, made_by
from ivc_export.lowering.widen_residuals import CARRIERS

SCALE = 2.0**-4
"""Of the residual stream; sums may then reach 16 * 65504. Embeddings, 0.01 to 0.1 in size, stay normal numbers."""
STREAM = "hidden_states"
"""The stream where it passes from prefix to decoder."""


class Norm(NamedTuple):
    """An RMS norm: the Add of its epsilon, and epsilon."""

    shifted: ir.Node
    epsilon: float


class ScaleResidualsPass(ir.passes.InPlacePass):
    """Keep a decoder's residual stream at SCALE of its size: some models' sums leave float16's range, 65504.

    Pre-norm layers read the stream through RMS norms alone, which do not change with its scale where epsilon changes
    with its square: (c x) / sqrt(mean((c x)^2) + c^2 e) = x / sqrt(mean(x^2) + e). Powers of two round nothing.

    The stream is followed from inputs_embeds, or from hidden_states, on. A norm of anything else, as of queries and
    keys, stays as it is.

    1. Needs: prefix or decoder as exported. Nothing reads the stream but RMS norms and sums; what is added to it is the
       stream itself, or a product without a bias that nothing else reads.
    2. Leaves: embeddings scaled where the stream begins; products that are added to it, by their `alpha`, before they
       are rounded; `hidden_states` between the graphs at SCALE; everything else as it was. Other graphs stay.

    Raises:
        UserError: the stream is read or added to in another way, which would give wrong numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale where the stream begins, what is added to it, and the norms' epsilons."""
        graph, edit = model.graph, Editor(model.graph)
        if graph.name not in ("prefix", "decoder"):
            return ir.passes.PassResult(model, False)
        norms = {part: norm for node in graph for part, norm in norm_parts(node).items()}
        stream = {value for value in graph.inputs if value.name == STREAM}
        stream |= {scale_embeddings(edit, value) for value in graph.inputs if value.name == "inputs_embeds"}
        for node in graph:
            own = [value for value in node.inputs if value in stream]
            if not own:
                continue
            if node in norms:
                shifted, epsilon = norms[node]
                shifted.replace_input_with(1, edit.scalar(epsilon * SCALE**2, ir.DataType.FLOAT))
                continue
            if node.op_type == "Add":
                for value in node.inputs:
                    if value not in stream:
                        scale_addend(node, value)
            elif not (carries(node) and len(own) == 1 and node.inputs[0] in stream):
                refuse(node, "reads the residual stream")
            stream.add(node.outputs[0])
        for value in graph.outputs:
            if (value in stream) != (value.name == STREAM):
                end = value.producer()
                assert end is not None
                refuse(end, f"gives {value.name}, which is {'not ' if value.name == STREAM else ''}the residual stream")
        return ir.passes.PassResult(model, True)


def scale_embeddings(edit: Editor, embeds: ir.Value) -> ir.Value:
    """Scale inputs_embeds before anything reads them; returns the scaled ones."""
    users, dtype = tuple(embeds.uses()), embeds.dtype
    assert dtype is not None
    (scaled,) = edit.op(edit.graph[0], "Mul", embeds, edit.scalar(SCALE, dtype))
    for user, index in users:
        user.replace_input_with(index, scaled)
    return scaled


def norm_parts(last: ir.Node) -> dict[ir.Node, Norm]:
    """The nodes of an RMS norm that read what it norms, its square and its quotient, if `last` is its last node and
    nothing but the norm reads what depends on the scale.
    """
    rms = rms_norm(last)
    if rms is None:
        return {}
    _, epsilon, shifted = rms
    mean = made_by(shifted.inputs[0], "ReduceMean")
    square = made_by(back(shifted.inputs[0], "ReduceMean"), "Mul")
    quotient = made_by(back(last.inputs[0], "Cast"), "Div")
    assert mean is not None and square is not None and quotient is not None
    root = made_by(quotient.inputs[1], "Sqrt")
    inner = [node.outputs[0] for node in (square, mean, shifted, root) if node is not None]
    if any(len(value.uses()) != 1 or value.is_graph_output() for value in inner):
        return {}
    return dict.fromkeys((square, quotient), Norm(shifted, epsilon))


def carries(node: ir.Node) -> bool:
    """Whether a node hands the values of its first input on as they are."""
    return node.op_type == "Cast" or (node.op_type in CARRIERS and node.domain in ("", IVC_DOMAIN))


def scale_addend(node: ir.Node, addend: ir.Value | None) -> None:
    """Scale what `node` adds to the stream.

    Raises:
        UserError: it is no product without a bias, or something else reads it, too.
    """
    product = made_by(addend, "Gemm")
    if addend is None or product is None:
        refuse(node, "adds to the residual stream what is no product")
    if any(value is not None for value in product.inputs[2:]):
        refuse(node, "adds to the residual stream a product that has a bias")
    if len(addend.uses()) != 1 or addend.is_graph_output():
        refuse(node, "adds to the residual stream a product that something else reads, too")
    alpha = product.attributes.get("alpha")
    product.attributes["alpha"] = ir.AttrFloat32("alpha", SCALE * (1.0 if alpha is None else alpha.as_float()))


def refuse(node: ir.Node, what: str) -> NoReturn:
    """Say what cannot be scaled.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{node.name or node.op_type} ({node.op_type}) {what}, which cannot be kept within float16's range here: build "
        "engines with ivc-build --dtype fp32, or use onnxruntime's CPU provider"
    )
