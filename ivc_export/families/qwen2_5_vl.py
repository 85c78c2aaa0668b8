"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): Qwen2-VL with windowed attention in most encoder blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import onnx_ir as ir
from pydantic import Field

from ivc_export.contract.manifest import DecoderSizes
from ivc_export.contract.preprocessing import PatchPreprocessing, VideoPreprocessing
from ivc_export.contract.records import Depth, Frozen, Heads, SideLength, Width
from ivc_export.families.encoder import Encoder
from ivc_export.families.family import DefaultLayer, Family, Model, scaled_layer
from ivc_export.families.patch_settings import Patches, Videos, read_pictures, read_videos
from ivc_export.families.patches import PatchPictures
from ivc_export.families.positions import mrope_positions
from ivc_export.families.qwen2_vl import (
    CHAT_TEMPLATE,
    TOKEN_TEXTS,
    VIDEO_TEXT,
    canonical_name,
    frequencies,
    patch_rows,
    read_around,
)
from ivc_export.families.settings import VIDEO_PROCESSOR, IntList, check_divides, inconsistent
from ivc_export.graph.activations import gelu
from ivc_export.graph.attention import encoder_attention, rotated_heads, window_attention
from ivc_export.graph.builder import INT32, Graph
from ivc_export.graph.linear import gated_mlp
from ivc_export.graph.norms import rms_norm
from ivc_export.graph.rotary import rotary_angles

RMS_NORM_EPSILON = 1e-6


class Vision(Patches):
    """Qwen2_5_VLVisionConfig of transformers."""

    model_type: Literal["qwen2_5_vl", "qwen2_5_vl_vision"] = "qwen2_5_vl_vision"
    depth: Depth = 32
    hidden_size: Width = 3584
    hidden_act: Literal["silu"] = "silu"
    intermediate_size: Width = 3420
    num_heads: Heads = 16
    window_size: SideLength = 112
    out_hidden_size: Width = 3584
    """Width of the merger's output, which is the decoder's."""
    fullatt_block_indexes: IntList = (7, 15, 23, 31)
    tokens_per_second: Annotated[float, Field(gt=0, le=1e6)] = 4
    """Positions of time for each second of a video."""


class VisionSizes(Frozen):
    """Sizes of the vision encoder; `window` is a window's side in patches."""

    depth: Depth
    embed_dim: Width
    heads: Heads
    mlp_size: Width
    window: int = Field(gt=0, le=1024)
    full_blocks: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Values of one head."""
        return self.embed_dim // self.heads


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Read config.json (flat as transformers 4.4x writes it, or with text_config) and the processor's file."""
    vision = Vision.read(config.get("vision_config"), part="vision_config")
    merge = vision.spatial_merge_size
    if vision.window_size < vision.patch_size * merge:
        raise inconsistent(
            f"vision_config.window_size is {vision.window_size}, but a visual token has {vision.patch_size * merge} "
            "pixels along a side"
        )
    sizes = VisionSizes(
        depth=vision.depth,
        embed_dim=vision.hidden_size,
        heads=vision.num_heads,
        mlp_size=vision.intermediate_size,
        window=vision.window_size // (vision.patch_size * merge) * merge,
        full_blocks=vision.fullatt_block_indexes,
    )
    check_divides(("vision_config.hidden_size", sizes.embed_dim, 4 * sizes.heads))
    encoder = WindowEncoder(read_pictures(vision, processor), sizes, vision.out_hidden_size)
    return read_around(encoder, ("vision_config.out_hidden_size", vision.out_hidden_size), config)


def video(config: Mapping[str, Any], processor: Mapping[str, Any] | None, token: int) -> VideoPreprocessing:
    """How videos are prepared: as in Qwen2-VL, but positions of frames follow their time."""
    vision = Vision.read(config.get("vision_config"), part="vision_config")
    found = Videos.read(processor, VIDEO_PROCESSOR)
    return read_videos(vision, found, token, positions_per_second=float(vision.tokens_per_second))


@dataclass(frozen=True)
class Windows:
    """The layout of patches for windowed attention.

    Patches are sorted by window, and cut into blocks of as many patches as a full window has. A window's patches are
    neighbours, so they are in one block or in two neighbouring blocks. A block's queries then need only the keys of
    their own block and of its neighbours. So memory grows with the picture, not with its square, and every shape
    follows from the number of patches.

    order: int32 [places], the patch at each place; (blocks + 2) block places, with a block of padding before and
    behind. slot: int32 [patches], each patch's place behind the padding. window_of_place: int32 [places], the number of
    each place's window, -1 for padding. block: places of a block. cos, sin: float32 [places, head_dim / 2].
    """

    order: ir.Value
    slot: ir.Value
    window_of_place: ir.Value
    block: int
    cos: ir.Value
    sin: ir.Value


def windows(g: Graph, sizes: VisionSizes, cos: ir.Value, sin: ir.Value) -> Windows:
    """Lay patches out by window. Windows are aligned to the picture's top left, and cut off at its other sides."""
    position, size, side = g.inputs["patch_position"], sizes.window**2, g.constant([sizes.window], INT32)
    zero, one, block = g.constant(0, INT32), g.constant(1, INT32), g.constant([size], INT32)

    def counting(length: ir.Value) -> ir.Value:
        return g.op("Range", zero, g.op("Squeeze", length, g.ints(0)), one)

    def column(of: ir.Value, number: int) -> ir.Value:
        return g.op("Gather", of, g.constant(number, INT32), axis=1)

    # slot of patch (r, c) in window (i, j) of a picture of h x w: the windows above and those to the left come before,
    # then the rows above within the window. The picture's last patch, in merge-block order too, is (h - 1, w - 1).
    last = g.op("Slice", position, g.ints(-1), g.ints(2**31 - 1), g.ints(0))
    extent = g.op("Add", last, one)
    window = g.op("Div", position, side)
    origin = g.op("Mul", window, side)
    within = g.op("Sub", position, origin)
    spans = g.op("Min", g.op("Sub", extent, origin), side)  # height and width of the patch's window
    above = g.op("Mul", column(origin, 0), column(extent, 1))
    left = g.op("Mul", column(origin, 1), column(spans, 0))
    inside = g.op("Add", g.op("Mul", column(within, 0), column(spans, 1)), column(within, 1))
    slot = g.op("Add", g.op("Add", above, left), inside)
    # a number for each window: a row has fewer windows than patches
    patches = g.cast(g.extent(position, 0), INT32)
    number = g.op("Add", g.op("Mul", column(window, 0), patches), column(window, 1))

    blocks = g.op("Div", g.op("Add", patches, g.constant([size - 1], INT32)), block)
    places = g.op("Mul", g.op("Add", blocks, g.constant([2], INT32)), block)
    length = g.cast(places, ir.DataType.INT64)
    place = g.op("Add", slot, block)
    order = g.op("ScatterElements", g.op("Expand", zero, length), place, counting(patches), axis=0)
    number = g.op("ScatterElements", g.op("Expand", g.constant(-1, INT32), length), place, number, axis=0)
    cos, sin = (g.op("Gather", table, order, axis=0) for table in (cos, sin))
    return Windows(order, slot, number, size, cos, sin)


@dataclass(frozen=True)
class WindowEncoder(Encoder):
    """The encoder. hidden_size: width of the merger's output, which is the decoder's."""

    pictures: PatchPictures
    sizes: VisionSizes
    hidden_size: int

    def graph(self, g: Graph) -> ir.Value:
        """Encoder blocks with two-dimensional rotary positions, most of them windowed, then the merger of patches.

        Patches keep their order. Attention gives the same in any order, so nothing has to be sorted back at the end.
        Source: Qwen2_5_VisionTransformerPretrainedModel in transformers.
        """
        sizes, p = self.sizes, self.pictures.preprocessing
        frames = g.extent(g.inputs["pixel_values"], 0)
        with g.scope("rotary"):
            cos, sin = rotary_angles(g, g.transpose(g.inputs["patch_position"], 1, 0), frequencies(sizes.head_dim))
        with g.scope("windows"):
            layout = windows(g, sizes, cos, sin)
        with g.scope("patch_embed"):
            x = patch_rows(g, p, sizes.embed_dim)
        for i in range(sizes.depth):
            name = f"visual.blocks.{i}"
            with g.scope(f"blocks.{i}"):
                with g.scope("attention"):
                    y = rms_norm(g, x, f"{name}.norm1", sizes.embed_dim, RMS_NORM_EPSILON)
                    qkv = g.linear(y, f"{name}.attn.qkv", 3 * sizes.embed_dim, sizes.embed_dim, bias=True)
                    if i in sizes.full_blocks:
                        heads = rotated_heads(g, qkv, frames, sizes.heads, sizes.head_dim, cos, sin)
                        y = encoder_attention(g, *heads, sizes.heads, sizes.head_dim)
                    else:
                        y = windowed_attention(g, sizes, qkv, frames, layout)
                    y = g.linear(y, f"{name}.attn.proj", sizes.embed_dim, sizes.embed_dim, bias=True)
                    x = g.op("Add", x, y)
                with g.scope("mlp"):
                    y = rms_norm(g, x, f"{name}.norm2", sizes.embed_dim, RMS_NORM_EPSILON)
                    y = gated_mlp(g, y, f"{name}.mlp", sizes.embed_dim, sizes.mlp_size, bias=True)
                    x = g.op("Add", x, y)
        with g.scope("merger"):
            merged = sizes.embed_dim * p.merge_size**2
            x = rms_norm(g, x, "visual.merger.ln_q", sizes.embed_dim, RMS_NORM_EPSILON)
            x = g.linear(g.reshape(x, -1, merged), "visual.merger.mlp.0", merged, merged, bias=True)
            x = g.linear(gelu(g, x), "visual.merger.mlp.2", self.hidden_size, merged, bias=True)
            return g.op("Reshape", x, g.op("Concat", frames, g.ints(-1, self.hidden_size), axis=0))


def windowed_attention(g: Graph, sizes: VisionSizes, qkv: ir.Value, frames: ir.Value, layout: Windows) -> ir.Value:
    """Attention of every patch to those of its window. qkv: [B patches, 3 embed_dim]; returns [.., embed_dim]."""
    width = sizes.embed_dim
    framed = g.op("Reshape", qkv, g.op("Concat", frames, g.ints(-1, 3 * width), axis=0))
    placed = g.reshape(g.op("Gather", framed, layout.order, axis=1), -1, 3 * width)
    q, k, v = rotated_heads(g, placed, frames, sizes.heads, sizes.head_dim, layout.cos, layout.sin)
    rows = window_attention(g, q, k, v, layout.window_of_place, sizes.heads, sizes.head_dim, layout.block)
    return g.reshape(g.op("Gather", rows, layout.slot, axis=1), -1, width)


def default_layer(sizes: DecoderSizes) -> DefaultLayer:
    """22 of 36 for 3B and 16 of 28 for 7B, as the official evaluation; others in proportion."""
    return scaled_layer(sizes, {36: 22, 28: 16}, 16, 28)


FAMILY = Family(
    model_type="qwen2_5_vl",
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
    hub={"qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct"},
)
