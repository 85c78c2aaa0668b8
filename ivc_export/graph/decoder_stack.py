"""The language decoder's layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from ivc_export.contract.manifest import DecoderSizes, RotarySizes
from ivc_export.graph.attention import attention, causal_mask, split_heads
from ivc_export.graph.builder import Graph
from ivc_export.graph.linear import gated_mlp, linear
from ivc_export.graph.norms import rms_norm
from ivc_export.graph.rotary import rotary_angles, rotary_frequencies, rotate


class DecoderStack:
    """The decoder layers `numbers`, which share rotary angles and masks.

    position_ids: int32 [axes, 1, rows]. Caches are as long as each other, but for those of layers in `whole`.
    """

    def __init__(
        self,
        g: Graph,
        sizes: DecoderSizes,
        rotary: RotarySizes,
        position_ids: ir.Value,
        numbers: range,
        whole: Collection[int],
    ) -> None:
        self.g, self.sizes, self.numbers = g, sizes, numbers
        with g.scope("rotary"):
            positions = g.op("Squeeze", position_ids, g.ints(1))
            cos, sin = rotary_angles(g, positions, rotary_frequencies(sizes.head_dim, rotary))
            self.cos, self.sin = g.to_graph_dtype(cos), g.to_graph_dtype(sin)
        self.masks: dict[int, ir.Value] = {}
        with g.scope("mask"):

            def mask(layer: int, past_length: str) -> ir.Value:
                return causal_mask(g, position_ids, g.inputs[f"past_key.{layer}"], g.inputs[past_length])

            compacted = [i for i in numbers if i not in whole]
            if compacted:
                self.masks |= dict.fromkeys(compacted, mask(compacted[0], "past_length"))
            self.masks |= {i: mask(i, f"past_length.{i}") for i in sorted({*numbers} - {*compacted})}

    def layers(self, hidden: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Add the layers, whose keys (rotated) and values become the outputs new_key.i and new_value.i.

        hidden: [1, rows, hidden]. Returns [rows, hidden], and the last layer's values [1, kv_heads, rows, head_dim].
        """
        x = value = self.g.op("Squeeze", hidden, self.g.ints(0))
        for number in self.numbers:
            x, key, value = self._layer(number, x)
            self.g.output(f"new_key.{number}", key)
            self.g.output(f"new_value.{number}", value)
        return x, value

    def _layer(self, number: int, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        g, s, name = self.g, self.sizes, f"model.layers.{number}"
        with g.scope(f"layers.{number}"):
            normed = rms_norm(g, x, f"{name}.input_layernorm", s.hidden_size, s.rms_norm_epsilon)
            attended, key, value = self._attention(number, normed)
            x = g.op("Add", x, attended)
            normed = rms_norm(g, x, f"{name}.post_attention_layernorm", s.hidden_size, s.rms_norm_epsilon)
            with g.scope("mlp"):
                y = gated_mlp(g, normed, f"{name}.mlp", s.hidden_size, s.intermediate_size, bias=False)
            return g.op("Add", x, y), key, value

    def _attention(self, number: int, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        g, s, name = self.g, self.sizes, f"model.layers.{number}.self_attn"
        with g.scope("attention"):

            def project(projection: str, count: int) -> ir.Value:
                return linear(g, x, f"{name}.{projection}", count * s.head_dim, s.hidden_size, s.qkv_bias)

            def heads(y: ir.Value, count: int) -> ir.Value:
                return split_heads(g, y, g.ints(1), count, s.head_dim)

            if s.fused_qkv:  # by key-value head: its queries, its key, its value
                group = s.heads // s.kv_heads
                fused = g.reshape(project("qkv_proj", s.heads + 2 * s.kv_heads), -1, s.kv_heads, group + 2, s.head_dim)
                parts: Iterator[ir.Value] = iter(g.op_with_outputs(3, "Split", fused, g.ints(group, 1, 1), axis=2))
            else:
                counts = {"q_proj": s.heads, "k_proj": s.kv_heads, "v_proj": s.kv_heads}
                parts = (project(part, count) for part, count in counts.items())
            q = rotate(g, heads(next(parts), s.heads), self.cos, self.sin)
            key = rotate(g, heads(next(parts), s.kv_heads), self.cos, self.sin)
            value = heads(next(parts), s.kv_heads)
            past_key, past_value = (g.inputs[f"past_{kind}.{number}"] for kind in ("key", "value"))
            rows = attention(g, q, key, value, past_key, past_value, self.masks[number], s)
            return linear(g, rows, f"{name}.o_proj", s.hidden_size, s.heads * s.head_dim, bias=False), key, value
