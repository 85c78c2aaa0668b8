"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631): interleaved M-RoPE, DeepStack, a Qwen3 decoder.

**Checkpoints.** These are the dense models (2B, 4B, 8B, 32B) and models trained from them, such as Cosmos-Reason2.

**DeepStack** (Meng et al. 2024, arXiv 2406.04334). Features of three encoder layers are added to the pictures' rows
after the first three decoder layers. So k is at least 3.

**Selection.** Tokens are chosen as in Qwen2.5-VL. The default k is that of a Qwen2.5-VL with as many layers; nobody has
measured it for Qwen3-VL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from ivc_export.contract.manifest import DecoderSizes, RotarySizes
from ivc_export.contract.preprocessing import PatchPreprocessing, VideoPreprocessing
from ivc_export.contract.records import Count, Depth, Epsilon, Heads, Width
from ivc_export.families import patch_settings, qwen2_5_vl, qwen2_vl
from ivc_export.families.encoder import Encoder
from ivc_export.families.family import DefaultLayer, Family, Model, renamed
from ivc_export.families.patch_settings import Patches, read_pictures, read_videos
from ivc_export.families.patches import PatchPictures
from ivc_export.families.positions import mrope_positions
from ivc_export.families.qwen2_vl import (
    LAYER_NORM_EPSILON,
    SELECTION,
    TOKEN_TEXTS,
    VIDEO_TEXT,
    VisionSizes,
    Whole,
    add_attention,
    add_mlp,
    canonical_name,
    check_merged,
    check_sections,
    frequencies,
    patch_rows,
)
from ivc_export.families.settings import (
    CONFIG,
    VIDEO_PROCESSOR,
    Deviations,
    IntList,
    Means,
    Square,
    check_divides,
    inconsistent,
    refuse,
)
from ivc_export.families.text_models import (
    DecoderLayers,
    DecoderSettings,
    HeadSize,
    RopeSettings,
    Vocabulary,
    read_decoder,
)
from ivc_export.graph.activations import gelu, gelu_tanh
from ivc_export.graph.builder import INT32, Graph
from ivc_export.graph.decoder_block import DecoderBlock, SeparateProjections, self_attention_block
from ivc_export.graph.norms import layer_norm
from ivc_export.graph.rotary import rotary_angles


class MRope(RopeSettings):
    """Three-dimensional rotary positions, whose axes take frequencies in turn."""

    rope_type: Literal["default", "mrope"] | None = None
    type: Literal["default", "mrope"] | None = None
    mrope_interleaved: Literal[True] = True
    mrope_section: IntList = (24, 20, 20)


class Text(DecoderSettings):
    """Qwen3VLTextConfig of transformers."""

    default_theta: ClassVar[float] = 500000.0
    block: ClassVar[DecoderBlock] = self_attention_block(SeparateProjections(bias=False), head_norms=True)

    model_type: Literal["qwen3_vl_text"] = "qwen3_vl_text"
    vocab_size: Vocabulary = 151936
    hidden_size: Width = 4096
    intermediate_size: Width = 22016
    num_hidden_layers: DecoderLayers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = 32
    head_dim: HeadSize = 128
    max_position_embeddings: Count = 128000
    rms_norm_eps: Epsilon = 1e-6
    rope_parameters: MRope | None = None
    rope_scaling: MRope | None = None
    attention_bias: Literal[False] = False


class Vision(Patches):
    """Qwen3VLVisionConfig of transformers."""

    model_type: Literal["qwen3_vl", "qwen3_vl_vision"] = "qwen3_vl_vision"
    depth: Depth = 27
    hidden_size: Width = 1152
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    intermediate_size: Width = 4304
    num_heads: Heads = 16
    patch_size: Annotated[int, Field(gt=0, le=256), Square] = 16
    out_hidden_size: Width = 3584
    """Width of the mergers' output, which is the decoder's."""
    num_position_embeddings: Annotated[int, Field(gt=0, le=1 << 20)] = 2304
    deepstack_visual_indexes: IntList = (8, 16, 24)


class Sizes(VisionSizes):
    """Sizes of the vision encoder.

    side: of the square of learnt positions. deepstack: layers after which features are taken, in order.
    """

    side: int = Field(gt=0, le=1024)
    deepstack: tuple[int, ...]


PICTURES = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""The image processor's settings of the published checkpoints, for checkpoints without them."""


class Videos(patch_settings.Videos):
    """Qwen3VLVideoProcessor of transformers."""

    size: Any = {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}  # noqa: RUF012
    """Pixels of all resized frames together, fewest and most."""
    image_mean: Means = (0.5, 0.5, 0.5)
    image_std: Deviations = (0.5, 0.5, 0.5)


VIDEOS = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}
"""The video processor's settings of the published checkpoints, for checkpoints without them."""


def video(config: Mapping[str, Any], processor: Mapping[str, Any] | None, token: int) -> VideoPreprocessing:
    """How videos are prepared: frames from the first to the last share their pixels, and their times are written."""
    vision = Vision.read(config.get("vision_config"), part="vision_config")
    found = Videos.read(VIDEOS if processor is None else processor, VIDEO_PROCESSOR)
    return read_videos(vision, found, token, choice="ends", pixels_of="video", timestamps=True)


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Read config.json, and the processor's file."""
    whole = Whole.read(config)
    text = Text.read(config.get("text_config"), part="text_config")
    vision = Vision.read(config.get("vision_config"), part="vision_config")
    decoder = read_decoder(text, whole.tie_word_embeddings or text.tie_word_embeddings)
    decoder = DecoderSizes(**{**dict(decoder), "deepstack": len(vision.deepstack_visual_indexes)})
    sections = text.rope.mrope_section if isinstance(text.rope, MRope) else MRope().mrope_section
    check_sections(sections, decoder)
    if sections[0] < max(sections[1:]):
        refuse("mrope_section", list(sections), CONFIG, "time must have as many frequencies as the other axes")
    check_merged(("vision_config.out_hidden_size", vision.out_hidden_size), decoder)
    return Model(
        decoder=decoder,
        block=text.block,
        rotary=RotarySizes(theta=text.theta, sections=sections, interleaved=True),
        selection=SELECTION,
        encoder=read_encoder(vision, decoder, PICTURES if processor is None else processor),
        image_token=whole.image_token_id,
        vision_start_token=whole.vision_start_token_id,
        vision_end_token=whole.vision_end_token_id,
    )


def read_encoder(vision: Vision, decoder: DecoderSizes, processor: Mapping[str, Any]) -> DeepStackEncoder:
    """Read the vision encoder from its part of config.json.

    Raises:
        UserError: features are taken after layers that do not exist, or for more layers than the decoder has; or the
            number of learnt positions is not a square.
    """
    taken, positions = vision.deepstack_visual_indexes, vision.num_position_embeddings
    if not all(0 <= layer < vision.depth for layer in taken) or sorted({*taken}) != [*taken]:
        known = f"give layers from 0 to {vision.depth - 1}, in ascending order"
        refuse("vision_config.deepstack_visual_indexes", list(taken), CONFIG, known)
    if len(taken) >= decoder.layers:
        raise inconsistent(
            f"there are {len(taken)} vision_config.deepstack_visual_indexes, but the decoder has only {decoder.layers} "
            "layers, and the selection comes after those that take them"
        )
    side = math.isqrt(positions)
    if side**2 != positions:
        refuse("vision_config.num_position_embeddings", positions, CONFIG, "give a square number")
    sizes = Sizes(
        depth=vision.depth,
        embed_dim=vision.hidden_size,
        heads=vision.num_heads,
        mlp_size=vision.intermediate_size,
        side=side,
        deepstack=taken,
    )
    check_divides(("vision_config.hidden_size", sizes.embed_dim, 4 * sizes.heads))
    return DeepStackEncoder(read_pictures(vision, processor), sizes, vision.out_hidden_size)


@dataclass(frozen=True)
class DeepStackEncoder(Encoder):
    """The encoder. hidden_size: width of the mergers' output, which is the decoder's."""

    pictures: PatchPictures
    sizes: Sizes
    hidden_size: int

    def graph(self, g: Graph) -> ir.Value:
        """Encoder blocks with learnt and rotary positions, a merger after the last, and one after each that gives
        features.

        Source: Qwen3VLVisionModel in transformers.
        """
        sizes, p = self.sizes, self.pictures.preprocessing
        frames = g.extent(g.inputs["pixel_values"], 0)
        with g.scope("rotary"):
            cos, sin = rotary_angles(g, g.transpose(g.inputs["patch_position"], 1, 0), frequencies(sizes.head_dim))
        with g.scope("patch_embed"):
            x = patch_rows(g, p, sizes.embed_dim, bias=True)
        with g.scope("pos_embed"):
            framed = g.op("Reshape", x, g.op("Concat", frames, g.ints(-1, sizes.embed_dim), axis=0))
            x = g.reshape(g.op("Add", framed, learnt_positions(g, sizes)), -1, sizes.embed_dim)
        for i in range(sizes.depth):
            name = f"visual.blocks.{i}"
            with g.scope(f"blocks.{i}"):
                x = add_attention(g, sizes, name, x, frames, cos, sin)
                x = add_mlp(g, sizes, name, x, gelu_tanh, ("linear_fc1", "linear_fc2"))
            if i in sizes.deepstack:
                number = sizes.deepstack.index(i)
                with g.scope(f"deepstack.{number}"):
                    taken = self._merged(g, x, f"visual.deepstack_merger_list.{number}", frames, together=True)
                    g.output(f"deepstack.{number}", taken)
        with g.scope("merger"):
            return self._merged(g, x, "visual.merger", frames, together=False)

    def _merged(self, g: Graph, x: ir.Value, name: str, frames: ir.Value, together: bool) -> ir.Value:
        """Visual tokens [B, visual, hidden]. together: whether their patches are normed as one row, or separately."""
        width, side = self.sizes.embed_dim, self.pictures.preprocessing.merge_size
        merged = width * side**2
        if together:
            x = layer_norm(g, g.reshape(x, -1, merged), f"{name}.norm", merged, LAYER_NORM_EPSILON)
        else:
            x = g.reshape(layer_norm(g, x, f"{name}.norm", width, LAYER_NORM_EPSILON), -1, merged)
        x = gelu(g, g.linear(x, f"{name}.linear_fc1", merged, merged, bias=True))
        x = g.linear(x, f"{name}.linear_fc2", self.hidden_size, merged, bias=True)
        return g.op("Reshape", x, g.op("Concat", frames, g.ints(-1, self.hidden_size), axis=0))


def learnt_positions(g: Graph, sizes: Sizes) -> ir.Value:
    """Position embeddings of a frame's patches, interpolated from a square whose corners are the picture's.

    Returns [patches, embed_dim]. A place between two rows of the square is a fraction of integers, so its weights are
    exact to their last bit. Source: get_vision_interpolation_indices_and_weights in transformers.
    """
    position, side = g.inputs["patch_position"], sizes.side
    one, most = g.constant(1, INT32), g.constant(side - 1, INT32)
    last = g.op("Slice", position, g.ints(-1), g.ints(2**31 - 1), g.ints(0))  # the picture's, in merge-block order too
    span = g.op("Max", last, one)
    place = g.op("Mul", position, most)
    low = g.op("Div", place, span)
    high = g.op("Min", g.op("Add", low, one), most)
    share = g.op("Div", g.to_float32(g.op("Sub", place, g.op("Mul", low, span))), g.to_float32(span))
    rest = g.op("Sub", g.constant(1.0, ir.DataType.FLOAT), share)

    def column(of: ir.Value, number: int) -> ir.Value:
        return g.op("Gather", of, g.constant([number], INT32), axis=1)

    table = g.weight("visual.pos_embed.weight", (side**2, sizes.embed_dim))
    total: ir.Value | None = None
    for row, above in ((low, rest), (high, share)):
        for other, left in ((low, rest), (high, share)):
            index = g.op("Add", g.op("Mul", column(row, 0), g.constant(side, INT32)), column(other, 1))
            found = g.to_float32(g.op("Gather", table, g.op("Squeeze", index, g.ints(1)), axis=0))
            part = g.op("Mul", found, g.op("Mul", column(above, 0), column(left, 1)))
            total = part if total is None else g.op("Add", total, part)
    assert total is not None
    return g.to_graph_dtype(total)


def stored_name(name: str) -> str:
    """The name of a tensor in transformers 4.57, the first with this family, and later."""
    return renamed(name, (("model.", "model.language_model."), ("visual.", "model.visual.")))


def default_layer(sizes: DecoderSizes) -> DefaultLayer:
    """That of a Qwen2.5-VL with as many layers, or after the last layer with features of pictures; uncalibrated."""
    scaled = qwen2_5_vl.default_layer(sizes)
    return replace(scaled, layer=max(sizes.cuts[0], scaled.layer), calibrated=False)


def foreign(config: Mapping[str, Any]) -> str | None:
    """The sentence on a mixture of experts."""
    if config.get("model_type") == "qwen3_vl_moe":
        return (
            "config.json describes a Qwen3-VL with a mixture of experts (qwen3_vl_moe), but this version exports only "
            f"dense ones: give one of {', '.join(HUB)}"
        )
    return None


CHAT_TEMPLATE = qwen2_vl.CHAT_TEMPLATE.replace(qwen2_vl.OWN_SYSTEM, "")

HUB = {f"qwen3-vl-{size.lower()}": f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B", "32B")}

FAMILY = Family(
    model_type="qwen3_vl",
    preprocessing=PatchPreprocessing,
    pictures=PatchPictures.of,
    axes=3,
    tiles=False,
    read=read,
    canonical_name=canonical_name,
    stored_name=stored_name,
    default_layer=default_layer,
    positions=mrope_positions,
    chat_template=CHAT_TEMPLATE,
    token_texts=TOKEN_TEXTS,
    template_marks=True,
    video=video,
    video_text=VIDEO_TEXT,
    hub=HUB,
    foreign=foreign,
)
