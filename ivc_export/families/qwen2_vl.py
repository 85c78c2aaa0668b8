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
from ivc_export.families import DefaultLayer, Family, Grid, Model, Picture, required
from ivc_export.layers import attend, gelu, layer_norm, linear, quick_gelu, rotary_angles, rotate

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
    text = config.get("text_config") or config
    vision = required(config, "vision_config")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise UserError(f"rope type {rope_type!r} of config.json is not supported: this version exports plain M-RoPE")
    if text.get("use_sliding_window") and text.get("max_window_layers", 0) < required(text, "num_hidden_layers"):
        raise UserError(
            "config.json asks for sliding-window attention, which is not supported: set use_sliding_window to false"
        )
    hidden, heads = required(text, "hidden_size"), required(text, "num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    sizes = VisionSizes(
        depth=required(vision, "depth"),
        embed_dim=required(vision, "embed_dim"),
        heads=required(vision, "num_heads"),
        mlp_size=int(required(vision, "embed_dim") * vision.get("mlp_ratio", 4)),
    )
    sections = tuple(rope.get("mrope_section", (16, 24, 24)))
    for what, whole, part in (
        ("hidden_size", hidden, 2 * heads),
        ("num_attention_heads", heads, kv_heads),
        ("vision_config.embed_dim", sizes.embed_dim, 4 * sizes.heads),
    ):
        if whole % part:
            raise UserError(f"config.json is inconsistent: {what} is {whole}, which {part} does not divide")
    if len(sections) != 3 or 2 * sum(sections) != hidden // heads:
        raise UserError(
            f"config.json is inconsistent: mrope_section {list(sections)} does not fill {hidden // heads // 2}"
        )
    return Model(
        decoder=contract.DecoderSizes(
            layers=required(text, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=required(text, "intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=hidden // heads,
            vocab_size=required(text, "vocab_size"),
            rms_norm_epsilon=text.get("rms_norm_eps", 1e-6),
            qkv_bias=True,
            tied_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            max_positions=text.get("max_position_embeddings", 32768),
        ),
        rotary=contract.RotarySizes(theta=rope.get("rope_theta", text.get("rope_theta", 1e6)), sections=sections),
        selection=contract.SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=2),
        preprocessing=read_preprocessing(vision, processor or {}),
        image_token=config.get("image_token_id", 151655),
        vision_start_token=config.get("vision_start_token_id", 151652),
        vision_end_token=config.get("vision_end_token_id", 151653),
        vision=sizes,
    )


def read_preprocessing(vision: Mapping[str, Any], processor: Mapping[str, Any]) -> contract.Preprocessing:
    """The image processor's settings; where its file is silent, Qwen2-VL's own."""
    size = processor.get("size") or {}
    if processor.get("resample", PIL.Image.Resampling.BICUBIC) != PIL.Image.Resampling.BICUBIC:
        raise UserError("the image processor's resample is not bicubic (3), which is all that this version knows")
    return contract.Preprocessing(
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
    for stored, canonical in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(stored):
            return canonical + name.removeprefix(stored)
    return name


def vision(g: Graph, model: Model) -> ir.Value:
    """Encoder blocks with two-dimensional rotary positions, then the merger of 2 x 2 patches.

    Source: Qwen2VisionTransformerPretrainedModel in transformers.
    """
    sizes: VisionSizes = model.vision
    merge = model.preprocessing.merge_size
    patch_dim = model.preprocessing.patch_dim
    stored = (sizes.embed_dim, 3, model.preprocessing.temporal_patch_size, *[model.preprocessing.patch_size] * 2)
    frames = g.extent(g.inputs["pixel_values"], 0)
    with g.scope("rotary"):
        quarter = sizes.head_dim // 4
        frequencies = VISION_THETA ** (-np.arange(quarter) / quarter)
        table = np.stack([np.pad(frequencies, (0, quarter)), np.pad(frequencies, (quarter, 0))])
        cos, sin = rotary_angles(g, g.transpose(g.inputs["patch_position"], 1, 0), table)
    with g.scope("patch_embed"):
        patches = g.reshape(g.inputs["pixel_values"], -1, patch_dim)
        kernel = g.weight("visual.patch_embed.proj.weight", (sizes.embed_dim, patch_dim), stored)
        x = g.op("Gemm", patches, kernel, transB=1)
        head_shape = g.op("Concat", frames, g.ints(-1, sizes.heads, sizes.head_dim), axis=0)
    for i in range(sizes.depth):
        with g.scope(f"blocks.{i}"):
            x = block(g, sizes, f"visual.blocks.{i}", x, cos, sin, head_shape)
    with g.scope("merger"):
        merged = sizes.embed_dim * merge**2
        x = layer_norm(g, x, "visual.merger.ln_q", sizes.embed_dim, LAYER_NORM_EPSILON)
        x = linear(g, g.reshape(x, -1, merged), "visual.merger.mlp.0", merged, merged, bias=True)
        x = linear(g, gelu(g, x), "visual.merger.mlp.2", model.decoder.hidden_size, merged, bias=True)
        return g.op("Reshape", x, g.op("Concat", frames, g.ints(-1, model.decoder.hidden_size), axis=0))


def block(
    g: Graph, sizes: VisionSizes, name: str, x: ir.Value, cos: ir.Value, sin: ir.Value, head_shape: ir.Value
) -> ir.Value:
    """One encoder block. x: [B patches, embed_dim]; head_shape: int64 [4], (B, -1, heads, head_dim)."""
    width = sizes.embed_dim

    def heads(part: ir.Value) -> ir.Value:
        return g.transpose(g.op("Reshape", part, head_shape), 0, 2, 1, 3)

    def turned(part: ir.Value) -> ir.Value:
        return g.to_graph_dtype(rotate(g, g.to_float32(heads(part)), cos, sin))

    with g.scope("attention"):
        y = layer_norm(g, x, f"{name}.norm1", width, LAYER_NORM_EPSILON)
        qkv = linear(g, y, f"{name}.attn.qkv", 3 * width, width, bias=True)
        q, k, v = g.op_with_outputs(3, "Split", qkv, axis=-1)
        y = g.transpose(attend(g, turned(q), turned(k), heads(v), sizes.head_dim), 0, 2, 1, 3)
        x = g.op("Add", x, linear(g, g.reshape(y, -1, width), f"{name}.attn.proj", width, width, bias=True))
    with g.scope("mlp"):
        y = layer_norm(g, x, f"{name}.norm2", width, LAYER_NORM_EPSILON)
        y = quick_gelu(g, linear(g, y, f"{name}.mlp.fc1", sizes.mlp_size, width, bias=True))
        return g.op("Add", x, linear(g, y, f"{name}.mlp.fc2", width, sizes.mlp_size, bias=True))


def default_layer(sizes: contract.DecoderSizes) -> DefaultLayer:
    """16 of 28, and in proportion: none is published for Qwen2-VL, so this is uncalibrated."""
    return DefaultLayer(min(sizes.layers - 1, max(1, round(sizes.layers * 16 / 28))), calibrated=False)


def resized(height: int, width: int, p: contract.Preprocessing) -> tuple[int, int]:
    """The size that a picture is scaled to: multiples of patch x merge, within min_pixels and max_pixels.

    Source: smart_resize of Qwen2VLImageProcessor in transformers.
    """
    if max(height, width) > ASPECT_LIMIT * min(height, width):
        raise UserError(
            f"a picture of {width} x {height} is too elongated: crop it to an aspect ratio below {ASPECT_LIMIT}"
        )
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
    height, width = resized(image.height, image.width, p)
    bicubic = PIL.Image.Resampling.BICUBIC  # rows first, whatever Pillow prefers: 13 chooses the order by the shape
    scaled = image.convert("RGB").resize((width, image.height), bicubic).resize((width, height), bicubic)
    mean, std = np.array(p.mean, np.float32), np.array(p.std, np.float32)
    pixels = (np.asarray(scaled, np.float32) * np.float32(p.rescale_factor) - mean) / std
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
            start += max(segment)
        else:
            parts.append(np.broadcast_to(np.arange(start, start + segment), (3, segment)))
            start += segment
    return np.concatenate(parts, axis=1).astype(np.int32), start


FAMILY = Family(
    model_type="qwen2_vl",
    read=read,
    canonical_name=canonical_name,
    vision=vision,
    default_layer=default_layer,
    picture=picture,
    positions=positions,
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
