"""InternVL 2.5 and 3 (Chen et al. 2024, arXiv 2412.05271): InternViT over tiles and a thumbnail, pixel shuffle, an LLM.

In transformers' layout (checkpoints named -hf), with a Qwen2 or Llama decoder.

A picture is cut into tiles of the closest aspect ratio, each of 256 visual tokens, with a thumbnail of the whole behind
them. Tokens are chosen in the thumbnail, as many as its share of the budget, and each chooses the tiles' tokens in its
place; implicit visual coordinates are chosen in every tile. Where that makes less than the budget, the thumbnail's
other tokens follow by score. The official code ends there, and keeps less than its ratio of many tiles; here the tiles'
other tokens follow by score, so that the budget is always met. The default `--max-visual` of 1,280 allows four tiles;
3,328 allows twelve, as the checkpoints' own processors do. Scores come from the values that layer k-1 caches, as in the
other families; the official code projects that layer's input anew, without its norm.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    TILES_ASPECT_LIMIT,
    DefaultLayer,
    Family,
    Grid,
    Model,
    Picture,
    check_bicubic,
    check_divides,
    check_shape,
    counted_positions,
    read_decoder,
    read_rotary,
    renamed,
    required,
    scaled_layer,
    scaled_pixels,
)
from ivc_export.layers import (
    EncoderBlock,
    gelu,
    layer_norm,
    linear,
    pixel_patches,
    with_class_token,
    without_class_token,
)

SHUFFLE = 2  # patches along a side of a visual token
PROJECTOR_EPSILON = 1e-5


class VisionSizes(contract.Frozen):
    """Sizes of the vision encoder; `image` and `patch` are sides in pixels."""

    layers: int = Field(gt=0)
    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_size: int = Field(gt=0)
    image: int = Field(gt=0)
    patch: int = Field(gt=0)
    epsilon: float = Field(gt=0)
    qkv_bias: bool
    fused_qkv: bool


def check_plain(facts: Mapping[str, tuple[Any, Any]]) -> None:
    """Check that each named value of config.json is the one that is supported: name to (found, supported).

    Raises:
        UserError: one is not.
    """
    for what, (found, supported) in facts.items():
        if found != supported:
            raise UserError(f"{what} {found!r} of config.json is not supported: this version exports {supported!r}")


def side(value: Any) -> int:
    """A side's length, from one number or two equal ones."""
    sides = {*value} if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise UserError(f"config.json gives sides of {value} pixels, and only squares are supported")
    return int(sides.pop())


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Digest config.json of transformers' layout, and the processor's file."""
    text, vision = required(config, "text_config"), required(config, "vision_config")
    check_plain(
        {
            "downsample_ratio": (config.get("downsample_ratio", 0.5), 1 / SHUFFLE),
            "vision_feature_layer": (config.get("vision_feature_layer", -1), -1),
            "vision_feature_select_strategy": (config.get("vision_feature_select_strategy", "default"), "default"),
            "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), "gelu"),
            "vision_config.hidden_act": (vision.get("hidden_act", "gelu"), "gelu"),
            "vision_config.norm_type": (vision.get("norm_type", "layer_norm"), "layer_norm"),
            "vision_config.use_qk_norm": (vision.get("use_qk_norm", False), False),
            "vision_config.use_mean_pooling": (vision.get("use_mean_pooling", True), True),
        }
    )
    kind = text.get("model_type", "qwen2")
    if kind not in ("qwen2", "llama"):
        raise UserError(f"text_config.model_type {kind!r} of config.json is not supported: only qwen2 and llama")
    tied = bool(config.get("tie_word_embeddings", True))  # transformers' default; a stored head counts before it
    decoder = read_decoder(text, tied, qkv_bias=kind == "qwen2" or bool(text.get("attention_bias")))
    sizes = VisionSizes(
        layers=vision.get("num_hidden_layers", 24),
        width=vision.get("hidden_size", 1024),
        heads=vision.get("num_attention_heads", 16),
        mlp_size=vision.get("intermediate_size", 4096),
        image=side(vision.get("image_size", 448)),
        patch=side(vision.get("patch_size", 14)),
        epsilon=vision.get("layer_norm_eps", 1e-6),
        qkv_bias=vision.get("attention_bias", False),
        fused_qkv=False,
    )
    settings = processor or {}  # its crop_to_patches does not count: InternVLProcessor always cuts into tiles
    tiles = (settings.get("min_patches") or 1, settings.get("max_patches") or 12)
    return make_model(decoder, text, sizes, settings, tiles, config.get("image_token_id", 151667))


def make_model(
    decoder: contract.DecoderSizes,
    text: Mapping[str, Any],
    sizes: VisionSizes,
    processor: Mapping[str, Any],
    tiles: tuple[int, int],
    image_token: int,
) -> Model:
    """What both layouts have in common. tiles: fewest and most."""
    check_divides(
        ("vision_config.hidden_size", sizes.width, sizes.heads),
        ("vision_config.image_size", sizes.image, SHUFFLE * sizes.patch),
    )
    check_bicubic(processor)
    return Model(
        decoder=decoder,
        rotary=read_rotary(text, decoder.head_dim),
        selection=contract.SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=2, softmax="all", tiles=True),
        preprocessing=contract.TilePreprocessing(
            tile_pixels=sizes.image,
            tile_side=sizes.image // sizes.patch // SHUFFLE,
            min_tiles=tiles[0],
            max_tiles=tiles[1],
            fit="stretch",
            rescale_factor=processor.get("rescale_factor", 1 / 255),
            mean=processor.get("image_mean") or (0.485, 0.456, 0.406),
            std=processor.get("image_std") or (0.229, 0.224, 0.225),
        ),
        image_token=image_token,
        vision_start_token=image_token - 2,
        vision_end_token=image_token - 1,
        vision=sizes,
    )


PREFIXES = (  # ours, transformers 4.52's
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
    ("visual.", "vision_tower."),
    ("projector.", "multi_modal_projector."),
)
LATER_PREFIXES = (  # of transformers 5
    ("model.language_model.", "model."),
    ("model.vision_tower.", "visual."),
    ("model.multi_modal_projector.", "projector."),
)


def canonical_name(name: str) -> str:
    """Names of transformers 4.52, or of later versions, to ours."""
    return renamed(name, [*((stored, own) for own, stored in PREFIXES), *LATER_PREFIXES])


def stored_name(name: str) -> str:
    """Our names to those of transformers 4.52."""
    return renamed(name, PREFIXES)


def vision(g: Graph, model: Model) -> ir.Value:
    """InternViT over tiles, without the class token, then pixel shuffle (2 x 2 patches a token) and the projector.

    Source: InternVLVisionModel and InternVLModel.pixel_shuffle in transformers.
    """
    sizes: VisionSizes = model.vision
    width, patches, tokens = sizes.width, sizes.image // sizes.patch, sizes.image // sizes.patch // SHUFFLE
    frames = g.extent(g.inputs["pixel_values"], 0)
    split = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    block = EncoderBlock(
        width=width,
        heads=sizes.heads,
        mlp_size=sizes.mlp_size,
        epsilon=sizes.epsilon,
        activation=gelu,
        norms=("layernorm_before", "layernorm_after"),
        qkv=("attention.qkv",) if sizes.fused_qkv else split,
        out="attention.projection_layer",
        scales=("lambda_1", "lambda_2"),
        qkv_bias=sizes.qkv_bias,
    )
    with g.scope("embeddings"):
        name, kernel = "visual.embeddings.patch_embeddings.projection", (width, 3, sizes.patch, sizes.patch)
        weight = g.weight(f"{name}.weight", (width, 3 * sizes.patch**2), kernel)
        cut = pixel_patches(g, g.inputs["pixel_values"], sizes.image, sizes.patch)
        x = g.op("Gemm", cut, weight, g.weight(f"{name}.bias", (width,)), transB=1)
        token = g.weight("visual.embeddings.cls_token", (1, 1, width))
        positions = g.weight("visual.embeddings.position_embeddings", (1, patches**2 + 1, width))
        x = with_class_token(g, x, frames, token, positions, width)
    for i in range(sizes.layers):
        with g.scope(f"layers.{i}"):
            x = block.add(g, f"visual.encoder.layer.{i}", x, frames)
    with g.scope("projector"):
        hidden, merged = model.decoder.hidden_size, SHUFFLE**2 * width
        x = g.reshape(without_class_token(g, x, frames, width), -1, tokens, SHUFFLE, tokens, SHUFFLE * width)
        x = g.reshape(g.transpose(x, 0, 1, 3, 2, 4), -1, merged)
        x = layer_norm(g, x, "projector.layer_norm", merged, PROJECTOR_EPSILON)
        x = gelu(g, linear(g, x, "projector.linear_1", hidden, merged, bias=True))
        x = linear(g, x, "projector.linear_2", hidden, hidden, bias=True)
        return g.reshape(x, -1, tokens**2, hidden)


def default_layer(sizes: contract.DecoderSizes) -> DefaultLayer:
    """16 of 32 for InternVL2.5-8B, as the official evaluation; others in proportion."""
    return scaled_layer(sizes, {32: 16}, 16, 32)


def tiling(width: int, height: int, p: contract.TilePreprocessing) -> tuple[int, int]:
    """Columns and rows of tiles: the closest aspect ratio; of equals the most tiles that are not twice the picture.

    Source: get_optimal_tiled_canvas of GotOcr2ImageProcessor in transformers; dynamic_preprocess in the original code.
    """
    most = range(1, p.max_tiles + 1)
    shapes = [(c, r) for c in most for r in most if p.min_tiles <= c * r <= p.max_tiles]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        difference = abs(width / height - columns / rows)
        larger = width * height > 0.5 * p.tile_pixels**2 * columns * rows
        if difference < least or (difference == least and larger):
            best, least = (columns, rows), difference
    return best


def picture(image: PIL.Image.Image, p: contract.Preprocessing) -> Picture:
    """Stretch a picture to its tiles, and to the thumbnail if there are several, and normalise.

    Source: GotOcr2ImageProcessor in transformers, as InternVLProcessor calls it.
    """
    assert isinstance(p, contract.TilePreprocessing)
    check_shape(*image.size, TILES_ASPECT_LIMIT)
    pixels, tile = p.tile_pixels, p.tile_side
    columns, rows = tiling(*image.size, p)
    canvas = scaled_pixels(image, columns * pixels, rows * pixels, p)
    tiles = canvas.reshape(rows, pixels, columns, pixels, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, pixels, pixels)
    if len(tiles) > 1:
        thumbnail = scaled_pixels(image, pixels, pixels, p).transpose(2, 0, 1)
        tiles = np.concatenate([tiles, thumbnail[None]])
    return Picture({"pixel_values": np.ascontiguousarray(tiles)}, Grid(rows * tile, columns * tile, tile))


def stock_inputs(picture: Picture, p: contract.Preprocessing) -> dict[str, npt.NDArray[Any]]:
    """The same tiles."""
    return {"pixel_values": picture.inputs["pixel_values"]}


CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<IMG_CONTEXT>
{% else -%}
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

FAMILY = Family(
    model_type="internvl",
    read=read,
    canonical_name=canonical_name,
    stored_name=stored_name,
    vision=vision,
    default_layer=default_layer,
    picture=picture,
    positions=counted_positions,
    stock_inputs=stock_inputs,
    chat_template=CHAT_TEMPLATE,
    template_marks=False,
    hub={
        "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
        "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
        "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
    },
    tiny_tokens={
        500: "<|endoftext|>",
        501: "<img>",
        502: "</img>",
        503: "<IMG_CONTEXT>",
        504: "<|im_start|>",
        505: "<|im_end|>",
    },
    tiny={
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": 503,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 4096,
            "bos_token_id": 500,
            "eos_token_id": 505,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_bias": True,
            "image_size": [112, 112],
            "patch_size": [14, 14],
            "norm_type": "layer_norm",
            "use_qk_norm": False,
            "use_mean_pooling": True,
        },
    },
)
