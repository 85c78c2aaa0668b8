"""Attention by our library of custom operators, over rows and over caches that are written in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.contract.operators import ATTENDING
from ivc_export.lowering.edit import CONTRIB, Editor, made_by, numbers
from ivc_export.lowering.onnxruntime.attention import Tables, joined_heads, mask_of, start_of, take_caches
from ivc_export.lowering.tensorrt.attention import AttendInPlacePass, attended, encoded, take_over


class UseOwnAttentionPass(ir.passes.InPlacePass):
    """Call our kernels for attention of the sizes that they take, on rows with their heads side by side.

    1. Needs: a portable graph whose decoder layers see what CausalMask lets them.
    2. Leaves: no Attention of ATTENDED_SIZES, but AttendInPlace(q, k, v [1, S, width], past_key, past_value,
       past_length) -> y [S, heads head_dim], present_key, present_value {scale, heads}, with inputs and outputs as
       UseFusedAttentionPass leaves them; past_length is computed once for all layers. No EncoderAttention and
       WindowAttention of ENCODED_SIZES, but EncodeAttend(q, k, v [frames, rows, width], window_of_place?) -> y as
       the function gives it {scale, heads, head_dim, block_size}.
    """

    def requires(self, model: ir.Model) -> None:
        """Check the masks."""
        AttendInPlacePass().requires(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Call by call."""
        edit, tables, starts = Editor(model.graph), Tables(), dict[ir.Value, ir.Value]()
        decoding, encoding = attended(model.graph), encoded(model.graph)
        for node in decoding:
            attend_rows(edit, node, tables, starts)
        for node in encoding:
            encode_rows(edit, node, tables)
        found = bool(decoding or encoding)
        if found:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, found)

    def ensures(self, model: ir.Model) -> None:
        """Check that no such attention is left."""
        for node in (*attended(model.graph), *encoded(model.graph)):
            raise ir.passes.PostconditionError(f"{node.name} is not replaced")


class ReadPackedRowsPass(ir.passes.InPlacePass):
    """Let our attention read query, key and value where one product has put them side by side.

    1. Needs: attention as UseOwnAttentionPass leaves it, behind packed projections (PackProjectionsPass). What is split
       along its last axis is whole rows.
    2. Leaves: no Split before attention whose query and key are turned alike, or not at all. What is turned is cut out
       and turned as one, and is wider rows of query and key; what is not is read from the product's rows themselves.
       The operators know by the width of rows what stands in them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Call by call."""
        edit, changed = Editor(model.graph), False
        for node in list(model.graph):
            if (parts := packed_parts(node)) is not None:
                read_side_by_side(edit, node, parts)
                changed = True
        if changed:
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no such part is read."""
        for node in model.graph:
            if packed_parts(node) is not None:
                raise ir.passes.PostconditionError(f"{node.name} reads its rows in parts")


@dataclass(frozen=True)
class Part:
    """What `split` gives, in frames by `frames` and turned by `rotation`, as attention reads it."""

    split: ir.Node
    output: ir.Value
    frames: ir.Node
    rotation: ir.Node | None

    @property
    def turned_by(self) -> tuple[ir.Value | None, ...] | None:
        """The offset, the cosines and the sines."""
        return None if self.rotation is None else tuple(self.rotation.inputs[1:])

    @property
    def width(self) -> int:
        """Of its rows."""
        return int(numbers(last(self.frames.inputs[1]))[-1])


def attend_rows(edit: Editor, node: ir.Node, tables: Tables, starts: dict[ir.Value, ir.Value]) -> None:
    """One decoder layer. starts: valid rows of the caches, by the input that says so."""
    position_ids, _, past_length = mask_of(node)
    inputs: list[ir.Value | None] = [joined_heads(edit, node, value, tables) for value in node.inputs[:3]]
    if past_length not in starts:
        starts[past_length] = start_of(edit, node, position_ids, past_length)
    attributes: dict[str, Any] = {
        "scale": node.attributes["scale"].as_float(),
        "heads": node.attributes["heads"].as_int(),
    }
    inputs += [*node.inputs[3:5], starts[past_length]]
    y, *present = edit.op(node, "AttendInPlace", *inputs, outputs=3, domain=IVC_DOMAIN, **attributes)
    take_caches(edit, node, present)
    take_over(edit, node.outputs[0], y)


def encode_rows(edit: Editor, node: ir.Node, tables: Tables) -> None:
    """One encoder layer."""
    block = node.attributes.get("block_size")
    attributes: dict[str, Any] = {
        "scale": node.attributes["scale"].as_float(),
        **{name: node.attributes[name].as_int() for name in ("heads", "head_dim")},
        "block_size": 0 if block is None else block.as_int(),
    }
    inputs = [joined_heads(edit, node, value, tables) for value in node.inputs[:3]]
    (y,) = edit.op(node, "EncodeAttend", *inputs, *node.inputs[3:], domain=IVC_DOMAIN, **attributes)
    take_over(edit, node.outputs[0], y)


def packed_parts(node: ir.Node) -> list[Part] | None:
    """Query, key and value of a call of our attention, if one Split gives them in this order and they can stay."""
    if node.domain != IVC_DOMAIN or node.op_type not in ATTENDING:
        return None
    parts = [part for value in node.inputs[:3] if (part := part_of(value)) is not None]
    if len(parts) < 3 or list(parts[0].split.outputs) != [part.output for part in parts]:
        return None
    query, key, value = parts
    return parts if query.turned_by == key.turned_by and value.rotation is None else None


def part_of(value: ir.Value | None) -> Part | None:
    """What an input of attention is, if it is a part of rows and not normed."""
    rotation = value.producer() if value is not None else None
    if rotation is None or rotation.op_type != "RotaryEmbedding":
        rotation = None
    frames = made_by(rotation.inputs[0] if rotation is not None else value, "Reshape")
    output = frames.inputs[0] if frames is not None else None
    split = made_by(output, "Split")
    if frames is None or output is None or split is None or not numbers(last(frames.inputs[1])):
        return None
    if split.attributes["axis"].as_int() != -1:  # by key-value head: parts lie otherwise
        return None
    return Part(split, output, frames, rotation)


def last(shape: ir.Value | None) -> ir.Value | None:
    """The constant that a shape is, or ends with."""
    joined = made_by(shape, "Concat")
    return joined.inputs[-1] if joined is not None else shape


def read_side_by_side(edit: Editor, node: ir.Node, parts: list[Part]) -> None:
    """Read rows of all three, or of query and key, which are turned, and of all three for the value."""
    query, key, value = parts
    rows, both = query.split.inputs[0], query.width + key.width
    whole = in_frames(edit, node, query, rows, both + value.width)
    turned = whole
    if query.rotation is not None:
        (cut,) = edit.op(node, "Slice", rows, edit.ints(0), edit.ints(both), edit.ints(1))
        cut = in_frames(edit, node, query, cut, both)
        (turned,) = edit.op(node, "RotaryEmbedding", cut, *query.rotation.inputs[1:], domain=CONTRIB, interleaved=0)
    for index, new in enumerate((turned, turned, whole)):
        node.replace_input_with(index, new)


def in_frames(edit: Editor, node: ir.Node, part: Part, rows: ir.Value | None, width: int) -> ir.Value:
    """Rows of another width in the frames that a part was put in."""
    joined = made_by(part.frames.inputs[1], "Concat")
    if joined is None:
        frames = int(numbers(part.frames.inputs[1])[0])
        return edit.op(node, "Reshape", rows, edit.ints(frames, -1, width))[0]
    (shape,) = edit.op(node, "Concat", joined.inputs[0], edit.ints(-1, width), axis=0)
    return edit.op(node, "Reshape", rows, shape)[0]
