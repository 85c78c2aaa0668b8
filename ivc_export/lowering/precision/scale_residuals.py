"""Scales residual sums by a power of two, for graphs in float16."""

from __future__ import annotations

from typing import NoReturn

import onnx_ir as ir

from ivc_export.contract.graphs import RESIDUALS, SCORED_VALUES
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.errors import UserError
from ivc_export.graph.functions import PACKED_LINEARS
from ivc_export.lowering.edit import Editor, made_by
from ivc_export.lowering.precision.widen_residuals import CARRIERS
from ivc_export.selection.operators import SELECTIONS

SCALE = 2.0**-4
"""Scale of the residual stream. Sums may then reach 16 * 65504. Embeddings, 0.01 to 0.1 in size, stay normal
numbers."""

LINEAR = frozenset((("", "Add"), *((IVC_DOMAIN, name) for name in PACKED_LINEARS)))
"""Operators that are scaled by scaling their input. A packed product has no alpha, and its scales would lose bits."""

NORMS = frozenset(("LayerNormalization", "RMSNorm"))

PRODUCTS = PACKED_LINEARS | {"Gemm"}
HANDED = CARRIERS | {"Add", "SplitHeads"}
"""Operators that may be between a product and the selection: a bias, and operators that hand values on."""


class ScaleResidualsPass(ir.passes.InPlacePass):
    """Keep a decoder's residual stream at SCALE of its size: the sums of some models leave the range of float16, 65504.

    Layers read the stream only through norms. A norm's result does not change with the scale if epsilon changes with
    its square: (c x) / sqrt(mean((c x)^2) + c^2 e) = x / sqrt(mean(x^2) + e). Multiplying by powers of two rounds
    nothing. Values that only the selection reads may be a product with the stream itself; this product then gives
    values of the original size.

    1. Needs: a portable graph. The stream begins at `inputs_embeds` or `hidden_states`, and goes through sums. Only
       norms, nodes that hand values on, and products for the selection read it. A graph without such an input stays
       unchanged.
    2. Leaves: embeddings scaled where the stream begins. Everything added to it is scaled before it is rounded:
       products by their `alpha` and `beta`, or by their inputs. `hidden_states` between the graphs are at SCALE.
       Everything else is unchanged.

    Raises:
        UserError: the stream is read in another way, which would give wrong numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale where the stream begins, and follow it."""
        graph, edit = model.graph, Editor(model.graph)
        stream: set[ir.Value] = set()
        for value in graph.inputs:
            if value.name in RESIDUALS:
                stream.add(value if value.name in RESIDUALS[1:] else scaled_embeddings(edit, value))
        changed = any(value.name == RESIDUALS[0] for value in graph.inputs)
        for node in list(graph) if stream else ():
            if any(value in stream for value in node.inputs):
                changed |= follow(edit, node, stream)
        for value in graph.outputs if stream else ():
            if (value in stream) != (value.name in RESIDUALS):
                end = value.producer()
                assert end is not None
                no = "" if value in stream else "not "
                cannot_scale(end, f"gives {value.name}, which is {no}the residual stream")
        return ir.passes.PassResult(model, changed)


def scaled_embeddings(edit: Editor, embeds: ir.Value) -> ir.Value:
    """Scale inputs_embeds before anything reads them."""
    users, dtype = tuple(embeds.uses()), embeds.dtype
    assert dtype is not None
    (scaled,) = edit.op(edit.graph[0], "Mul", embeds, edit.scalar(SCALE, dtype))
    for user, index in users:
        user.replace_input_with(index, scaled)
    return scaled


def follow(edit: Editor, node: ir.Node, stream: set[ir.Value]) -> bool:
    """Change a node that reads the stream so that the rest of the graph stays as it was. Return whether it was changed.

    Raises:
        UserError: the node is not a norm, a sum or a product for the selection, and does not hand values on.
    """
    if (
        (node.op_type in CARRIERS or node.op_type == "Cast")
        and node.domain in ("", IVC_DOMAIN)
        and node.inputs[0] in stream
    ):
        stream.add(node.outputs[0])
        return False
    if node.op_type in NORMS and node.inputs[0] in stream:
        epsilon = node.attributes["epsilon"].as_float()
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * SCALE**2)
        return True
    if node.op_type in PRODUCTS and node.inputs[0] in stream and for_selection(node):
        unscale_product(edit, node)
        return True
    if node.op_type != "Add":
        cannot_scale(node, "reads the residual stream")
    addends = [(i, value) for i, value in enumerate(node.inputs) if value is not None and value not in stream]
    for index, value in addends:
        scale_addend(edit, node, index, value)
    stream.add(node.outputs[0])
    return bool(addends)


def for_selection(node: ir.Node) -> bool:
    """Whether a node's results go only to the selection, and to the output that shows the selection's input."""
    users = [user for value in node.outputs for user in value.consumers()]
    ways = [user.op_type in SELECTIONS or (user.op_type in HANDED and for_selection(user)) for user in users]
    ways += [value.name == SCORED_VALUES for value in node.outputs if value.is_graph_output()]
    return bool(ways) and all(ways)


def unscale_product(edit: Editor, node: ir.Node) -> None:
    """Let a product with the stream give its original size: by its `alpha`, or from rows at full size."""
    if node.op_type == "Gemm":
        given = node.attributes.get("alpha")
        node.attributes["alpha"] = ir.AttrFloat32("alpha", (given.as_float() if given else 1.0) / SCALE)
        return
    value = node.inputs[0]
    dtype = next(one.dtype for one in edit.graph.inputs if one.name in RESIDUALS)
    assert value is not None and dtype is not None
    (whole,) = edit.op(node, "Mul", value, edit.scalar(1 / SCALE, dtype))
    node.replace_input_with(0, whole)


def scale_addend(edit: Editor, total: ir.Node, index: int, value: ir.Value) -> None:
    """Scale a value that is added to the stream: in its product if nothing else reads this, or behind it."""
    node = value.producer() if len(value.uses()) == 1 and not value.is_graph_output() else None
    if made_by(value, "Gemm") is node is not None:
        for name in ("alpha", "beta"):  # of x W^T and of the bias
            given = node.attributes.get(name)
            node.attributes[name] = ir.AttrFloat32(name, SCALE * (given.as_float() if given else 1.0))
        return
    if node is not None and (node.domain, node.op_type) in LINEAR:
        addends = node.inputs if node.op_type == "Add" else node.inputs[:1]
        for number, addend in enumerate(addends):
            assert addend is not None
            scale_addend(edit, node, number, addend)
        return
    dtype = next(value.dtype for value in edit.graph.inputs if value.name in RESIDUALS)
    assert dtype is not None
    (scaled,) = edit.op(total, "Mul", value, edit.scalar(SCALE, dtype))
    total.replace_input_with(index, scaled)


def cannot_scale(node: ir.Node, what: str) -> NoReturn:
    """Raise the sentence about a node that cannot be scaled.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{node.name or node.op_type} ({node.op_type}) {what}, so its values cannot be kept within the range of "
        "float16: build engines with ivc-build --dtype float32, or use onnxruntime's CPU provider"
    )
