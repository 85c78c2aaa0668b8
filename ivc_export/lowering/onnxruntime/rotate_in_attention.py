"""Rotary embedding inside attention, for graphs of one row."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.lowering.edit import Editor, made_by
from ivc_export.lowering.onnxruntime.projections import projected


class RotateInAttentionPass(ir.passes.InPlacePass):
    """Let GroupQueryAttention rotate, and take query, key and value packed.

    1. Needs: projections that are packed (PackProjectionsPass). Graphs of more rows than one stay as they are.
    2. Leaves: what such a product gives as it is as attention's input. Attention turns a row by its number in the
       cache, which is no position of M-RoPE: position_ids has to say the one row's position for every row of a cache.
       Heads of other sizes than multiples of 16, which it does not turn, stay as they were.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Layer by layer."""
        edit = Editor(model.graph)
        positions = [value for value in model.graph.inputs if value.name == "position_ids"]
        if not positions or list(positions[0].shape or ())[-1] != 1:
            return ir.passes.PassResult(model, False)
        for node in list(model.graph):
            if node.op_type == "GroupQueryAttention":
                take_packed_rows(edit, node)
        RemoveUnusedNodesPass()(model)  # the rotations
        positions[0].shape = ir.Shape([*list(positions[0].shape or ())[:-1], "P"])
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that no graph of one row says its position once."""
        for value in model.graph.inputs:
            if value.name == "position_ids" and list(value.shape or ())[-1] == 1:
                raise ir.passes.PostconditionError("position_ids has no place for every row of a cache")


def take_packed_rows(edit: Editor, node: ir.Node) -> None:
    """Give attention the packed rows, if its inputs are their parts, and query and key are turned alike."""
    past_key = node.inputs[3]
    if past_key is None or past_key.shape is None or int(past_key.shape[3]) % 16:  # type: ignore[arg-type]
        return
    turned = [value.producer() for value in node.inputs[:2] if value is not None]
    rotations = [r for r in turned if r is not None and r.op_type == "RotaryEmbedding"]
    if len(rotations) != 2 or rotations[0].inputs[1:] != rotations[1].inputs[1:]:
        return
    parts = [projected(value) for value in node.inputs[:3]]
    split = made_by(parts[0], "Split")
    if split is None or list(split.outputs) != parts:
        return
    if not any(made_by(split.inputs[0], op_type) for op_type in ("Gemm", "Add")):  # parts lie otherwise
        return
    (packed,) = edit.op(node, "Reshape", split.inputs[0], edit.ints(1, 1, -1))
    inputs = (packed, None, None, *node.inputs[3:], *rotations[0].inputs[2:])
    attributes = {name: attribute.value for name, attribute in node.attributes.items()} | {"do_rotary": 1}
    found = edit.op(node, node.op_type, *inputs, outputs=3, domain=node.domain, **attributes)
    for old, new in zip(node.outputs, found, strict=True):
        edit.replace(old, new)
    edit.graph.remove(node, safe=True)
