"""The parts of decoder layers. A family chooses each part. A part receives its layer, with the layer's number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import onnx_ir as ir

from ivc_export.contract.manifest import DecoderSizes, Scored
from ivc_export.graph.attention import attention, split_heads
from ivc_export.graph.builder import Graph
from ivc_export.graph.linear import gated_mlp
from ivc_export.graph.norms import rms_norm
from ivc_export.graph.rotary import rotate


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a graph.

    cos, sin: of the rows' rotary angles, float32 [rows, head_dim / 2]. visible: bool [rows, P + rows], to what each row
    attends. past_key, past_value: its caches.
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
        """The beginning of its weights' names."""
        return f"model.layers.{self.number}"

    def norm_heads(self, x: ir.Value, name: str) -> ir.Value:
        """RMS norm of each head separately, with one weight for all. x: [1, heads, rows, head_dim]."""
        return rms_norm(self.g, x, name, self.sizes.head_dim, self.sizes.rms_norm_epsilon)


class Attended(NamedTuple):
    """What attention adds to each row [rows, hidden], and the rows' rotated keys and their values [1, kv_heads, rows,
    D]."""

    added: ir.Value
    key: ir.Value
    value: ir.Value


Scoring = Callable[[Layer, ir.Value, Attended], ir.Value]
"""Takes layer k-1, its input rows [rows, hidden], and the result of its attention. Returns the values by which visual
tokens are scored: [1, kv_heads, rows, D]."""


def cached_values(layer: Layer, x: ir.Value, attended: Attended) -> ir.Value:
    """The layer's values, as Scoring."""
    return attended.value


class Projections(Protocol):
    """Turns rows [rows, hidden] into queries, keys and values: [rows, heads D] each, or [rows, heads, 1, D]."""

    def __call__(self, layer: Layer, x: ir.Value) -> Iterator[ir.Value]:
        """All three, one after another."""

    def values(self, layer: Layer, x: ir.Value) -> ir.Value:
        """Only the values."""


@dataclass(frozen=True)
class SeparateProjections:
    """One weight each for queries, keys and values."""

    bias: bool

    def __call__(self, layer: Layer, x: ir.Value) -> Iterator[ir.Value]:
        """See Projections."""
        g, s, name = layer.g, layer.sizes, f"{layer.name}.self_attn"
        yield g.linear(x, f"{name}.q_proj", s.heads * s.head_dim, s.hidden_size, self.bias)
        yield g.linear(x, f"{name}.k_proj", s.kv_heads * s.head_dim, s.hidden_size, self.bias)
        yield self.values(layer, x)

    def values(self, layer: Layer, x: ir.Value) -> ir.Value:
        """See Projections."""
        s, name = layer.sizes, f"{layer.name}.self_attn.v_proj"
        return layer.g.linear(x, name, s.kv_heads * s.value_dim, s.hidden_size, self.bias)


@dataclass(frozen=True)
class ProjectionsByHead:
    """One weight for all. For each key-value head it has its queries, its key and its value, all of one size.

    Source: InternLM2 (Cai et al. 2024).
    """

    bias: bool

    def __call__(self, layer: Layer, x: ir.Value) -> Iterator[ir.Value]:
        """See Projections."""
        g, group = layer.g, layer.sizes.heads // layer.sizes.kv_heads
        yield from g.op_with_outputs(3, "Split", self._fused(layer, x), g.ints(group, 1, 1), axis=2)

    def values(self, layer: Layer, x: ir.Value) -> ir.Value:
        """See Projections. The values are cut out of the product with the whole weight, so that the weight is not
        copied."""
        g, group = layer.g, layer.sizes.heads // layer.sizes.kv_heads
        return g.op("Gather", self._fused(layer, x), g.ints(group + 1), axis=2)

    def _fused(self, layer: Layer, x: ir.Value) -> ir.Value:
        """All of them, [rows, kv_heads, group + 2, D]."""
        g, s = layer.g, layer.sizes
        count = (s.heads + 2 * s.kv_heads) * s.head_dim
        fused = g.linear(x, f"{layer.name}.self_attn.qkv_proj", count, s.hidden_size, self.bias)
        return g.reshape(fused, -1, s.kv_heads, s.heads // s.kv_heads + 2, s.head_dim)


@dataclass(frozen=True)
class SelfAttention:
    """Attention of rotated queries to rotated keys. Several heads of queries share one head of keys and values.

    head_norms: whether each head's query and key pass an RMS norm before rotation (Qwen3, Yang et al. 2025).
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

    def unnormed_values(self, layer: Layer, x: ir.Value, attended: Attended) -> ir.Value:
        """The product of the value weights with rows before the norm, for Scoring.

        Source: IVC-Prune's official code for InternLM2.
        """
        g, s = layer.g, layer.sizes
        return split_heads(g, self.project.values(layer, x), g.ints(1), s.kv_heads, s.value_dim)


def gated_feed_forward(layer: Layer, x: ir.Value) -> ir.Value:
    """The gated MLP of Llama and similar models. x: [rows, hidden], normed; returns what is added to each row."""
    s = layer.sizes
    return gated_mlp(layer.g, x, f"{layer.name}.mlp", s.hidden_size, s.intermediate_size, bias=False)


def decoder_rms_norm(g: Graph, sizes: DecoderSizes, x: ir.Value, name: str) -> ir.Value:
    """RMS norm of rows [rows, hidden]."""
    return rms_norm(g, x, name, sizes.hidden_size, sizes.rms_norm_epsilon)


@dataclass(frozen=True)
class DecoderBlock:
    """A family's decoder layers: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    attention, feed_forward: take a layer and normed rows [rows, hidden], and return what is added to the rows; layers
    may differ by their numbers. norm: by name, of rows before attention, feed-forward and lm_head. scored: the possible
    ways to score visual tokens; the selection rule chooses one.
    """

    attention: Callable[[Layer, ir.Value], Attended]
    feed_forward: Callable[[Layer, ir.Value], ir.Value] = gated_feed_forward
    norm: Callable[[Graph, DecoderSizes, ir.Value, str], ir.Value] = decoder_rms_norm
    scored: Mapping[Scored, Scoring] = field(default_factory=lambda: {"values": cached_values})


def self_attention_block(project: Projections, head_norms: bool = False) -> DecoderBlock:
    """Layers of SelfAttention and gated MLPs."""
    attention = SelfAttention(project, head_norms)
    return DecoderBlock(attention, scored={"values": cached_values, "unnormed-values": attention.unnormed_values})
