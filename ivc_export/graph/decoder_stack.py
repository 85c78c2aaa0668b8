"""The language decoder's layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from ivc_export.contract.manifest import DecoderSizes, RotarySizes
from ivc_export.graph.attention import causal_mask
from ivc_export.graph.builder import Graph
from ivc_export.graph.decoder_block import Attended, DecoderBlock, Layer, Scoring, cached_values
from ivc_export.graph.rotary import rotary_angles, rotary_frequencies


class DecoderStack:
    """The decoder layers `numbers`, which share rotary angles and masks.

    position_ids: int32 [axes, 1, rows]. All caches have the same length, except those of layers in `whole`.
    """

    def __init__(
        self,
        g: Graph,
        block: DecoderBlock,
        sizes: DecoderSizes,
        rotary: RotarySizes,
        position_ids: ir.Value,
        numbers: range,
        whole: Collection[int],
    ) -> None:
        self.g, self.block, self.sizes, self.numbers = g, block, sizes, numbers
        with g.scope("rotary"):
            positions = g.op("Squeeze", position_ids, g.ints(1))
            self.cos, self.sin = rotary_angles(g, positions, rotary_frequencies(rotary))
        self.masks: dict[int, ir.Value] = {}
        with g.scope("mask"):

            def mask(layer: int, past_length: str) -> ir.Value:
                return causal_mask(g, position_ids, g.inputs[f"past_key.{layer}"], g.inputs[past_length])

            compacted = [i for i in numbers if i not in whole]
            if compacted:
                self.masks |= dict.fromkeys(compacted, mask(compacted[0], "past_length"))
            self.masks |= {i: mask(i, f"past_length.{i}") for i in sorted({*numbers} - {*compacted})}

    def layers(
        self, hidden: ir.Value, added: Mapping[int, ir.Value] | None = None, scoring: Scoring = cached_values
    ) -> tuple[ir.Value, ir.Value]:
        """Add the layers. Their keys (rotated) and values become the outputs new_key.i and new_value.i.

        hidden: [1, rows, hidden]. added: rows [rows, hidden] to add, by the layer after which they are added. Returns
        the rows, [rows, hidden], and the result of `scoring` for the last layer, [1, kv_heads, rows, D].
        """
        x = scored = self.g.op("Squeeze", hidden, self.g.ints(0))
        for number in self.numbers:
            layer, entering = self._layer(number), x
            attended = self._add(layer, entering)
            x = attended.added
            if added and number in added:
                x = self.g.op("Add", x, added[number])
            if number == self.numbers[-1]:
                with self.g.scope("scored"):
                    scored = scoring(layer, entering, attended)
            self.g.output(f"new_key.{number}", attended.key)
            self.g.output(f"new_value.{number}", attended.value)
        return x, scored

    def _layer(self, number: int) -> Layer:
        """What a layer rests on."""
        past_key, past_value = (self.g.inputs[f"past_{kind}.{number}"] for kind in ("key", "value"))
        return Layer(self.g, self.sizes, number, self.cos, self.sin, self.masks[number], past_key, past_value)

    def _add(self, layer: Layer, x: ir.Value) -> Attended:
        """One layer; what it adds is added."""
        g, sizes, block = self.g, self.sizes, self.block
        with g.scope(f"layers.{layer.number}"):
            normed = block.norm(g, sizes, x, f"{layer.name}.input_layernorm")
            with g.scope("attention"):
                attended = block.attention(layer, normed)
            x = g.op("Add", x, attended.added)
            normed = block.norm(g, sizes, x, f"{layer.name}.post_attention_layernorm")
            with g.scope("mlp"):
                y = block.feed_forward(layer, normed)
            return attended._replace(added=g.op("Add", x, y))


def spread_rows(g: Graph, rows: ir.Value, index: ir.Value, position_ids: ir.Value) -> ir.Value:
    """Rows [1, L, hidden] at the places `index` int32 [L] among a run's rows, all others zero; returns [S, hidden].

    position_ids: [axes, 1, S], which gives S.
    """
    return g.call("SpreadRows", rows, index, position_ids)
