"""Scaled dot-product attention, of encoders and of the decoder."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.contract.manifest import DecoderSizes
from ivc_export.graph.builder import Graph
from ivc_export.graph.rotary import rotate


def split_heads(g: Graph, x: ir.Value, frames: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """Split rows whose heads are side by side into heads.

    x: [B rows, heads head_dim]; frames: B, int64 [1]; returns [B, heads, rows, head_dim].
    """
    return g.call("SplitHeads", x, frames, heads=heads, head_dim=head_dim)


def encoder_attention(g: Graph, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """Attention of every row to every row of its frame.

    q, k, v: [B, heads, rows, head_dim]; returns [B rows, heads head_dim].
    """
    return g.call("EncoderAttention", q, k, v, scale=head_dim**-0.5, heads=heads, head_dim=head_dim)


def window_attention(
    g: Graph, q: ir.Value, k: ir.Value, v: ir.Value, window_of_place: ir.Value, heads: int, head_dim: int, block: int
) -> ir.Value:
    """Attention of every place to those of its window, which is in one block of places or in two neighbouring blocks.

    q, k, v: [B, heads, places, head_dim], with a block of padding before and behind; window_of_place: int32 [places],
    -1 for padding; returns [B, places - 2 block, heads head_dim].
    """
    sizes = {"heads": heads, "head_dim": head_dim, "block_size": block}
    return g.call("WindowAttention", q, k, v, window_of_place, scale=head_dim**-0.5, **sizes)


def attention(
    g: Graph,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    past_key: ir.Value,
    past_value: ir.Value,
    visible: ir.Value,
    sizes: DecoderSizes,
) -> ir.Value:
    """Attention over a cache and this run's rows. Several heads of queries share one head of keys and values.

    q: [1, heads, S, head_dim]; k: [1, kv_heads, S, head_dim]; v: [1, kv_heads, S, value_dim]; past_key, past_value: [1,
    kv_heads, P, head_dim] and [1, kv_heads, P, value_dim]; visible: bool [S, P + S], to what each row attends; returns
    [S, heads value_dim].
    """
    numbers = {"heads": sizes.heads, "kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim}
    return g.call("Attention", q, k, v, past_key, past_value, visible, scale=sizes.head_dim**-0.5, **numbers)


def causal_mask(g: Graph, position_ids: ir.Value, past_key: ir.Value, past_length: ir.Value) -> ir.Value:
    """To what each row attends: cache rows below past_length, and rows of this run up to itself; bool [S, P + S].

    position_ids [axes, 1, S] and past_key [1, kv_heads, P, head_dim] give S and P; past_length: int32 [1].
    """
    return g.call("CausalMask", position_ids, past_key, past_length)


def rotated_heads(
    g: Graph, qkv: ir.Value, frames: ir.Value, heads: int, head_dim: int, cos: ir.Value, sin: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries and keys, rotated in float32, and values, [B, heads, rows, head_dim] each.

    qkv: [B rows, 3 heads head_dim]; frames: B, int64 [1]; cos, sin: float32 [rows, head_dim / 2].
    """
    q, k, v = (split_heads(g, part, frames, heads, head_dim) for part in g.op_with_outputs(3, "Split", qkv, axis=-1))
    return rotate(g, q, cos, sin), rotate(g, k, cos, sin), v
