"""Widens float16 and bfloat16 graphs for runtimes that compute only in float32."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.dtypes import ONNX_FLOATS

FLOAT = ir.DataType.FLOAT
NARROW = ONNX_FLOATS - {FLOAT}


class WidenFloatsPass(ir.passes.InPlacePass):
    """Make a float16 or bfloat16 graph compute in float32. The weight files stay unchanged.

    1. Needs: a graph whose narrow values come only from inputs, weights and Cast.
    2. Leaves: inputs and outputs in float32; each narrow weight behind one Cast, which onnxruntime folds when it opens
       the graph; no other narrow value.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype inputs, outputs and casts, and put a Cast behind each weight."""
        graph = model.graph
        casts, weights = narrow_casts(graph), narrow_weights(graph)
        ends = [value for value in (*graph.inputs, *graph.outputs) if value.dtype in NARROW]
        for value in ends:
            value.dtype = FLOAT
        for node in casts:
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        for value in weights:
            users, name = tuple(value.uses()), value.name
            cast = ir.node("Cast", [value], {"to": int(FLOAT)}, name=f"{name}/widen")
            cast.outputs[0].name = f"{name}/float32"
            graph.insert_before(graph[0], cast)
            for user, index in users:
                user.replace_input_with(index, cast.outputs[0])
        return ir.passes.PassResult(model, bool(casts or weights or ends))

    def ensures(self, model: ir.Model) -> None:
        """Check that only weights are narrow, and that only casts read them."""
        left = [node.name for node in narrow_casts(model.graph)]
        left += [value.name for value in narrow_weights(model.graph)]
        left += [value.name for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype in NARROW]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not widened")


def narrow_casts(graph: ir.Graph) -> list[ir.Node]:
    """Casts to a narrow dtype."""
    return [n for n in graph.all_nodes() if n.op_type == "Cast" and n.attributes["to"].as_int() in NARROW]


def narrow_weights(graph: ir.Graph) -> list[ir.Value]:
    """Narrow weights that have readers other than casts to float32."""
    weights = [v for v in graph.initializers.values() if v.const_value is not None and v.const_value.dtype in NARROW]
    return [v for v in weights if any(user.op_type != "Cast" for user in v.consumers())]
