"""Computes GELU in float32, for graphs in float16 and bfloat16."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from ivc_export.lowering.edit import Editor, made_by, remove_unused
from ivc_export.lowering.fused.activation import Activation, activation

FLOAT = ir.DataType.FLOAT


class WidenGeluPass(ir.passes.InPlacePass):
    """Compute GELU by the error function in float32, and round once.

    For x well below 0 the error function is nearly -1, so that the sum with 1 has few bits of a narrow type.

    1. Needs: activations as graph.activations writes them. Those in float32 stay as they are.
    2. Leaves: a cast before and behind each of the others, and the same nodes in between.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Activation by activation."""
        edit = Editor(model.graph)
        found = narrow_gelus(edit)
        for last, gelu in found:
            widen(edit, last, gelu)
        if found:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that none is left in another type."""
        left = narrow_gelus(Editor(model.graph))
        if left:
            raise ir.passes.PostconditionError(f"{left[0][0].name} is not in float32")


def narrow_gelus(edit: Editor) -> list[tuple[ir.Node, Activation]]:
    """GELUs in another type than float32, with the last node of each."""
    found = [(node, one) for node in edit.graph if (one := activation(node)) is not None and one.name == "gelu"]
    return [(node, one) for node, one in found if edit.types[one.x] != FLOAT]


def widen(edit: Editor, last: ir.Node, gelu: Activation) -> None:
    """Put casts around a GELU."""
    dtype, first = edit.types[gelu.x], next(node for node in edit.graph if node in gelu.nodes)
    (wide,) = edit.op(first, "Cast", gelu.x, to=int(FLOAT))
    for node in gelu.nodes:
        widen_inputs(edit, node, gelu.nodes, gelu.x, wide)
    inner = last.outputs[0]
    behind = ir.node("Cast", [inner], {"to": int(dtype)}, name=f"{last.name}/Cast")
    behind.outputs[0].name = behind.name
    edit.graph.insert_after(last, behind)
    edit.replace(inner, behind.outputs[0])
    behind.replace_input_with(0, inner)
    inner.name, inner.type = inner.name or f"{last.name}/wide", ir.TensorType(FLOAT)


def widen_inputs(edit: Editor, node: ir.Node, nodes: Collection[ir.Node], x: ir.Value, wide: ir.Value) -> None:
    """Let a node of a GELU read `wide` for `x`, and its constant before that is cast."""
    for index, value in enumerate(node.inputs):
        if value is x:
            node.replace_input_with(index, wide)
        elif value is not None and value.producer() not in nodes:
            cast = made_by(value, "Cast")
            if cast is not None and edit.types[cast.inputs[0]] == FLOAT:  # type: ignore[index]
                node.replace_input_with(index, cast.inputs[0])
            else:
                node.replace_input_with(index, edit.op(node, "Cast", value, to=int(FLOAT))[0])
