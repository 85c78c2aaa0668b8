"""float16 and bfloat16 graphs for runtimes that compute in float32 only."""

from __future__ import annotations

import onnx_ir as ir

FLOAT = ir.DataType.FLOAT
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class WidenFloatsPass(ir.passes.InPlacePass):
    """Make a float16 or bfloat16 graph compute in float32; the weight files stay as they are.

    1. Needs: a graph whose narrow values come from inputs, weights and Cast alone.
    2. Leaves: inputs and outputs in float32; each narrow weight behind one Cast, which onnxruntime folds when it
       opens the graph; no other narrow value.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype inputs, outputs and casts, and put a Cast behind each weight."""
        graph = model.graph
        for value in (*graph.inputs, *graph.outputs):
            if value.dtype in NARROW:
                value.dtype = FLOAT
        for node in graph.all_nodes():
            if node.op_type == "Cast" and node.attributes["to"].as_int() in NARROW:
                node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype not in NARROW:
                continue
            users = tuple(value.uses())
            cast = ir.node("Cast", [value], {"to": int(FLOAT)}, name=f"{name}/widen")
            cast.outputs[0].name = f"{name}/float32"
            graph.insert_before(graph[0], cast)
            for user, index in users:
                user.replace_input_with(index, cast.outputs[0])
        return ir.passes.PassResult(model, True)
