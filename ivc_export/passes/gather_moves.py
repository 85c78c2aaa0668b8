"""Moves of float32 values that TensorRT 8.6 can be told to leave in float32."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.passes.match import Editor, float_types, numbers

FLOAT = ir.DataType.FLOAT


class GatherMovesPass(ir.passes.InPlacePass):
    """Add and drop axes of float32 values by Gather.

    A weakly typed builder may move values in float16 where nothing tells it otherwise. It takes constraints for Gather,
    and builds nothing with constraints on what it reshapes. On an H100 token scores were off by 5.9e-4 with this pass,
    and by 1.1e-3 with the other constraints alone, in one build each. It does not save sums
    beyond 65504: see docs/tensorrt.md.

    1. Needs: a graph of standard operators, or of those and our plugin's, for float16.
    2. Leaves: no Squeeze or Unsqueeze of one axis of a float32 value.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Node by node; types are inferred, and those of our plugin's outputs stand in the graph."""
        graph, edit = model.graph, Editor(model.graph)
        types = {value.name: value.dtype for value in graph.inputs} | float_types(model)
        for node in list(graph):
            x = node.inputs[0] if node.inputs else None
            if node.op_type not in ("Squeeze", "Unsqueeze") or node.domain or x is None or types.get(x.name) != FLOAT:
                continue
            (axis,) = (int(number) for number in numbers(node.inputs[1]))
            if node.op_type == "Squeeze":
                (y,) = edit.op(node, "Gather", x, edit.scalar(0), axis=axis)
            else:
                along = max(axis - 1, 0)
                (y,) = edit.op(node, "Gather", x, everything(edit, node, x, along, axis), axis=along)
            edit.replace(node.outputs[0], y)
            graph.remove(node, safe=True)
        return ir.passes.PassResult(model, True)


def everything(edit: Editor, before: ir.Node, x: ir.Value, along: int, axis: int) -> ir.Value:
    """int32 indices of everything along an axis, [1, n] or, where the new axis comes behind, [n, 1]."""
    (extents,) = edit.op(before, "Shape", x)
    (extent,) = edit.op(before, "Gather", extents, edit.ints(along), axis=0)
    (extent,) = edit.op(before, "Cast", extent, to=int(ir.DataType.INT32))
    (extent,) = edit.op(before, "Squeeze", extent, edit.ints(0))
    (index,) = edit.op(before, "Range", edit.scalar(0), extent, edit.scalar(1))
    (index,) = edit.op(before, "Unsqueeze", index, edit.ints(axis - along))
    return index
