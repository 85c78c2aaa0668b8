"""Computes query, key and value by one product, and rotates query and key together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.graph.functions import PACKED_LINEARS
from ivc_export.lowering.edit import CONTRIB, Editor, called, made_by, remove_unused
from ivc_export.lowering.fused.linears import BITS, FLOATS, join_projections, product_of, rows_of
from ivc_export.lowering.onnxruntime.attention import Tables, like


class RotateTogetherPass(ir.passes.InPlacePass):
    """Compute query, key and value of an attention by one packed product, and rotate query and key by one
    RotaryEmbedding.

    1. Needs: a portable graph. Layers of floats stay unchanged.
    2. Leaves: one packed product for each attention whose three packed products read the same rows. Its weights are
       joined when they are read. Where all heads have one size, and query and key are not normed, its rows are split to
       heads once, and query and key are parts of what one RotaryEmbedding gives. All values are as before, bit by bit.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Layer by layer."""
        edit, changed = Editor(model.graph), False
        attentions = [n for n in model.graph if (n.domain, n.op_type) == (IVC_DOMAIN, "Attention")]
        for node in attentions:
            if reads_packed(edit.graph, node):
                changed |= join_projections(edit, node, BITS, FLOATS)
        tables = Tables()
        for node in attentions:
            if (found := heads_of(node)) is not None:
                rotate_together(edit, node, found, tables)
                changed = True
        if changed:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no heads are left that could rotate together."""
        left = [node.name for node in model.graph if node.op_type == "Attention" and heads_of(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} has a query and a key that rotate one by one")


def reads_packed(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether a packed product gives the query of an attention."""
    product = product_of(graph, rows_of(node.inputs[0]), FLOATS)
    return product is not None and product.node.op_type in PACKED_LINEARS


@dataclass(frozen=True)
class Heads:
    """Heads that are split from one product's rows. frames: SplitHeads's. sizes: heads of query, key and value."""

    rows: ir.Value
    frames: ir.Value
    sizes: Sequence[int]
    size: int
    angles: Sequence[ir.Value | None]


def heads_of(node: ir.Node) -> Heads | None:
    """The heads that an attention reads, if their query and key can rotate together."""
    turned = [called(value, "Rotate") for value in node.inputs[:2]]
    if turned[0] is None or turned[1] is None or turned[0].inputs[1:] != turned[1].inputs[1:]:
        return None
    splits = [called(value, "SplitHeads") for value in (turned[0].inputs[0], turned[1].inputs[0], node.inputs[2])]
    found = [split for split in splits if split is not None]
    rows = made_by(found[0].inputs[0], "Split") if len(found) == 3 else None
    if rows is None or rows.inputs[0] is None or list(rows.outputs) != [split.inputs[0] for split in found]:
        return None
    product = rows.inputs[0].producer()
    if product is None or product.op_type not in ("Add", *PACKED_LINEARS):  # otherwise parts are in another order
        return None
    sizes = {split.attributes["head_dim"].as_int() for split in found}
    frames = {split.inputs[1] for split in found}
    if len(sizes) > 1 or len(frames) > 1 or (frame := frames.pop()) is None:
        return None
    heads = [split.attributes["heads"].as_int() for split in found]
    return Heads(rows.inputs[0], frame, heads, sizes.pop(), turned[0].inputs[1:])


def rotate_together(edit: Editor, node: ir.Node, of: Heads, tables: Tables) -> None:
    """Let an attention read heads that rotate together."""
    first = next(value.producer() for value in node.inputs[:2] if value is not None)
    assert first is not None
    queries, keys, values = of.sizes
    total = queries + keys + values
    (heads,) = edit.op(first, "SplitHeads", of.rows, of.frames, domain=IVC_DOMAIN, heads=total, head_dim=of.size)
    turning, value = edit.op(first, "Split", heads, edit.ints(queries + keys, values), outputs=2, axis=1)
    old = node.inputs[0]
    assert old is not None
    cos, sin = (like(edit, first, table, edit.types[old], tables) for table in of.angles)
    inputs = (turning, edit.ints(0), cos, sin)  # row r of this run rotates by row r of cos and sin
    (turned,) = edit.op(first, "RotaryEmbedding", *inputs, domain=CONTRIB, interleaved=0)
    query, key = edit.op(first, "Split", turned, edit.ints(queries, keys), outputs=2, axis=1)
    for value_before, value_now in zip(node.inputs[:3], (query, key, value), strict=True):
        assert value_before is not None
        edit.replace(value_before, value_now)
