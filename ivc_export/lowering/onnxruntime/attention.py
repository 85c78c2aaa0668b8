"""Fuses attention and rotary embedding into one node each, over caches that are written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from ivc_export.contract.caches import in_place_lengths
from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import CONTRIB, Editor, called, numbers, remove_unused

Tables = dict[tuple[ir.Value, int], ir.Value]


class UseFusedAttentionPass(ir.passes.InPlacePass):
    """Replace Attention by onnxruntime's GroupQueryAttention, and EncoderAttention by its MultiHeadAttention.

    Rotations before them become its RotaryEmbedding. Both take rows with their heads side by side, as SplitHeads gets
    them.

    1. Needs: a portable graph whose decoder layers attend to what CausalMask allows.
    2. Leaves: no EncoderAttention; Attention only if values have another size than keys, which GroupQueryAttention does
       not take; lengths as contract.caches.in_place_info says. present_key.i and present_value.i are the caches with
       this run's rows behind the valid ones. Bound to the buffers of past_key.i and past_value.i, they are written in
       place. Keys are rotated before: GroupQueryAttention rotates by row, and rows of a picture share M-RoPE positions.
       Attention in windows stays unchanged.
    """

    def requires(self, model: ir.Model) -> None:
        """Check the masks."""
        for node in model.graph:
            if replaced(node) and node.op_type == "Attention" and called(node.inputs[5], "CausalMask") is None:
                raise ir.passes.PreconditionError(
                    f"{node.name} has a mask of its own, which GroupQueryAttention does not take"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Call by call."""
        edit, tables, found = Editor(model.graph), Tables(), False
        for node in list(model.graph):
            if replaced(node):
                fuse_attention(edit, node, joined_inputs(edit, node, tables))
                found = True
        if found:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, found)

    def ensures(self, model: ir.Model) -> None:
        """Check that no such attention is left."""
        left = [node.name for node in model.graph if replaced(node)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not replaced")


class UseRotaryEmbeddingPass(ir.passes.InPlacePass):
    """Replace rotations that no attention has taken by onnxruntime's RotaryEmbedding.

    1. Needs: rotations of heads that SplitHeads split; others stay.
    2. Leaves: the same values; a rotation between casts takes the dtype around it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rotation by rotation."""
        edit, tables, found = Editor(model.graph), Tables(), False
        for node in list(model.graph):
            if (split := split_before(node)) is not None:
                sizes = [split.attributes[name] for name in ("heads", "head_dim")]
                y = joined_heads(edit, node, node.outputs[0], tables)
                (y,) = edit.op(node, "Reshape", y, edit.ints(0, 0, *(size.as_int() for size in sizes)))
                (y,) = edit.op(node, "Transpose", y, perm=[0, 2, 1, 3])
                edit.replace(node.outputs[0], y)
                found = True
        if found:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, found)

    def ensures(self, model: ir.Model) -> None:
        """Check that no such rotation is left."""
        left = [node.name for node in model.graph if split_before(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not replaced")


def split_before(node: ir.Node) -> ir.Node | None:
    """The node that split the heads that a node rotates, whether or not they are normed in between. None if there is
    none."""
    return heads_before(node.inputs[0])[0] if called(node.outputs[0], "Rotate") else None


def heads_before(x: ir.Value | None) -> tuple[ir.Node | None, ir.Node | None]:
    """The node that split the heads of `x`, and the node that normed each of them after it. None if they are made in
    another way."""
    norm = called(x, "RMSNorm")
    return called(norm.inputs[0] if norm is not None else x, "SplitHeads"), norm


def replaced(node: ir.Node) -> bool:
    """Whether a node is attention that this pass replaces."""
    if node.domain != IVC_DOMAIN or node.op_type not in REPLACEMENTS:
        return False
    caches = node.inputs[3:5] if node.op_type == "Attention" else ()
    return len({value.shape[3] for value in caches if value is not None and value.shape is not None}) < 2


def fuse_attention(edit: Editor, node: ir.Node, heads: Sequence[ir.Value]) -> None:
    """Replace one attention. heads: query, key and value, [frames, rows, heads D]."""
    REPLACEMENTS[node.op_type](edit, node, heads)


def joined_inputs(edit: Editor, node: ir.Node, tables: Tables) -> list[ir.Value]:
    """Query, key and value of an attention with their heads side by side."""
    return [joined_heads(edit, node, value, tables) for value in node.inputs[:3]]


def use_multi_head(edit: Editor, node: ir.Node, inputs: Sequence[ir.Value]) -> None:
    """Replace EncoderAttention."""
    heads, scale = node.attributes["heads"].as_int(), node.attributes["scale"].as_float()
    (y,) = edit.op(node, "MultiHeadAttention", *inputs, domain=CONTRIB, num_heads=heads, scale=scale)
    edit.replace(node.outputs[0], flattened(edit, node, y))


def use_group_query(edit: Editor, node: ir.Node, heads: Sequence[ir.Value]) -> None:
    """Replace Attention."""
    inputs: list[ir.Value | None] = [*heads]
    lengths = length_inputs(edit, mask_of(node)[2])
    sizes = {"num_heads": node.attributes["heads"].as_int(), "kv_num_heads": node.attributes["kv_heads"].as_int()}
    attributes: dict[str, Any] = {**sizes, "scale": node.attributes["scale"].as_float(), "do_rotary": 0}
    inputs += [*node.inputs[3:5], *lengths]
    y, *present = edit.op(node, "GroupQueryAttention", *inputs, outputs=3, domain=CONTRIB, **attributes)
    take_caches(edit, node, present)
    edit.replace(node.outputs[0], flattened(edit, node, y))


REPLACEMENTS = {"Attention": use_group_query, "EncoderAttention": use_multi_head}


def mask_of(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """position_ids, past_key and past_length, from which an Attention's mask is made."""
    causal = called(node.inputs[5], "CausalMask")
    assert causal is not None
    position_ids, past_key, past_length = causal.inputs
    assert position_ids is not None and past_key is not None and past_length is not None
    return position_ids, past_key, past_length


def take_caches(edit: Editor, node: ir.Node, present: Sequence[ir.Value]) -> None:
    """Make the caches of an Attention, with this run's rows, outputs of the graph."""
    for new, old in zip(present, node.inputs[3:5], strict=True):
        assert old is not None
        new.name, new.type, new.shape = TensorName.of(old.name).to("present"), old.type, old.shape
        edit.graph.outputs.append(new)


def start_of(edit: Editor, before: ir.Node, position_ids: ir.Value, past_length: ir.Value) -> ir.Value:
    """The row of a cache for this run's first row, from the inputs that replace `past_length`; int32 [1]."""
    last, _ = length_inputs(edit, past_length)  # past_length + S - 1
    if position_ids.shape is not None and position_ids.shape[2] == 1:
        return last
    (total,) = edit.op(before, "Add", last, edit.scalar(1))  # first: onnxruntime would fetch an input to subtract from
    return edit.op(before, "Sub", total, edit.extent(before, position_ids, 2))[0]


def flattened(edit: Editor, node: ir.Node, y: ir.Value) -> ir.Value:
    """[frames, rows, heads head_dim] as [frames rows, heads head_dim]."""
    width = node.attributes["heads"].as_int() * node.attributes["head_dim"].as_int()
    return edit.op(node, "Reshape", y, edit.ints(-1, width))[0]


def joined_heads(edit: Editor, before: ir.Node, x: ir.Value | None, tables: Tables) -> ir.Value:
    """[frames, heads, rows, D] to [frames, rows, heads D]. If the heads were split from such rows, these rows are
    taken.

    tables: cosines and sines in the dtype of what they rotate, cast once for all layers. Angles are computed in
    float32, and casts around a rotation would move four times its bytes.
    """
    assert x is not None
    rotation = called(x, "Rotate")
    split, norm = heads_before(rotation.inputs[0] if rotation is not None else x)
    if split is None:
        (y,) = edit.op(before, "Transpose", x, perm=[0, 2, 1, 3])
        return edit.op(before, "Reshape", y, edit.ints(0, 0, -1))[0]
    heads, size = (split.attributes[name].as_int() for name in ("heads", "head_dim"))
    width = heads * size
    frames = numbers(split.inputs[1])
    if frames:
        shape = edit.ints(int(frames[0]), -1, width)
    else:
        (shape,) = edit.op(before, "Concat", split.inputs[1], edit.ints(-1, width), axis=0)
    (y,) = edit.op(before, "Reshape", split.inputs[0], shape)
    if norm is not None:
        (y,) = edit.op(before, "Reshape", y, edit.ints(0, 0, heads, size))
        epsilon = norm.attributes["epsilon"].as_float()
        (y,) = edit.op(before, "RMSNorm", y, norm.inputs[1], domain=IVC_DOMAIN, epsilon=epsilon)
        (y,) = edit.op(before, "Reshape", y, edit.ints(0, 0, width))
    if rotation is None:
        return y
    cos, sin = (like(edit, before, table, edit.types[split.inputs[0]], tables) for table in rotation.inputs[1:])  # type: ignore[index]
    offset = edit.ints(0)  # row r of this run rotates by row r of cos and sin
    return edit.op(before, "RotaryEmbedding", y, offset, cos, sin, domain=CONTRIB, interleaved=0)[0]


def like(edit: Editor, before: ir.Node, table: ir.Value | None, dtype: ir.DataType, tables: Tables) -> ir.Value:
    """`table` in `dtype`."""
    assert table is not None
    if edit.types[table] == dtype:
        return table
    if (table, dtype) not in tables:
        (tables[table, dtype],) = edit.op(before, "Cast", table, to=int(dtype))
    return tables[table, dtype]


def length_inputs(edit: Editor, past_length: ir.Value) -> list[ir.Value]:
    """Replace `past_length` by the inputs that stand for it. Readers other than masks compute it from them."""
    graph = edit.graph
    known = {value.name: value for value in graph.inputs}
    wanted = in_place_lengths(str(past_length.name))
    if not known.keys() & wanted:
        place = list(graph.inputs).index(past_length)
        added = [ir.val(name, dtype=ir.DataType.INT32, shape=shape) for name, shape in wanted.items()]
        graph.inputs[place : place + 1] = added
        known |= {value.name: value for value in added}
        for reader, index in tuple(past_length.uses()):
            if called(reader.outputs[0], "CausalMask") is None:
                (total,) = edit.op(reader, "Add", added[0], edit.scalar(1))
                rows = edit.extent(reader, known["position_ids"], 2)
                reader.replace_input_with(index, edit.op(reader, "Sub", total, rows)[0])
    return [known[name] for name in wanted]
