"""Moves rotary embedding into attention, in graphs of one row."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ivc_export.contract.graphs import TensorName
from ivc_export.contract.operators import LINEAR_OPERATORS
from ivc_export.lowering.edit import Editor, made_by, remove_unused
from ivc_export.lowering.onnxruntime.projections import projected


class RotateInAttentionPass(ir.passes.InPlacePass):
    """Let GroupQueryAttention rotate, and take query, key and value packed.

    1. Needs: projections that are packed (PackProjectionsPass). Graphs of more than one row stay unchanged.
    2. Leaves: the packed product's result as attention's input. Attention rotates a row by its number in the cache,
       which is not a position of M-RoPE. So position_ids must contain the one row's position for every row of a cache.
       A layer may not allow this: its heads are not of a multiple of 16, which attention does not rotate, are normed
       before rotation, or are ordered in another way. Then all layers stay unchanged, and only the first of the
       positions is read.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Layer by layer."""
        edit = Editor(model.graph)
        positions = [value for value in model.graph.inputs if value.name == "position_ids"]
        if not positions or list(positions[0].shape or ())[-1] != 1:
            return ir.passes.PassResult(model, False)
        layers = sum(TensorName.of(value.name).role == "past" for value in model.graph.inputs) // 2
        found = {node: packed_rows(node) for node in model.graph if node.op_type == "GroupQueryAttention"}
        ways = {node: way for node, way in found.items() if way is not None}
        if len(ways) == layers:
            for node, way in ways.items():
                take_packed_rows(edit, node, *way)
            remove_unused(model.graph)  # the rotations
        else:
            read_first(edit, positions[0])
        positions[0].shape = ir.Shape([*list(positions[0].shape or ())[:-1], "P"])
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that no graph of one row says its position once."""
        for value in model.graph.inputs:
            if value.name == "position_ids" and list(value.shape or ())[-1] == 1:
                raise ir.passes.PostconditionError("position_ids has no place for every row of a cache")


def packed_rows(node: ir.Node) -> tuple[ir.Value, Sequence[ir.Value | None]] | None:
    """The packed rows whose parts are attention's inputs, and the angles by which both query and key are rotated."""
    past_key = node.inputs[3]
    if past_key is None or past_key.shape is None or int(past_key.shape[3]) % 16:  # type: ignore[arg-type]
        return None
    turned = [value.producer() for value in node.inputs[:2] if value is not None]
    rotations = [r for r in turned if r is not None and r.op_type == "RotaryEmbedding"]
    if len(rotations) != 2 or rotations[0].inputs[1:] != rotations[1].inputs[1:]:
        return None
    parts = [projected(value) for value in node.inputs[:3]]
    split = made_by(parts[0], "Split")
    if split is None or split.inputs[0] is None or list(split.outputs) != parts:
        return None
    rows = split.inputs[0].producer()
    # otherwise parts are in another order
    if rows is None or rows.op_type not in ("Gemm", "MatMulNBits", "Add", *LINEAR_OPERATORS):
        return None
    return split.inputs[0], rotations[0].inputs[2:]


def take_packed_rows(edit: Editor, node: ir.Node, rows: ir.Value, angles: Sequence[ir.Value | None]) -> None:
    """Give attention the packed rows and the angles."""
    (packed,) = edit.op(node, "Reshape", rows, edit.ints(1, 1, -1))
    inputs = (packed, None, None, *node.inputs[3:], *angles)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()} | {"do_rotary": 1}
    found = edit.op(node, node.op_type, *inputs, outputs=3, domain=node.domain, **attributes)
    for old, new in zip(node.outputs, found, strict=True):
        edit.replace(old, new)
    edit.graph.remove(node, safe=True)


def read_first(edit: Editor, position_ids: ir.Value) -> None:
    """Read only the first of the positions."""
    users = tuple(position_ids.uses())
    (first,) = edit.op(edit.graph[0], "Slice", position_ids, edit.ints(0), edit.ints(1), edit.ints(2))
    for user, index in users:
        user.replace_input_with(index, first)
