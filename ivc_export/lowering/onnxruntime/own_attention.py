"""Replaces attention by our custom operators, over joined rows and over caches that are written in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import Editor, remove_unused
from ivc_export.lowering.fused.joined_heads import join_heads
from ivc_export.lowering.onnxruntime.attention import (
    Tables,
    fuse_attention,
    joined_inputs,
    mask_of,
    replaced,
    start_of,
    take_caches,
)
from ivc_export.lowering.tensorrt.attention import AttendInPlacePass, attended, encoded, take_over


@dataclass(frozen=True)
class OwnAttention:
    """Which attention our kernels compute, if they take its sizes. Before any other attention, our kernel splits and
    rotates heads.

    row: that of a decode step. rows: that of a decoder layer over many rows. frames: that of an encoder. Windows of an
    encoder are always ours: onnxruntime has no operator for them.
    """

    row: bool = True
    rows: bool = False
    frames: bool = False


FASTEST = OwnAttention()
"""The choice that was fastest on an H200 (benchmarks/results/attention-h200.json). For many rows and for frames,
onnxruntime calls cuDNN's attention, which computes on wgmma."""


class UseOwnAttentionPass(ir.passes.InPlacePass):
    """Use our kernels around attention, and for attention itself if they are faster.

    1. Needs: a portable graph whose decoder layers see what CausalMask lets them.
    2. Leaves: where `own` says so and sizes are those of ATTENDED_SIZES, AttendJoined(rows [S, width], past_key,
       past_value, past_length, cos?, sin?, query_norm?, key_norm?) -> y [S, heads head_dim], present_key, present_value
       {scale, heads, kv_heads, head_dim, grouped, epsilon}; inputs and outputs as UseFusedAttentionPass leaves them,
       past_length computed once for all layers. For windows, and where `own` says so for frames, EncodeAttend(q, k, v
       [frames, rows, width], window_of_place?) -> y as the function gives it {scale, heads, head_dim, block_size}. In
       the place of other attention that UseFusedAttentionPass replaces, what that leaves. Before all but AttendJoined,
       TurnHeads(rows [frames rows, width], frames, cos?, sin?, query_norm?, key_norm?) -> q, k, v [frames, rows, width]
       {heads, kv_heads, head_dim, grouped, epsilon}, where heads are such as fused.joined_heads takes; but in graphs of
       one row, where GroupQueryAttention turns them itself.
    """

    def __init__(self, own: OwnAttention = FASTEST) -> None:
        super().__init__()
        self.own = own

    def requires(self, model: ir.Model) -> None:
        """Check the masks."""
        AttendInPlacePass().requires(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Call by call."""
        shared = Shared(Editor(model.graph), {}, {}, {})
        found = False
        for node in list(model.graph):
            found |= self.replace(shared, node)
        if found:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, found)

    def replace(self, shared: Shared, node: ir.Node) -> bool:
        """Replace one call, if this pass replaces it."""
        one_row = is_one_row(shared.edit.graph)
        if (
            node in attended(shared.edit.graph)
            and (self.own.row if one_row else self.own.rows)
            and attend_joined(shared, node)
        ):
            return True
        if node in encoded(shared.edit.graph) and (node.op_type == "WindowAttention" or self.own.frames):
            encode(shared, node)
            return True
        if one_row or not replaced(node):
            return False
        heads = turned_heads(shared, node)
        if heads is not None:
            fuse_attention(shared.edit, node, heads)
        return heads is not None

    def ensures(self, model: ir.Model) -> None:
        """Check that no windows of these sizes are left."""
        for node in encoded(model.graph):
            if node.op_type == "WindowAttention":
                raise ir.passes.PostconditionError(f"{node.name} is not replaced")


@dataclass(frozen=True)
class Shared:
    """A graph, and values that its layers share: tables by type, angles in float32, valid rows of the caches."""

    edit: Editor
    tables: Tables
    angles: dict[ir.Value, ir.Value]
    starts: dict[ir.Value, ir.Value]


def is_one_row(graph: ir.Graph) -> bool:
    """Whether a graph is for decode steps."""
    return any(value.name == "position_ids" and list(value.shape or ())[-1] == 1 for value in graph.inputs)


def attend_joined(shared: Shared, node: ir.Node) -> bool:
    """Replace one decoder layer's attention, if its heads can be joined."""
    edit, joined = shared.edit, join_heads(shared.edit, node, shared.angles)
    if joined is None:
        return False
    position_ids, _, past_length = mask_of(node)
    if past_length not in shared.starts:
        shared.starts[past_length] = start_of(edit, node, position_ids, past_length)
    inputs = [joined.rows, *node.inputs[3:5], shared.starts[past_length], *joined.optional]
    attributes: dict[str, Any] = {"scale": node.attributes["scale"].as_float(), **joined.attributes}
    y, *present = edit.op(node, "AttendJoined", *inputs, outputs=3, domain=IVC_DOMAIN, **attributes)
    take_caches(edit, node, present)
    take_over(edit, node.outputs[0], y)
    return True


def encode(shared: Shared, node: ir.Node) -> None:
    """Replace one encoder layer's attention."""
    block = node.attributes.get("block_size")
    attributes: dict[str, Any] = {
        "scale": node.attributes["scale"].as_float(),
        **{name: node.attributes[name].as_int() for name in ("heads", "head_dim")},
        "block_size": 0 if block is None else block.as_int(),
    }
    heads = turned_heads(shared, node) or joined_inputs(shared.edit, node, shared.tables)
    (y,) = shared.edit.op(node, "EncodeAttend", *heads, *node.inputs[3:], domain=IVC_DOMAIN, **attributes)
    take_over(shared.edit, node.outputs[0], y)


def turned_heads(shared: Shared, node: ir.Node) -> list[ir.Value] | None:
    """Query, key and value with their heads side by side [frames, rows, width], if our kernel can split them."""
    joined = join_heads(shared.edit, node, shared.angles)
    if joined is None:
        return None
    inputs = [joined.rows, joined.frames, *joined.optional]
    return [*shared.edit.op(node, "TurnHeads", *inputs, outputs=3, domain=IVC_DOMAIN, **joined.attributes)]
