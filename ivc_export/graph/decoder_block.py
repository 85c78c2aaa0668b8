"""What decoder layers are made of: a family chooses each part, and a part asks its layer for the number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from ivc_export.contract.manifest import DecoderSizes
from ivc_export.graph.attention import attention, split_heads
from ivc_export.graph.builder import Graph
from ivc_export.graph.linear import gated_mlp
from ivc_export.graph.norms import rms_norm
from ivc_export.graph.rotary import rotate


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a graph.

    cos, sin: of the rows' rotary angles, [rows, head_dim / 2]. visible: bool [rows, P + rows], what each row sees.
    past_key, past_value: its caches.
    """

    g: Graph
    sizes: DecoderSizes
    number: int
    cos: ir.Value
    sin: ir.Value
    visible: ir.Value
    past_key: ir.Value
    past_value: ir.Value

    @property
    def name(self) -> str:
        """What the names of its weights begin with."""
        return f"model.layers.{self.number}"

    def norm_heads(self, x: ir.Value, name: str) -> ir.Value:
        """RMS norm of every head by itself, with one weight for all. x: [1, heads, rows, head_dim]."""
        return rms_norm(self.g, x, name, self.sizes.head_dim, self.sizes.rms_norm_epsilon)


class Attended(NamedTuple):
    """What attention adds to each row [rows, hidden], and the rows' rotated keys and values [1, kv_heads, rows, D]."""

    added: ir.Value
    key: ir.Value
    value: ir.Value


Projections = Callable[[Layer, ir.Value], Iterator[ir.Value]]
"""Rows [rows, hidden] to queries, keys and values, made one by one: [rows, heads D] each, or [rows, heads, 1, D]."""


@dataclass(frozen=True)
class SeparateProjections:
    """A weight each for queries, keys and values."""

    bias: bool

    def __call__(self, layer: Layer, x: ir.Value) -> Iterator[ir.Value]:
        """As Projections."""
        g, s, name = layer.g, layer.sizes, f"{layer.name}.self_attn"
        yield g.linear(x, f"{name}.q_proj", s.heads * s.head_dim, s.hidden_size, self.bias)
        yield g.linear(x, f"{name}.k_proj", s.kv_heads * s.head_dim, s.hidden_size, self.bias)
        yield g.linear(x, f"{name}.v_proj", s.kv_heads * s.value_dim, s.hidden_size, self.bias)


@dataclass(frozen=True)
class ProjectionsByHead:
    """One weight for all: by key-value head, its queries, its key, its value, of one size.

    Source: InternLM2 (Cai et al. 2024).
    """

    bias: bool

    def __call__(self, layer: Layer, x: ir.Value) -> Iterator[ir.Value]:
        """As Projections."""
        g, s = layer.g, layer.sizes
        group = s.heads // s.kv_heads
        count = (s.heads + 2 * s.kv_heads) * s.head_dim
        fused = g.linear(x, f"{layer.name}.self_attn.qkv_proj", count, s.hidden_size, self.bias)
        heads = g.reshape(fused, -1, s.kv_heads, group + 2, s.head_dim)
        yield from g.op_with_outputs(3, "Split", heads, g.ints(group, 1, 1), axis=2)


@dataclass(frozen=True)
class SelfAttention:
    """Attention of rotated queries to rotated keys, several heads of queries to one of keys and values.

    head_norms: whether each head's query and key pass an RMS norm before they are rotated (Qwen3, Yang et al. 2025).
    """

    project: Projections
    head_norms: bool = False

    def __call__(self, layer: Layer, x: ir.Value) -> Attended:
        """x: [rows, hidden], normed."""
        g, s, name = layer.g, layer.sizes, f"{layer.name}.self_attn"
        parts = self.project(layer, x)

        def rotated(heads: int, norm: str) -> ir.Value:
            y = split_heads(g, next(parts), g.ints(1), heads, s.head_dim)
            y = layer.norm_heads(y, f"{name}.{norm}") if self.head_norms else y
            return rotate(g, y, layer.cos, layer.sin)

        q, key = rotated(s.heads, "q_norm"), rotated(s.kv_heads, "k_norm")
        value = split_heads(g, next(parts), g.ints(1), s.kv_heads, s.value_dim)
        rows = attention(g, q, key, value, layer.past_key, layer.past_value, layer.visible, s)
        added = g.linear(rows, f"{name}.o_proj", s.hidden_size, s.heads * s.value_dim, bias=False)
        return Attended(added, key, value)


def gated_feed_forward(layer: Layer, x: ir.Value) -> ir.Value:
    """The gated MLP of Llama and its kin. x: [rows, hidden], normed; returns what is added to each row."""
    s = layer.sizes
    return gated_mlp(layer.g, x, f"{layer.name}.mlp", s.hidden_size, s.intermediate_size, bias=False)


def decoder_rms_norm(g: Graph, sizes: DecoderSizes, x: ir.Value, name: str) -> ir.Value:
    """RMS norm of rows [rows, hidden]."""
    return rms_norm(g, x, name, sizes.hidden_size, sizes.rms_norm_epsilon)


@dataclass(frozen=True)
class DecoderBlock:
    """A family's decoder layers: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    attention, feed_forward: a layer and normed rows [rows, hidden] to what is added to the rows; layers may differ by
    their numbers. norm: by name, of rows before attention, feed-forward and lm_head.
    """

    attention: Callable[[Layer, ir.Value], Attended]
    feed_forward: Callable[[Layer, ir.Value], ir.Value] = gated_feed_forward
    norm: Callable[[Graph, DecoderSizes, ir.Value, str], ir.Value] = decoder_rms_norm
