"""LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744): CLIP ViT-L/336, a two-layer projector, and a Llama decoder.

The square in the middle of a picture gives 576 visual tokens, whatever the picture's size. The official code keeps a
union: the best tokens by score (20%), by mean cosine and by mean sine (5% each). That is 26 to 29% of the tokens. Here
the same score fills the budget, so the official number of tokens gives the official set. The default ratio of 0.3 is
the sum of the three fractions. The cache of layer 0 stays whole, as in the official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy.typing as npt
import onnx_ir as ir
import PIL.Image
from pydantic import AliasChoices, Field

from ivc_export.contract.manifest import DecoderSizes, RotarySizes, SelectionRule
from ivc_export.contract.preprocessing import FixedPreprocessing, Preprocessing
from ivc_export.contract.records import Depth, Epsilon, Frozen, Heads, SideLength, TokenId, Width
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
from ivc_export.families.text_models import LlamaText, read_decoder
from ivc_export.graph.activations import gelu, quick_gelu
from ivc_export.graph.builder import Graph
from ivc_export.graph.norms import layer_norm
from ivc_export.graph.vit import EncoderBlock, pixel_patches, with_class_token, without_class_token

VISION = {  # if config.json says nothing about the encoder
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class Whole(Settings):
    """LlavaConfig of transformers."""

    image_token_index: TokenId = Field(
        default=32000, validation_alias=AliasChoices("image_token_index", "image_token_id")
    )
    projector_hidden_act: Literal["gelu"] = "gelu"
    vision_feature_select_strategy: Literal["default"] = "default"
    vision_feature_layer: int = -2
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False


class Vision(Settings):
    """CLIPVisionConfig of transformers."""

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 12
    num_channels: Literal[3] = 3
    image_size: Annotated[SideLength, Square] = 224
    patch_size: Annotated[SideLength, Square] = 32
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5


class Pictures(PictureSettings):
    """CLIPImageProcessor of transformers. Null sizes are the encoder's."""

    image_processor_type: Annotated[Literal["CLIPImageProcessor", "LlavaImageProcessor"], Backendless] = (
        "CLIPImageProcessor"
    )
    size: Any = None
    default_to_square: bool = False
    do_center_crop: Literal[True] = True
    crop_size: Any = None
    do_pad: Literal[False] = False
    use_square_size: Literal[False] = False


class VisionSizes(Frozen):
    """Sizes of the vision encoder; `layers` of them are run, up to the feature layer."""

    layers: Depth
    width: Width
    heads: Heads
    mlp_size: Width
    image: SideLength
    patch: SideLength
    epsilon: Epsilon
    activation: str
    projector_bias: bool


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Digest config.json and the processor's file."""
    whole, text = Whole.read(config), LlamaText.read(config.get("text_config"), part="text_config")
    decoder = read_decoder(text, whole.tie_word_embeddings or text.tie_word_embeddings)
    vision = read_vision(whole, config.get("vision_config"))
    return Model(
        decoder=decoder,
        block=text.block,
        rotary=RotarySizes(theta=text.theta, sections=(decoder.head_dim // 2,)),
        selection=SelectionRule(ivc_fraction=0.05, seed_divisor=100, query_offset=2, softmax="all", whole_layers=(0,)),
        encoder=ClipEncoder(read_pictures(vision, processor), vision, decoder.hidden_size),
        image_token=whole.image_token_index,
        vision_start_token=None,
        vision_end_token=None,
    )


def foreign(config: Mapping[str, Any]) -> str | None:
    """Recognise the original code's config.json: it names a vision encoder where transformers' file has its sizes."""
    if not config.get("mm_vision_tower"):
        return None
    return (
        "config.json is in the layout of the original LLaVA code (it names mm_vision_tower), but this version reads "
        f"transformers' layout: give a checkpoint such as {next(iter(FAMILY.hub.values()))}, or one that "
        "transformers' LlavaForConditionalGeneration has saved"
    )


def read_vision(whole: Whole, content: object) -> VisionSizes:
    """Sizes of the vision encoder, and which of its layers give the features."""
    vision = Vision.read(VISION if content is None else content, part="vision_config")
    depth, feature = vision.num_hidden_layers, whole.vision_feature_layer
    layers = depth + 1 + feature if feature < 0 else feature
    if not 0 < layers <= depth:
        refuse(
            "vision_feature_layer", feature, CONFIG, f"give one of the {depth} layers, 1 to {depth} or -1 to -{depth}"
        )
    sizes = VisionSizes(
        layers=layers,
        width=vision.hidden_size,
        heads=vision.num_attention_heads,
        mlp_size=vision.intermediate_size,
        image=vision.image_size,
        patch=vision.patch_size,
        epsilon=vision.layer_norm_eps,
        activation=vision.hidden_act,
        projector_bias=whole.multimodal_projector_bias,
    )
    check_divides(
        ("vision_config.hidden_size", sizes.width, sizes.heads), ("vision_config.image_size", sizes.image, sizes.patch)
    )
    return sizes


def read_pictures(vision: VisionSizes, processor: Mapping[str, Any] | None) -> MiddleSquare:
    """Read the image processor's settings.

    Raises:
        UserError: it does not scale the shorter side to the encoder's input and cut out the middle.
    """
    pictures = Pictures.read(processor, PROCESSOR)
    side, size = vision.image, pictures.size
    if pictures.default_to_square and type(size) is int:
        size = {"height": size, "width": size}
    check_edges("size", size, {"shortest_edge": side}, "the shorter side is scaled to the size of the encoder's input")
    check_edges(
        "crop_size", pictures.crop_size, {"height": side, "width": side}, "the crop has the size of the encoder's input"
    )
    return MiddleSquare(
        FixedPreprocessing(
            tile_pixels=side,
            tile_side=side // vision.patch,
            min_tiles=1,
            max_tiles=1,
            fit="crop",
            **pictures.scaling,
        )
    )


PREFIXES = (  # ours, transformers 4.4x
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
    ("visual.", "vision_tower.vision_model."),
    ("projector.", "multi_modal_projector."),
)
LATER_PREFIXES = (  # of transformers 4.52 and 5
    ("model.language_model.", "model."),
    ("model.vision_tower.vision_model.", "visual."),
    ("model.vision_tower.", "visual."),
    ("model.multi_modal_projector.", "projector."),
)


def canonical_name(name: str) -> str:
    """Names of transformers 4.4x, or of later versions, to ours."""
    return renamed(name, [*((stored, own) for own, stored in PREFIXES), *LATER_PREFIXES])


def stored_name(name: str) -> str:
    """Our names to those of transformers 4.4x."""
    return renamed(name, PREFIXES)


@dataclass(frozen=True)
class ClipEncoder(Encoder):
    """hidden_size: of what the projector gives, which is the decoder's."""

    pictures: MiddleSquare
    sizes: VisionSizes
    hidden_size: int

    def graph(self, g: Graph) -> ir.Value:
        """CLIP up to its feature layer, without the class token, then the projector.

        Source: Radford et al. 2021 (CLIP), section 2.4; CLIPVisionTransformer and LlavaMultiModalProjector in
        transformers.
        """
        sizes = self.sizes
        width, side = sizes.width, sizes.image // sizes.patch
        frames = g.extent(g.inputs["pixel_values"], 0)
        block = EncoderBlock(
            width=width,
            heads=sizes.heads,
            mlp_size=sizes.mlp_size,
            epsilon=sizes.epsilon,
            activation=ACTIVATIONS[sizes.activation],
            norms=("layer_norm1", "layer_norm2"),
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out="self_attn.out_proj",
        )
        with g.scope("embeddings"):
            kernel = g.weight(
                "visual.embeddings.patch_embedding.weight",
                (width, 3 * sizes.patch**2),
                (width, 3, sizes.patch, sizes.patch),
            )
            patches = g.op(
                "Gemm", pixel_patches(g, g.inputs["pixel_values"], sizes.image, sizes.patch), kernel, transB=1
            )
            token = g.weight("visual.embeddings.class_embedding", (1, 1, width), (width,))
            shape = (side**2 + 1, width)
            positions = g.weight("visual.embeddings.position_embedding.weight", (1, *shape), shape)
            x = with_class_token(g, patches, frames, token, positions, width)
            x = layer_norm(g, x, "visual.pre_layrnorm", width, sizes.epsilon)
        for i in range(sizes.layers):
            with g.scope(f"layers.{i}"):
                x = block.add(g, f"visual.encoder.layers.{i}", x, frames)
        with g.scope("projector"):
            hidden, bias = self.hidden_size, sizes.projector_bias
            x = g.reshape(without_class_token(g, x, frames, width), -1, width)
            x = gelu(g, g.linear(x, "projector.linear_1", hidden, width, bias))
            x = g.linear(x, "projector.linear_2", hidden, hidden, bias)
            return g.reshape(x, -1, side**2, hidden)


def default_layer(sizes: DecoderSizes) -> DefaultLayer:
    """16 of 32 for 7B, as the official evaluation; others in proportion."""
    return scaled_layer(sizes, {32: 16}, 16, 32)


@dataclass(frozen=True)
class MiddleSquare(Preparation):
    """The middle square of a picture, at the encoder's size."""

    preprocessing: FixedPreprocessing

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> MiddleSquare:
        """Make it from these settings.

        Raises:
            UserError: they are of another kind.
        """
        return cls(of_kind(FixedPreprocessing, preprocessing))

    def picture(self, image: PIL.Image.Image, token_id: int) -> Visual:
        """Scale the shorter side to the encoder's input, cut out the middle, and normalise.

        Source: CLIPImageProcessor in transformers.
        """
        p = self.preprocessing
        check_shape(*image.size, TILES_ASPECT_LIMIT)
        short, side = min(image.size), p.tile_pixels
        width, height = (int(side * extent / short) for extent in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        middle = scaled_levels(image, width, height, p, (left, top, left + side, top + side))
        inputs = NormalisedInputs(tile_levels(middle.transpose(2, 0, 1)[None], p))
        return Visual(inputs, Grid(p.tile_side, p.tile_side), token_id)

    def stock_inputs(self, visual: Visual) -> dict[str, npt.NDArray[Any]]:
        """The same pixels."""
        return {"pixel_values": visual.inputs["pixel_values"]}

    def covered(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The middle square."""
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side


CHAT_TEMPLATE = r"""
{%- for message in messages -%}
{%- if message.role != 'system' -%}
{{ message.role.upper() + ': ' }}
{%- endif -%}
{%- if message.content is string -%}
{{ message.content + ' ' }}
{%- else -%}
{%- for part in message.content -%}
{{ '<image>\n' if part.type == 'image' else part.text + ' ' }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
ASSISTANT:
{%- endif -%}
"""

FAMILY = Family(
    model_type="llava",
    preprocessing=FixedPreprocessing,
    pictures=MiddleSquare.of,
    axes=1,
    tiles=False,
    read=read,
    canonical_name=canonical_name,
    stored_name=stored_name,
    default_layer=default_layer,
    default_ratio=0.3,
    unused=("visual.encoder.layers.", "visual.post_layernorm."),  # after the feature layer
    foreign=foreign,
    positions=counted_positions,
    chat_template=CHAT_TEMPLATE,
    token_texts=TokenTexts("<image>"),
    template_marks=False,
    hub={"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf"},
)
