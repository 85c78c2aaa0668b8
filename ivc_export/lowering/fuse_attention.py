"""Attention and rotary embedding as one node each, over caches that are written in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.lowering.match import CONTRIB, Editor, back, is_permuted, made_by, numbers


class FuseAttentionPass(ir.passes.InPlacePass):
    """Replace attention by onnxruntime's GroupQueryAttention and MultiHeadAttention, rotations by RotaryEmbedding.

    1. Needs: attention as layers.attend writes it; in the decoder over caches past_key.i and past_value.i.
    2. Leaves: inputs and outputs as contract.ort_cuda_info says. In the decoder, present_key.i and present_value.i are
       the caches with this run's rows behind those that were valid: bound to the buffers of past_key.i and
       past_value.i, they are written in place. Keys are rotated before: GroupQueryAttention rotates by row, and rows
       of a picture share M-RoPE positions. Attention in windows stays as it was.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rotations first: attention then takes over their layout."""
        edit, tables = Editor(model.graph), dict[tuple[ir.Value, int], ir.Value]()
        for node in list(model.graph):
            if node.op_type == "Concat":
                fuse_rotation(edit, node, tables)
        for node in list(model.graph):
            core = attention(node)
            if core is not None and core.mask is None:
                fuse_multi_head(edit, core)
            elif core is not None and made_by(back(core.key, "Reshape"), "Concat") is not None:
                fuse_group_query(edit, core)
        drop_past_length(model)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, True)


def fuse_rotation(edit: Editor, node: ir.Node, tables: dict[tuple[ir.Value, int], ir.Value]) -> None:
    """Replace a rotation of the pairs (j, j + D / 2) of [B, heads, rows, D], if `node` is the last of one.

    One between casts to float32 and back takes the dtype around it, as do its cosines and sines, kept in `tables`:
    angles are computed in float32, and the casts would move four times the bytes of the rotation.
    """
    parts = [made_by(value, op_type) for value, op_type in zip(node.inputs, ("Sub", "Add"), strict=False)]
    products = [made_by(value, "Mul") for part in parts if part is not None for value in part.inputs]
    terms = [tuple(product.inputs) for product in products if product is not None]
    if len(terms) != 4:
        return
    (a, cos), (b, sin) = terms[:2]
    split = made_by(a, "Split")
    if split is None or terms[2:] != [(b, cos), (a, sin)] or list(split.outputs) != [a, b]:
        return
    x, last = split.inputs[0], node.outputs[0]
    assert x is not None and cos is not None and sin is not None
    wide, (user, *others) = made_by(x, "Cast"), last.consumers()
    if wide is not None and user.op_type == "Cast" and not others:
        x, last = wide.inputs[0] or x, user.outputs[0]
        cos, sin = (narrowed(edit, node, table, user.attributes["to"].as_int(), tables) for table in (cos, sin))
    offset = edit.ints(0)  # row r of this run turns by row r of cos and sin
    rotary: dict[str, Any] = {"domain": CONTRIB, "interleaved": 0}
    heads = made_by(is_permuted(x, 0, 2, 1, 3), "Reshape")
    if heads is None:
        (turned,) = edit.op(node, "RotaryEmbedding", x, offset, cos, sin, **rotary)
    else:
        (turned,) = edit.op(node, "RotaryEmbedding", flat(edit, node, x), offset, cos, sin, **rotary)
        (turned,) = edit.op(node, "Reshape", turned, heads.inputs[1])
        (turned,) = edit.op(node, "Transpose", turned, perm=[0, 2, 1, 3])
    edit.replace(last, turned)


def narrowed(
    edit: Editor, before: ir.Node, table: ir.Value, dtype: int, tables: dict[tuple[ir.Value, int], ir.Value]
) -> ir.Value:
    """`table` in `dtype`, cast once for all layers."""
    if (table, dtype) not in tables:
        (tables[table, dtype],) = edit.op(before, "Cast", table, to=dtype)
    return tables[table, dtype]


def flat(edit: Editor, before: ir.Node, x: ir.Value) -> ir.Value:
    """[B, heads, rows, D] as [B, rows, heads * D], taken from before it was transposed where it was."""
    heads = made_by(is_permuted(x, 0, 2, 1, 3), "Reshape")
    if heads is None:
        (y,) = edit.op(before, "Transpose", x, perm=[0, 2, 1, 3])
        (y,) = edit.op(before, "Reshape", y, edit.ints(0, 0, -1))
    else:
        y = heads.inputs[0]  # type: ignore[assignment]
        source = y.producer()
        if source is None or source.op_type != "RotaryEmbedding":
            (y,) = edit.op(before, "Reshape", y, flat_shape(edit, before, heads.inputs[1]))
    return y


def flat_shape(edit: Editor, before: ir.Node, shape: ir.Value | None) -> ir.Value:
    """(B, -1, heads, D) as (B, -1, heads * D); B is a constant, or what the first input of a Concat says."""
    extents = numbers(shape)
    if extents:
        return edit.ints(int(extents[0]), -1, int(extents[2] * extents[3]))
    joined = made_by(shape, "Concat")
    assert joined is not None, f"{before.name}: heads of unknown shape"
    _, heads, size = numbers(joined.inputs[1])
    return edit.op(before, "Concat", joined.inputs[0], edit.ints(-1, int(heads * size)), axis=0)[0]


@dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention. last: its last node. query: [a, b, rows, D]; key, value: [a, b or 1, keys, D]."""

    last: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    mask: ir.Value | None

    @property
    def rows(self) -> ir.Node:
        """The Reshape that makes [rows, hidden] of the result, behind a Transpose."""
        transposed = self.last.outputs[0].consumers()[0]
        reshaped = transposed.outputs[0].consumers()[0]
        assert (transposed.op_type, reshaped.op_type) == ("Transpose", "Reshape"), self.last.name
        return reshaped


def attention(node: ir.Node) -> Attention | None:
    """The attention that ends in `node`, if one does."""
    softmax = made_by(back(node.inputs[0], "Cast"), "Softmax") if node.op_type == "MatMul" else None
    if softmax is None:
        return None
    masked = made_by(softmax.inputs[0], "Add")
    product = made_by(back(masked.inputs[0] if masked else softmax.inputs[0], "Cast"), "MatMul")
    scaled = made_by(product.inputs[0], "Mul") if product is not None else None
    key = is_permuted(product.inputs[1], 0, 1, 3, 2) if product is not None else None
    if scaled is None or key is None:
        return None
    (scale,) = numbers(scaled.inputs[1])
    query, value = scaled.inputs[0], node.inputs[1]
    assert query is not None and value is not None
    return Attention(node, query, key, value, scale, masked.inputs[1] if masked else None)


def fuse_multi_head(edit: Editor, core: Attention) -> None:
    """Attention of every row to every row of its frame, in the vision encoder."""
    rows = core.rows
    heads = made_by(is_permuted(core.value, 0, 2, 1, 3), "Reshape")
    if heads is None:
        return
    shape = heads.inputs[1]
    joined = made_by(shape, "Concat")
    count = int((numbers(shape) or [0, *numbers(joined.inputs[1] if joined else None)])[2])
    inputs = [flat(edit, rows, value) for value in (core.query, core.key, core.value)]
    (y,) = edit.op(rows, "MultiHeadAttention", *inputs, domain=CONTRIB, num_heads=count, scale=core.scale)
    (y,) = edit.op(rows, "Reshape", y, rows.inputs[1])
    edit.replace(rows.outputs[0], y)


def fuse_group_query(edit: Editor, core: Attention) -> None:
    """Attention over a cache and this run's rows, in a decoder layer."""
    rows, graph = core.rows, edit.graph
    grouped = made_by(core.query, "Reshape")
    assert grouped is not None and grouped.inputs[0] is not None
    kv_heads, group = (int(x) for x in numbers(grouped.inputs[1])[:2])
    joined = [made_by(back(cache, "Reshape"), "Concat") for cache in (core.key, core.value)]
    (past_key, key), (past_value, value) = (node.inputs for node in joined if node is not None)
    assert past_key is not None and past_value is not None and key is not None and value is not None
    number = str(past_key.name).rpartition(".")[2]
    own = any(value.name == f"past_length.{number}" for value in graph.inputs)  # a layer that is kept whole
    suffix = f".{number}" if own else ""
    inputs = [flat(edit, rows, x) for x in (grouped.inputs[0], key, value)]
    lengths = [length_input(graph, f"{name}{suffix}", shape) for name, shape in LENGTHS.items()]
    attributes = {"num_heads": kv_heads * group, "kv_num_heads": kv_heads, "scale": core.scale, "do_rotary": 0}
    y, present_key, present_value = edit.op(
        rows, "GroupQueryAttention", *inputs, past_key, past_value, *lengths, outputs=3, domain=CONTRIB, **attributes
    )
    for present, past in ((present_key, past_key), (present_value, past_value)):
        present.name = str(past.name).replace("past_", "present_")
        present.type, present.shape = past.type, past.shape
        graph.outputs.append(present)
    (y,) = edit.op(rows, "Reshape", y, rows.inputs[1])
    edit.replace(rows.outputs[0], y)


LENGTHS: dict[str, tuple[int, ...]] = {"seqlens_k": (1,), "total_sequence_length": ()}
"""Inputs that stand for past_length, and their shapes."""


def length_input(graph: ir.Graph, name: str, shape: tuple[int, ...]) -> ir.Value:
    """The graph's input `name`, added in front of its past_length where it is missing."""
    for value in graph.inputs:
        if value.name == name:
            return value
    _, dot, number = name.partition(".")
    place = next(i for i, value in enumerate(graph.inputs) if value.name == f"past_length{dot}{number}")
    added = ir.val(name, dtype=ir.DataType.INT32, shape=shape)
    graph.inputs.insert(place, added)
    return added


def drop_past_length(model: ir.Model) -> None:
    """Take past_length away where attention no longer reads it, and from the decoder its new_key.i and new_value.i."""
    graph = model.graph
    if not any(str(value.name).startswith("present_") for value in graph.outputs):
        return
    if graph.name == "decoder":
        graph.outputs[:] = [value for value in graph.outputs if not str(value.name).startswith("new_")]
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if str(value.name).startswith("past_length")]:
        if value.uses():
            raise ir.passes.PostconditionError(f"{value.name} is still read by {value.consumers()[0].name}")
        graph.inputs.remove(value)
