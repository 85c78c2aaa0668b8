"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): native-resolution vision encoder, M-RoPE, Qwen2 decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import PIL.Image
from pydantic import Field

from ivc_export import contract
from ivc_export.builder import Graph
from ivc_export.errors import UserError
from ivc_export.families import (
    DefaultLayer,
    Family,
    Grid,
    Model,
    Picture,
    check_bicubic,
    check_divides,
    check_shape,
    read_decoder,
    renamed,
    required,
    scaled_layer,
    scaled_pixels,
)
from ivc_export.layers import attend, gelu, layer_norm, linear, quick_gelu, rotary_angles, rotated_heads

VISION_THETA = 10000.0
LAYER_NORM_EPSILON = 1e-6
ASPECT_LIMIT = 200  # as the official image processor


class VisionSizes(contract.Frozen):
    """Sizes of the vision encoder."""

    depth: int = Field(gt=0)
    embed_dim: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_size: int = Field(gt=0)

    @property
    def head_dim(self) -> int:
        """Values of one head."""
        return self.embed_dim // self.heads


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Digest config.json (flat as transformers 4.4x writes it, or with text_config) and the processor's file."""
    vision = required(config, "vision_config")
    sizes = VisionSizes(
        depth=required(vision, "depth"),
        embed_dim=required(vision, "embed_dim"),
        heads=required(vision, "num_heads"),
        mlp_size=int(required(vision, "embed_dim") * vision.get("mlp_ratio", 4)),
    )
    check_divides(("vision_config.embed_dim", sizes.embed_dim, 4 * sizes.heads))
    return read_around(sizes, config, processor)


def read_around(sizes: Any, config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Digest all but the vision encoder's `sizes`."""
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise UserError(f"rope type {rope_type!r} of config.json is not supported: this version exports plain M-RoPE")
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    decoder = read_decoder(text, tied, qkv_bias=True)
    sections = tuple(rope.get("mrope_section", (16, 24, 24)))
    if len(sections) != 3 or 2 * sum(sections) != decoder.head_dim:
        raise UserError(
            f"config.json is inconsistent: mrope_section {list(sections)} does not fill {decoder.head_dim // 2}"
        )
    return Model(
        decoder=decoder,
        rotary=contract.RotarySizes(theta=rope.get("rope_theta", text.get("rope_theta", 1e6)), sections=sections),
        selection=contract.SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=2),
        preprocessing=read_preprocessing(required(config, "vision_config"), processor or {}),
        image_token=config.get("image_token_id", 151655),
        vision_start_token=config.get("vision_start_token_id", 151652),
        vision_end_token=config.get("vision_end_token_id", 151653),
        vision=sizes,
    )


def read_preprocessing(vision: Mapping[str, Any], processor: Mapping[str, Any]) -> contract.PatchPreprocessing:
    """The image processor's settings; where its file is silent, Qwen2-VL's own."""
    size = processor.get("size") or {}
    check_bicubic(processor)
    return contract.PatchPreprocessing(
        patch_size=vision.get("patch_size", 14),
        merge_size=vision.get("spatial_merge_size", 2),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        min_pixels=processor.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
        max_pixels=processor.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
        rescale_factor=processor.get("rescale_factor", 1 / 255),
        mean=processor.get("image_mean") or (0.48145466, 0.4578275, 0.40821073),
        std=processor.get("image_std") or (0.26862954, 0.26130258, 0.27577711),
    )


def canonical_name(name: str) -> str:
    """Names of transformers 4.4x (`model.*`, `visual.*`) stay; those of 4.52 and later lose their prefixes."""
    return renamed(name, (("model.language_model.", "model."), ("model.visual.", "visual.")))


def vision(g: Graph, model: Model) -> ir.Value:
    """Encoder blocks with two-dimensional rotary positions, then the merger of 2 x 2 patches.

    Source: Qwen2VisionTransformerPretrainedModel in transformers.
    """
    sizes: VisionSizes = model.vision
    p = model.preprocessing
    assert isinstance(p, contract.PatchPreprocessing)
    frames = g.extent(g.inputs["pixel_values"], 0)
    with g.scope("rotary"):
        cos, sin = rotary_angles(g, g.transpose(g.inputs["patch_position"], 1, 0), frequencies(sizes.head_dim))
    with g.scope("patch_embed"):
        x = patch_rows(g, p, sizes.embed_dim)
        head_shape = g.op("Concat", frames, g.ints(-1, sizes.heads, sizes.head_dim), axis=0)
    for i in range(sizes.depth):
        with g.scope(f"blocks.{i}"):
            x = block(g, sizes, f"visual.blocks.{i}", x, cos, sin, head_shape)
    with g.scope("merger"):
        merged = sizes.embed_dim * p.merge_size**2
        x = layer_norm(g, x, "visual.merger.ln_q", sizes.embed_dim, LAYER_NORM_EPSILON)
        x = linear(g, g.reshape(x, -1, merged), "visual.merger.mlp.0", merged, merged, bias=True)
        x = linear(g, gelu(g, x), "visual.merger.mlp.2", model.decoder.hidden_size, merged, bias=True)
        return g.op("Reshape", x, g.op("Concat", frames, g.ints(-1, model.decoder.hidden_size), axis=0))


def frequencies(head_dim: int) -> npt.NDArray[np.float64]:
    """Rotary frequencies of the encoder, [2, head_dim / 2]: the first half of the pairs turns with rows."""
    quarter = head_dim // 4
    table = VISION_THETA ** (-np.arange(quarter) / quarter)
    return np.stack([np.pad(table, (0, quarter)), np.pad(table, (quarter, 0))])


def patch_rows(g: Graph, p: contract.PatchPreprocessing, width: int) -> ir.Value:
    """Embedded patches [B patches, width]: the convolution over one patch is a Gemm on the same bytes."""
    kernel = g.weight(
        "visual.patch_embed.proj.weight",
        (width, p.patch_dim),
        (width, 3, p.temporal_patch_size, p.patch_size, p.patch_size),
    )
    return g.op("Gemm", g.reshape(g.inputs["pixel_values"], -1, p.patch_dim), kernel, transB=1)


def block(
    g: Graph, sizes: VisionSizes, name: str, x: ir.Value, cos: ir.Value, sin: ir.Value, head_shape: ir.Value
) -> ir.Value:
    """One encoder block. x: [B patches, embed_dim]; head_shape: int64 [4], (B, -1, heads, head_dim)."""
    width = sizes.embed_dim
    with g.scope("attention"):
        y = layer_norm(g, x, f"{name}.norm1", width, LAYER_NORM_EPSILON)
        qkv = linear(g, y, f"{name}.attn.qkv", 3 * width, width, bias=True)
        y = g.transpose(attend(g, *rotated_heads(g, qkv, head_shape, cos, sin), sizes.head_dim), 0, 2, 1, 3)
        x = g.op("Add", x, linear(g, g.reshape(y, -1, width), f"{name}.attn.proj", width, width, bias=True))
    with g.scope("mlp"):
        y = layer_norm(g, x, f"{name}.norm2", width, LAYER_NORM_EPSILON)
        y = quick_gelu(g, linear(g, y, f"{name}.mlp.fc1", sizes.mlp_size, width, bias=True))
        return g.op("Add", x, linear(g, y, f"{name}.mlp.fc2", width, sizes.mlp_size, bias=True))


def default_layer(sizes: contract.DecoderSizes) -> DefaultLayer:
    """16 of 28, and in proportion: none is published for Qwen2-VL, so this is uncalibrated."""
    return scaled_layer(sizes, {}, 16, 28)


def resized(height: int, width: int, p: contract.PatchPreprocessing) -> tuple[int, int]:
    """The size that a picture is scaled to: multiples of patch x merge, within min_pixels and max_pixels.

    Source: smart_resize of Qwen2VLImageProcessor in transformers.
    """
    check_shape(width, height, ASPECT_LIMIT)
    unit = p.token_side
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > p.max_pixels:
        scale = math.sqrt(height * width / p.max_pixels)
        rows, columns = (max(1, math.floor(side / scale / unit)) for side in (height, width))
    elif rows * columns * unit**2 < p.min_pixels:
        scale = math.sqrt(p.min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / unit) for side in (height, width))
    return rows * unit, columns * unit


def picture(image: PIL.Image.Image, p: contract.Preprocessing) -> Picture:
    """Scale, normalise and cut a picture into patches, merge blocks of patches row-major.

    Source: Qwen2VLImageProcessor in transformers; a still picture repeats over the temporal patch.
    """
    assert isinstance(p, contract.PatchPreprocessing)
    height, width = resized(image.height, image.width, p)
    pixels = scaled_pixels(image, width, height, p)
    rows, columns = height // p.patch_size, width // p.patch_size
    blocks = (rows // p.merge_size, p.merge_size, columns // p.merge_size, p.merge_size)
    # [row block, row, y, column block, column, x, channel] -> [row block, column block, row, column, channel, y, x]
    patches = pixels.reshape(*blocks[:2], p.patch_size, *blocks[2:], p.patch_size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    patches = patches.reshape(rows * columns, 3, 1, -1).repeat(p.temporal_patch_size, axis=2)
    position = np.mgrid[:rows, :columns].reshape(2, *blocks).transpose(1, 3, 2, 4, 0)
    inputs = {
        "pixel_values": patches.reshape(1, rows * columns, -1),
        "patch_position": position.reshape(-1, 2).astype(np.int32),
    }
    return Picture(inputs, Grid(blocks[0], blocks[2]))


def positions(segments: Sequence[int | Grid], start: int) -> tuple[npt.NDArray[np.int32], int]:
    """M-RoPE positions: text turns all axes alike, a picture stays at one time and spreads over rows and columns.

    Source: arXiv 2409.12191, section 2.1; get_rope_index in transformers.
    """
    parts = []
    for segment in segments:
        if isinstance(segment, Grid):
            rows, columns = np.mgrid[: segment.rows, : segment.columns].reshape(2, -1)
            parts.append(start + np.stack([np.zeros_like(rows), rows, columns]))
            start += max(segment.rows, segment.columns)
        else:
            parts.append(np.broadcast_to(np.arange(start, start + segment), (3, segment)))
            start += segment
    return np.concatenate(parts, axis=1).astype(np.int32), start


def stock_inputs(picture: Picture, p: contract.Preprocessing) -> dict[str, npt.NDArray[Any]]:
    """Patches, and the grid of patches (time, rows, columns)."""
    assert isinstance(p, contract.PatchPreprocessing)
    grid = np.array([(1, p.merge_size * picture.grid.rows, p.merge_size * picture.grid.columns)])
    return {"pixel_values": picture.inputs["pixel_values"][0], "image_grid_thw": grid}


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
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

TINY_TOKENS = {
    500: "<|vision_start|>",
    501: "<|vision_end|>",
    502: "<|vision_pad|>",
    503: "<|image_pad|>",
    504: "<|video_pad|>",
    505: "<|endoftext|>",
    506: "<|im_start|>",
    507: "<|im_end|>",
}

FAMILY = Family(
    model_type="qwen2_vl",
    read=read,
    canonical_name=canonical_name,
    stored_name=str,
    vision=vision,
    default_layer=default_layer,
    picture=picture,
    positions=positions,
    stock_inputs=stock_inputs,
    chat_template=CHAT_TEMPLATE,
    template_marks=True,
    hub={"qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct"},
    tiny_tokens=TINY_TOKENS,
    tiny={
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 505,
        "eos_token_id": 507,
        "use_sliding_window": False,
        "image_token_id": 503,
        "video_token_id": 504,
        "vision_start_token_id": 500,
        "vision_end_token_id": 501,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
)
