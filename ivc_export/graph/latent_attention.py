"""Attention whose keys and values are computed from one latent vector for each row."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ivc_export.graph.attention import attention, split_heads
from ivc_export.graph.builder import Graph
from ivc_export.graph.decoder_block import Attended, Layer
from ivc_export.graph.norms import rms_norm
from ivc_export.graph.rotary import rotate

NORM_EPSILON = 1e-6
"""Epsilon of the latents' norms. The decoder's other norms may have another."""


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention. Keys and values are expanded, and so are its caches.

    A head's query and key have two parts: one without rotation, then `rotary` values with rotation. The key's second
    part is the same for all heads. latent: size of the vector from which keys and values are computed. query_latent:
    size of the vector for queries; None if they are computed from the row itself.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    latent: int
    rotary: int
    query_latent: int | None

    def __call__(self, layer: Layer, x: ir.Value) -> Attended:
        """x: [rows, hidden], normed."""
        g, s, name = layer.g, layer.sizes, f"{layer.name}.self_attn"
        plain = s.head_dim - self.rotary
        q = split_heads(g, self._queries(layer, x), g.ints(1), s.heads, s.head_dim)
        q_plain, q_turned = g.op_with_outputs(2, "Split", q, g.ints(plain, self.rotary), axis=3)
        both = g.linear(x, f"{name}.kv_a_proj_with_mqa", self.latent + self.rotary, s.hidden_size, bias=False)
        latent, shared = g.op_with_outputs(2, "Split", both, g.ints(self.latent, self.rotary), axis=1)
        latent = rms_norm(g, latent, f"{name}.kv_a_layernorm", self.latent, NORM_EPSILON)
        kv = g.linear(latent, f"{name}.kv_b_proj", s.heads * (plain + s.value_dim), self.latent, bias=False)
        kv = split_heads(g, kv, g.ints(1), s.heads, plain + s.value_dim)
        k_plain, value = g.op_with_outputs(2, "Split", kv, g.ints(plain, s.value_dim), axis=3)
        shared = g.op("Expand", self._turned(layer, g.op("Unsqueeze", shared, g.ints(0, 1))), g.ints(1, s.heads, 1, 1))
        query = g.op("Concat", q_plain, self._turned(layer, q_turned), axis=3)
        key = g.op("Concat", k_plain, shared, axis=3)
        rows = attention(g, query, key, value, layer.past_key, layer.past_value, layer.visible, s)
        added = g.linear(rows, f"{name}.o_proj", s.hidden_size, s.heads * s.value_dim, bias=False)
        return Attended(added, key, value)

    def _queries(self, layer: Layer, x: ir.Value) -> ir.Value:
        """Rows [rows, heads head_dim]."""
        g, s, name = layer.g, layer.sizes, f"{layer.name}.self_attn"
        width = s.heads * s.head_dim
        if self.query_latent is None:
            return g.linear(x, f"{name}.q_proj", width, s.hidden_size, bias=False)
        x = g.linear(x, f"{name}.q_a_proj", self.query_latent, s.hidden_size, bias=False)
        x = rms_norm(g, x, f"{name}.q_a_layernorm", self.query_latent, NORM_EPSILON)
        return g.linear(x, f"{name}.q_b_proj", width, self.query_latent, bias=False)

    def _turned(self, layer: Layer, x: ir.Value) -> ir.Value:
        """Rotate neighbouring values: they are moved half a head apart, and stay there. x: [1, heads, rows, rotary]."""
        return rotate(layer.g, apart(layer.g, x, self.rotary), layer.cos, layer.sin)


def apart(g: Graph, x: ir.Value, size: int) -> ir.Value:
    """Put even places before odd ones. x: [1, heads, rows, size]; returns the same shape."""
    return g.op("Gather", x, g.ints(*range(0, size, 2), *range(1, size, 2)), axis=3)
