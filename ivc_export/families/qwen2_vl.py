"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): native-resolution vision encoder, M-RoPE, Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from ivc_export.contract.manifest import DecoderSizes, RotarySizes, SelectionRule
from ivc_export.contract.preprocessing import PatchPreprocessing, VideoPreprocessing
from ivc_export.contract.records import Count, Depth, Epsilon, Frozen, Heads, TokenId, Width
from ivc_export.families.encoder import Encoder
from ivc_export.families.family import DefaultLayer, Family, Model, TokenTexts, renamed, scaled_layer
from ivc_export.families.patch_settings import VISION_THETA, Patches, Videos, read_pictures, read_videos
from ivc_export.families.patches import PatchPictures
from ivc_export.families.positions import mrope_positions
from ivc_export.families.settings import (
    VIDEO_PROCESSOR,
    IntList,
    Settings,
    check_divides,
    inconsistent,
)
from ivc_export.families.text_models import (
    DecoderLayers,
    RopeSettings,
    Vocabulary,
    WindowedText,
    WindowRows,
    read_decoder,
)
from ivc_export.graph.activations import gelu, quick_gelu
from ivc_export.graph.attention import encoder_attention, rotated_heads
from ivc_export.graph.builder import Graph
from ivc_export.graph.norms import layer_norm
from ivc_export.graph.rotary import rotary_angles

LAYER_NORM_EPSILON = 1e-6
SELECTION = SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=2)


class MRope(RopeSettings):
    """Three-dimensional rotary positions."""

    rope_type: Literal["default", "mrope"] | None = None
    type: Literal["default", "mrope"] | None = None
    mrope_section: IntList = (16, 24, 24)


class Text(WindowedText):
    """Qwen2VLTextConfig of transformers."""

    default_theta: ClassVar[float] = 1e6

    vocab_size: Vocabulary = 152064
    hidden_size: Width = 8192
    intermediate_size: Width = 29568
    num_hidden_layers: DecoderLayers = 80
    num_attention_heads: Heads = 64
    num_key_value_heads: Heads | None = 8
    max_position_embeddings: Count = 32768
    rms_norm_eps: Epsilon = 1e-5
    rope_parameters: MRope | None = None
    rope_scaling: MRope | None = None
    max_window_layers: WindowRows = 80


class Whole(Settings):
    """Qwen2VLConfig of transformers."""

    image_token_id: TokenId = 151655
    vision_start_token_id: TokenId = 151652
    vision_end_token_id: TokenId = 151653
    tie_word_embeddings: bool = False


class Vision(Patches):
    """Qwen2VLVisionConfig of transformers."""

    model_type: Literal["qwen2_vl", "qwen2_vl_vision"] = "qwen2_vl_vision"
    depth: Depth = 32
    embed_dim: Width = 1280
    hidden_size: Width = 3584
    """Width of the merger's output, which is the decoder's."""
    hidden_act: Literal["quick_gelu"] = "quick_gelu"
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4
    num_heads: Heads = 16


class VisionSizes(Frozen):
    """Sizes of the vision encoder."""

    depth: Depth
    embed_dim: Width
    heads: Heads
    mlp_size: Width

    @property
    def head_dim(self) -> int:
        """Values of one head."""
        return self.embed_dim // self.heads


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Read config.json (flat as transformers 4.4x writes it, or with text_config) and the processor's file."""
    vision = Vision.read(config.get("vision_config"), part="vision_config")
    sizes = VisionSizes(
        depth=vision.depth,
        embed_dim=vision.embed_dim,
        heads=vision.num_heads,
        mlp_size=int(vision.embed_dim * vision.mlp_ratio),
    )
    check_divides(("vision_config.embed_dim", sizes.embed_dim, 4 * sizes.heads))
    encoder = PatchEncoder(read_pictures(vision, processor), sizes, vision.hidden_size)
    return read_around(encoder, ("vision_config.hidden_size", vision.hidden_size), config)


def read_around(encoder: Encoder, merged: tuple[str, int], config: Mapping[str, Any]) -> Model:
    """Read everything but the vision encoder. merged: the key that has the merger's width, and its value."""
    whole, nested = Whole.read(config), config.get("text_config") is not None
    text = Text.read(config["text_config"], part="text_config") if nested else Text.read(config)
    tied = whole.tie_word_embeddings or text.tie_word_embeddings
    decoder = read_decoder(text, tied)
    sections = text.rope.mrope_section if isinstance(text.rope, MRope) else MRope().mrope_section
    check_sections(sections, decoder)
    if decoder.head_dim * decoder.heads != decoder.hidden_size:
        raise inconsistent(
            f"head_dim is {decoder.head_dim}, but {decoder.heads} heads share a hidden_size of {decoder.hidden_size}"
        )
    check_merged(merged, decoder)
    return Model(
        decoder=decoder,
        block=text.block,
        rotary=RotarySizes(theta=text.theta, sections=sections),
        selection=SELECTION,
        encoder=encoder,
        image_token=whole.image_token_id,
        vision_start_token=whole.vision_start_token_id,
        vision_end_token=whole.vision_end_token_id,
    )


def check_sections(sections: tuple[int, ...], decoder: DecoderSizes) -> None:
    """Check that each pair of a head's values belongs to one of three axes.

    Raises:
        UserError: the sections do not say so.
    """
    if len(sections) != 3 or min(sections) < 1 or 2 * sum(sections) != decoder.head_dim:
        raise inconsistent(
            f"mrope_section {list(sections)} must have three numbers whose sum is {decoder.head_dim // 2}"
        )


def check_merged(merged: tuple[str, int], decoder: DecoderSizes) -> None:
    """Check that visual tokens are as wide as the decoder. merged: the key that has their width, and its value.

    Raises:
        UserError: they are not.
    """
    if merged[1] != decoder.hidden_size:
        raise inconsistent(f"{merged[0]} is {merged[1]}, but the decoder's hidden_size is {decoder.hidden_size}")


def video(config: Mapping[str, Any], processor: Mapping[str, Any] | None, token: int) -> VideoPreprocessing:
    """How videos are prepared: frames in equal steps, each with so many pixels, and one position for each temporal
    patch."""
    vision = Vision.read(config.get("vision_config"), part="vision_config")
    return read_videos(vision, Videos.read(processor, VIDEO_PROCESSOR), token)


def canonical_name(name: str) -> str:
    """Names of transformers 4.4x (`model.*`, `visual.*`) stay. Those of 4.52 and later lose their prefixes."""
    return renamed(name, (("model.language_model.", "model."), ("model.visual.", "visual.")))


@dataclass(frozen=True)
class PatchEncoder(Encoder):
    """The encoder. hidden_size: width of the merger's output, which is the decoder's."""

    pictures: PatchPictures
    sizes: VisionSizes
    hidden_size: int

    def graph(self, g: Graph) -> ir.Value:
        """Encoder blocks with two-dimensional rotary positions, then the merger of 2 x 2 patches.

        Source: Qwen2VisionTransformerPretrainedModel in transformers.
        """
        sizes, p = self.sizes, self.pictures.preprocessing
        frames = g.extent(g.inputs["pixel_values"], 0)
        with g.scope("rotary"):
            cos, sin = rotary_angles(g, g.transpose(g.inputs["patch_position"], 1, 0), frequencies(sizes.head_dim))
        with g.scope("patch_embed"):
            x = patch_rows(g, p, sizes.embed_dim)
        for i in range(sizes.depth):
            with g.scope(f"blocks.{i}"):
                x = block(g, sizes, f"visual.blocks.{i}", x, frames, cos, sin)
        with g.scope("merger"):
            merged = sizes.embed_dim * p.merge_size**2
            x = layer_norm(g, x, "visual.merger.ln_q", sizes.embed_dim, LAYER_NORM_EPSILON)
            x = g.linear(g.reshape(x, -1, merged), "visual.merger.mlp.0", merged, merged, bias=True)
            x = g.linear(gelu(g, x), "visual.merger.mlp.2", self.hidden_size, merged, bias=True)
            return g.op("Reshape", x, g.op("Concat", frames, g.ints(-1, self.hidden_size), axis=0))


def frequencies(head_dim: int) -> npt.NDArray[np.float64]:
    """Rotary frequencies of the encoder, [2, head_dim / 2]: the first half of the pairs rotates with rows."""
    quarter = head_dim // 4
    table = VISION_THETA ** (-np.arange(quarter) / quarter)
    return np.stack([np.pad(table, (0, quarter)), np.pad(table, (quarter, 0))])


def patch_rows(g: Graph, p: PatchPreprocessing, width: int, bias: bool = False) -> ir.Value:
    """Embedded patches [B patches, width]: the convolution over one patch is a Gemm on the same bytes."""
    name = "visual.patch_embed.proj"
    stored = (width, 3, p.temporal_patch_size, p.patch_size, p.patch_size)
    kernel = g.weight(f"{name}.weight", (width, p.patch_dim), stored)
    added = [g.weight(f"{name}.bias", (width,))] if bias else []
    return g.op("Gemm", g.reshape(g.inputs["pixel_values"], -1, p.patch_dim), kernel, *added, transB=1)


def block(
    g: Graph, sizes: VisionSizes, name: str, x: ir.Value, frames: ir.Value, cos: ir.Value, sin: ir.Value
) -> ir.Value:
    """One encoder block. x: [B patches, embed_dim]; frames: B, int64 [1]."""
    x = add_attention(g, sizes, name, x, frames, cos, sin)
    return add_mlp(g, sizes, name, x, quick_gelu, ("fc1", "fc2"))


def add_attention(
    g: Graph, sizes: VisionSizes, name: str, x: ir.Value, frames: ir.Value, cos: ir.Value, sin: ir.Value
) -> ir.Value:
    """The first half of an encoder block. x: [B patches, embed_dim]; frames: B, int64 [1]."""
    width = sizes.embed_dim
    with g.scope("attention"):
        y = layer_norm(g, x, f"{name}.norm1", width, LAYER_NORM_EPSILON)
        qkv = g.linear(y, f"{name}.attn.qkv", 3 * width, width, bias=True)
        q, k, v = rotated_heads(g, qkv, frames, sizes.heads, sizes.head_dim, cos, sin)
        y = encoder_attention(g, q, k, v, sizes.heads, sizes.head_dim)
        return g.op("Add", x, g.linear(y, f"{name}.attn.proj", width, width, bias=True))


def add_mlp(
    g: Graph,
    sizes: VisionSizes,
    name: str,
    x: ir.Value,
    activation: Callable[[Graph, ir.Value], ir.Value],
    layers: tuple[str, str],
) -> ir.Value:
    """The second half of an encoder block. x: [B patches, embed_dim]; layers: names of its products."""
    width, (up, down) = sizes.embed_dim, layers
    with g.scope("mlp"):
        y = layer_norm(g, x, f"{name}.norm2", width, LAYER_NORM_EPSILON)
        y = activation(g, g.linear(y, f"{name}.mlp.{up}", sizes.mlp_size, width, bias=True))
        return g.op("Add", x, g.linear(y, f"{name}.mlp.{down}", width, sizes.mlp_size, bias=True))


def default_layer(sizes: DecoderSizes) -> DefaultLayer:
    """16 of 28, and in proportion: none is published for Qwen2-VL, so this is uncalibrated."""
    return scaled_layer(sizes, {}, 16, 28)


OWN_SYSTEM = """\
{%- if loop.first and message.role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
"""
"""What the template writes if a conversation begins without a system message."""

CHAT_TEMPLATE = (
    f"{{%- for message in messages -%}}\n{OWN_SYSTEM}"
    + """\
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
)

TOKEN_TEXTS = TokenTexts("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
VIDEO_TEXT = "<|video_pad|>"

FAMILY = Family(
    model_type="qwen2_vl",
    preprocessing=PatchPreprocessing,
    pictures=PatchPictures.of,
    axes=3,
    tiles=False,
    read=read,
    canonical_name=canonical_name,
    stored_name=str,
    default_layer=default_layer,
    positions=mrope_positions,
    chat_template=CHAT_TEMPLATE,
    token_texts=TOKEN_TEXTS,
    template_marks=True,
    video=video,
    video_text=VIDEO_TEXT,
    hub={"qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct"},
)
