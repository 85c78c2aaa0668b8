"""InternVL 2.5, 3 and 3.5 (arXiv 2412.05271, 2508.18265): InternViT over tiles and a thumbnail, pixel shuffle, an LLM.

**Checkpoints.** These are the checkpoints in transformers' layout (named -hf or -HF), with a Qwen2, Qwen3 or Llama
decoder. The mixtures of experts of InternVL 3.5 are refused.

**Pictures.** A picture is cut into tiles of the closest aspect ratio, each of 256 visual tokens. A thumbnail of the
whole picture follows them. The default `--max-visual` of 1,280 allows four tiles; 3,328 allows twelve, as the
checkpoints' own processors do.

**Selection.** Tokens are chosen in the thumbnail, as many as its share of the budget. Each of them chooses the tiles'
tokens that show the same place. Implicit visual coordinates are chosen in every tile. If that is less than the budget,
the thumbnail's other tokens follow by score. The official code ends there, and keeps less than its ratio if there are
many tiles. Here the tiles' other tokens follow by score, so the budget is always met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import PIL.Image
from pydantic import Field

from ivc_export.contract.manifest import DecoderSizes, RotarySizes, SelectionRule
from ivc_export.contract.preprocessing import FixedPreprocessing, Preprocessing
from ivc_export.contract.records import Depth, Epsilon, Frozen, Heads, SideLength, Tiles, TokenId, Width
from ivc_export.errors import UserError
from ivc_export.families.encoder import Encoder, Preparation, of_kind
from ivc_export.families.family import DefaultLayer, Family, Model, TokenTexts, renamed, scaled_layer
from ivc_export.families.pictures import (
    TILES_ASPECT_LIMIT,
    Grid,
    NormalisedInputs,
    Visual,
    check_shape,
    scaled_levels,
    tile_levels,
)
from ivc_export.families.positions import counted_positions
from ivc_export.families.settings import (
    CONFIG,
    PROCESSOR,
    Backendless,
    PictureSettings,
    Settings,
    Square,
    check_divides,
    check_edges,
    refuse,
)
from ivc_export.families.text_models import DecoderSettings, LlamaText, Qwen2Text, Qwen3Text, read_decoder
from ivc_export.graph.activations import gelu
from ivc_export.graph.builder import Graph
from ivc_export.graph.norms import layer_norm
from ivc_export.graph.vit import EncoderBlock, pixel_patches, with_class_token, without_class_token

SHUFFLE = 2  # patches along a side of a visual token
Half = Annotated[float, Field(ge=1 / SHUFFLE, le=1 / SHUFFLE)]
PROJECTOR_EPSILON = 1e-5


class Whole(Settings):
    """InternVLConfig of transformers."""

    image_token_id: TokenId = 151667
    downsample_ratio: Half = 1 / SHUFFLE
    projector_hidden_act: Literal["gelu"] = "gelu"
    vision_feature_layer: Literal[-1] = -1
    vision_feature_select_strategy: Literal["default"] = "default"
    tie_word_embeddings: bool = True
    """A stored head takes precedence."""


class Vision(Settings):
    """InternVLVisionConfig of transformers."""

    model_type: Literal["internvl_vision"] = "internvl_vision"
    hidden_size: Width = 1024
    num_hidden_layers: Depth = 24
    num_attention_heads: Heads = 16
    attention_bias: bool = False
    use_qk_norm: Literal[False] = False
    intermediate_size: Width = 4096
    hidden_act: Literal["gelu"] = "gelu"
    norm_type: Literal["layer_norm"] = "layer_norm"
    layer_norm_eps: Epsilon = 1e-6
    image_size: Annotated[SideLength, Square] = 448
    patch_size: Annotated[SideLength, Square] = 14
    num_channels: Literal[3] = 3
    use_absolute_position_embeddings: Literal[True] = True
    use_mean_pooling: Literal[True] = True
    """If it is false, there is a norm after the last layer."""


class Pictures(PictureSettings):
    """GotOcr2ImageProcessor of transformers. A null size is the encoder's.

    Its crop_to_patches is ignored: InternVLProcessor always cuts into tiles.
    """

    image_processor_type: Annotated[Literal["GotOcr2ImageProcessor"], Backendless] = "GotOcr2ImageProcessor"
    size: Any = None
    min_patches: Tiles = 1
    max_patches: Tiles = 12


TEXTS: Mapping[str, type[DecoderSettings]] = {"qwen2": Qwen2Text, "qwen3": Qwen3Text, "llama": LlamaText}


class VisionSizes(Frozen):
    """Sizes of the vision encoder; `image` and `patch` are sides in pixels."""

    layers: Depth
    width: Width
    heads: Heads
    mlp_size: Width
    image: SideLength
    patch: SideLength
    epsilon: Epsilon
    qkv_bias: bool
    fused_qkv: bool


def decoder_settings(content: Any, part: str, kinds: Mapping[str, type[DecoderSettings]]) -> DecoderSettings:
    """Read the decoder's settings by its model_type; the first of `kinds` if there is none.

    Raises:
        UserError: it is of another kind, or a value is not supported.
    """
    kind = next(iter(kinds))
    if isinstance(content, Mapping):
        kind = content.get("model_type") or kind
    if not isinstance(kind, str) or kind not in kinds:
        refuse(f"{part}.model_type", kind, CONFIG, f"this version supports {', '.join(map(repr, kinds))}")
    return kinds[kind].read(content, part=part)


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Digest config.json of transformers' layout, and the processor's file."""
    whole, text = Whole.read(config), decoder_settings(config.get("text_config"), "text_config", TEXTS)
    vision = Vision.read(config.get("vision_config"), part="vision_config")
    pictures = Pictures.read(processor, PROCESSOR)
    sizes = VisionSizes(
        layers=vision.num_hidden_layers,
        width=vision.hidden_size,
        heads=vision.num_attention_heads,
        mlp_size=vision.intermediate_size,
        image=vision.image_size,
        patch=vision.patch_size,
        epsilon=vision.layer_norm_eps,
        qkv_bias=vision.attention_bias,
        fused_qkv=False,
    )
    edges = {"height": sizes.image, "width": sizes.image}
    check_edges("size", pictures.size, edges, "a tile has the size of the encoder's input")
    decoder = read_decoder(text, whole.tie_word_embeddings)
    tiles = (pictures.min_patches, pictures.max_patches)
    return make_model(decoder, text, sizes, pictures, tiles, whole.image_token_id)


def make_model(
    decoder: DecoderSizes,
    text: DecoderSettings,
    sizes: VisionSizes,
    pictures: PictureSettings,
    tiles: tuple[int, int],
    image_token: int | None,
) -> Model:
    """The parts that both layouts have in common. tiles: fewest and most."""
    check_divides(
        ("vision_config.hidden_size", sizes.width, sizes.heads),
        ("vision_config.image_size", sizes.image, SHUFFLE * sizes.patch),
    )
    if tiles[0] > tiles[1]:
        raise UserError(
            f"the settings of tiles are inconsistent (a picture has at least {tiles[0]}, and at most {tiles[1]}): give "
            "the checkpoint's own files"
        )
    preprocessing = FixedPreprocessing(
        tile_pixels=sizes.image,
        tile_side=sizes.image // sizes.patch // SHUFFLE,
        min_tiles=tiles[0],
        max_tiles=tiles[1],
        fit="stretch",
        **pictures.scaling,
    )
    return Model(
        decoder=decoder,
        block=text.block,
        rotary=RotarySizes(theta=text.theta, sections=(decoder.head_dim // 2,)),
        selection=SelectionRule(
            ivc_fraction=0.1, seed_divisor=100, query_offset=2, softmax="all", tiles=True, scored=text.scored
        ),
        encoder=TileEncoder(TilePictures(preprocessing), sizes, decoder.hidden_size),
        image_token=image_token,
        vision_start_token=None,
        vision_end_token=None,
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


@dataclass(frozen=True)
class TileEncoder(Encoder):
    """hidden_size: of what the projector gives, which is the decoder's."""

    pictures: TilePictures
    sizes: VisionSizes
    hidden_size: int

    def graph(self, g: Graph) -> ir.Value:
        """InternViT over tiles, without the class token, then pixel shuffle (2 x 2 patches a token) and the projector.

        Source: InternVLVisionModel and InternVLModel.pixel_shuffle in transformers.
        """
        sizes = self.sizes
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
            hidden, merged = self.hidden_size, SHUFFLE**2 * width
            x = g.reshape(without_class_token(g, x, frames, width), -1, tokens, SHUFFLE, tokens, SHUFFLE * width)
            x = g.reshape(g.transpose(x, 0, 1, 3, 2, 4), -1, merged)
            x = layer_norm(g, x, "projector.layer_norm", merged, PROJECTOR_EPSILON)
            x = gelu(g, g.linear(x, "projector.linear_1", hidden, merged, bias=True))
            x = g.linear(x, "projector.linear_2", hidden, hidden, bias=True)
            return g.reshape(x, -1, tokens**2, hidden)


def default_layer(sizes: DecoderSizes) -> DefaultLayer:
    """16 of 32 for InternVL2.5-8B, as the official evaluation; others in proportion."""
    return scaled_layer(sizes, {32: 16}, 16, 32)


def tiling(width: int, height: int, p: FixedPreprocessing) -> tuple[int, int]:
    """Columns and rows of tiles: the closest aspect ratio. Of equal ones, the most tiles below twice the picture.

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


@dataclass(frozen=True)
class TilePictures(Preparation):
    """Pictures in tiles of the encoder's size, and a thumbnail of the whole picture if there are several tiles."""

    preprocessing: FixedPreprocessing

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> TilePictures:
        """Make it from these settings.

        Raises:
            UserError: they are of another kind.
        """
        return cls(of_kind(FixedPreprocessing, preprocessing))

    def picture(self, image: PIL.Image.Image, token_id: int) -> Visual:
        """Stretch a picture to its tiles, and to the thumbnail if there are several, and normalise.

        Source: GotOcr2ImageProcessor in transformers, as InternVLProcessor calls it.
        """
        p = self.preprocessing
        check_shape(*image.size, TILES_ASPECT_LIMIT)
        pixels, tile = p.tile_pixels, p.tile_side
        columns, rows = tiling(*image.size, p)
        canvas = scaled_levels(image, columns * pixels, rows * pixels, p)
        tiles = canvas.reshape(rows, pixels, columns, pixels, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, pixels, pixels)
        if len(tiles) > 1:
            thumbnail = scaled_levels(image, pixels, pixels, p).transpose(2, 0, 1)
            tiles = np.concatenate([tiles, thumbnail[None]])
        inputs = NormalisedInputs(tile_levels(tiles, p))
        return Visual(inputs, Grid(rows * tile, columns * tile, tile), token_id)

    def stock_inputs(self, visual: Visual) -> dict[str, npt.NDArray[Any]]:
        """The same tiles."""
        return {"pixel_values": visual.inputs["pixel_values"]}


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


def without_thoughts(template: str, text: Any) -> str:
    """A family's own template for a decoder. With Qwen3, the thoughts of earlier answers are left out.

    text: the decoder's part of config.json.
    """
    if not isinstance(text, Mapping) or text.get("model_type") != "qwen3":
        return template
    for said in ("message.content", "part.text"):
        kept = f"{said}.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' else {said}"
        template = template.replace(f"{{{{ {said} }}}}", f"{{{{ {kept} }}}}")
    return template


FAMILY = Family(
    model_type="internvl",
    preprocessing=FixedPreprocessing,
    pictures=TilePictures.of,
    axes=1,
    tiles=True,
    read=read,
    canonical_name=canonical_name,
    stored_name=stored_name,
    default_layer=default_layer,
    positions=counted_positions,
    chat_template=CHAT_TEMPLATE,
    chat_template_of=lambda config: without_thoughts(CHAT_TEMPLATE, config.get("text_config")),
    picture_mark="<image>",
    token_texts=TokenTexts("<IMG_CONTEXT>", "<img>", "</img>"),
    template_marks=False,
    hub={
        "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
        "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
        "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
        "internvl3.5-1b": "OpenGVLab/InternVL3_5-1B-HF",
        "internvl3.5-2b": "OpenGVLab/InternVL3_5-2B-HF",
        "internvl3.5-4b": "OpenGVLab/InternVL3_5-4B-HF",
        "internvl3.5-8b": "OpenGVLab/InternVL3_5-8B-HF",
        "internvl3.5-14b": "OpenGVLab/InternVL3_5-14B-HF",
    },
)
