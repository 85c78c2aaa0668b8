"""A family that no checkpoint has, of all that a decoder block may choose: `ivc_export.families` finds it in tests.

Queries and keys are normed by head, values are of another size, feed-forwards differ by layer, and pictures add to the
rows behind the first layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from ivc_export.contract.manifest import DecoderSizes, RotarySizes, SelectionRule
from ivc_export.contract.preprocessing import PatchPreprocessing
from ivc_export.families.encoder import Encoder
from ivc_export.families.family import Model
from ivc_export.families.patches import PatchPictures
from ivc_export.families.positions import counted_positions
from ivc_export.families.qwen2_vl import FAMILY as QWEN2_VL
from ivc_export.graph.activations import gelu
from ivc_export.graph.builder import Graph
from ivc_export.graph.decoder_block import DecoderBlock, Layer, SelfAttention, SeparateProjections, gated_feed_forward

DEEPSTACK, WIDE = 2, 80
HIDDEN = 64
PREPROCESSING = PatchPreprocessing(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=784,
    max_pixels=784 * 64,
    rescale_factor=1 / 255,
    mean=(0.48, 0.46, 0.41),
    std=(0.27, 0.26, 0.28),
)


def feed_forward(layer: Layer, x: ir.Value) -> ir.Value:
    """A gated one in even layers, a wider plain one in odd layers."""
    if layer.number % 2 == 0:
        return gated_feed_forward(layer, x)
    g, size, name = layer.g, layer.sizes.hidden_size, f"{layer.name}.mlp"
    y = gelu(g, g.linear(x, f"{name}.fc1", WIDE, size, bias=True))
    return g.linear(y, f"{name}.fc2", size, WIDE, bias=True)


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """config.json says the size of a head's values alone."""
    return Model(
        decoder=DecoderSizes(
            layers=5,
            hidden_size=HIDDEN,
            intermediate_size=48,
            heads=4,
            kv_heads=2,
            head_dim=16,
            value_dim=config["value_dim"],
            vocab_size=512,
            rms_norm_epsilon=1e-6,
            tied_embeddings=False,
            max_positions=4096,
            deepstack=DEEPSTACK,
        ),
        block=DecoderBlock(SelfAttention(SeparateProjections(bias=False), head_norms=True), feed_forward),
        rotary=RotarySizes(theta=1e4, sections=(8,)),
        selection=SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=1),
        encoder=Products(PatchPictures(PREPROCESSING)),
        image_token=503,
        vision_start_token=500,
        vision_end_token=501,
    )


@dataclass(frozen=True)
class Products(Encoder):
    """A product for what stands in the prompt, and one for each layer that pictures add to."""

    pictures: PatchPictures

    def graph(self, g: Graph) -> ir.Value:
        """Of all values of a visual token's patches."""
        p = self.pictures.preprocessing
        width = p.merge_size**2 * p.patch_dim
        rows = g.reshape(g.inputs["pixel_values"], -1, width)
        frames = g.extent(g.inputs["pixel_values"], 0)
        shape = g.op("Concat", frames, g.ints(-1, HIDDEN), axis=0)

        def tokens(name: str) -> ir.Value:
            return g.op("Reshape", g.linear(rows, f"visual.{name}", HIDDEN, width, bias=True), shape)

        for i in range(DEEPSTACK):
            g.output(f"deepstack.{i}", tokens(f"deepstack.{i}"))
        return tokens("merger")


FAMILY = replace(QWEN2_VL, model_type="layered", axes=1, read=read, positions=counted_positions, hub={})
