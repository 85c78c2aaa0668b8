"""DeepSeek-VL2 (Wu et al. 2024, arXiv 2412.10302): SigLIP over two views, a projector, and a mixture of experts.

**Pictures.** A picture is shown in two views. The first shows all of it in one tile of 196 visual tokens. The second
shows it larger, in the shape of tiles that loses least of it. Each row of a view ends with a separator, and so does the
first view. Separators are always kept.

**Selection.** Only tokens of the first view share votes. Each chosen token of the first view also chooses the tokens of
the second view that show the same place. Implicit visual coordinates are chosen in the first view, and in each row of
the second. Tokens that show the filling around a picture are neither seeds nor foreground.

**The official code** keeps the union of these, 47 to 54% of the visual tokens. Here all tokens are in one order:

1. separators
2. seeds
3. implicit visual coordinates
4. tokens of the first view by score, seeds first, each with the second view's tokens in its place
5. tokens that show filling, and tokens that were kept only for their coordinates

So the official number of tokens gives the official set. The default ratio of 0.52 is about the sum of the official
fractions. The default `--max-visual` of 1,280 allows five tiles; 2,101 allows nine, as the checkpoints' own processors
do. The official code takes one picture. The model's own processor cuts the pictures of a prompt into tiles only if
there are at most two. Here a prompt may have several pictures, each in its two views.

**Caches and experts.** The cache of layer 0 stays whole, as in the official code. Latent attention is expanded: caches
contain keys and values of every head. Checkpoints store experts apart. The export stacks them while it copies them, so
their weights cannot be linked. Every expert is computed for every row. transformers has no such model, so `ivc-check`
compares with one written in PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from ivc_export.contract.manifest import DecoderSizes, RotarySizes, SelectionRule
from ivc_export.contract.preprocessing import ViewPreprocessing
from ivc_export.contract.records import Count, Depth, Epsilon, Factor, Heads, SideLength, Width
from ivc_export.families.family import DefaultLayer, Family, Model, StockLayout, TokenTexts, renamed, scaled_layer
from ivc_export.families.positions import counted_positions
from ivc_export.families.settings import (
    CONFIG,
    PROCESSOR,
    Deviations,
    Means,
    Settings,
    check_divides,
    inconsistent,
    refuse,
    required,
)
from ivc_export.families.text_models import DecoderLayers, DecoderSettings, Vocabulary, read_decoder
from ivc_export.families.views import MERGE, TwoViews, ViewEncoder, ViewSizes
from ivc_export.graph.decoder_block import DecoderBlock, SelfAttention, SeparateProjections
from ivc_export.graph.experts import ExpertFeedForward
from ivc_export.graph.latent_attention import LatentAttention

Pair = Annotated[tuple[SideLength, SideLength], Strict(False)]
Candidates = Annotated[tuple[Pair, ...], Strict(False), Field(min_length=1, max_length=256)]
Experts = Annotated[int, Field(ge=0, le=4096)]


class Whole(Settings):
    """DeepseekVLV2Config of the model's own code."""

    tile_tag: Literal["2D"] = "2D"
    global_view_pos: Literal["head"] = "head"
    candidate_resolutions: Candidates = ((384, 384),)


class Vision(Settings):
    """VisionEncoderConfig of the model's own code."""

    model_type: Literal["vision"] = "vision"
    image_size: SideLength = 384
    patch_size: SideLength = 16
    width: Width = 1024
    layers: Depth = 24
    heads: Heads = 16
    mlp_ratio: Factor = 4.0
    class_token: Literal[False] = False


class Projector(Settings):
    """MlpProjectorConfig of the model's own code. A null size is that of the part beside it."""

    model_type: Literal["mlp_projector"] = "mlp_projector"
    projector_type: Literal["downsample_mlp_gelu"] = "downsample_mlp_gelu"
    input_dim: Width | None = None
    n_embed: Width | None = None
    depth: Literal[2] = 2
    mlp_ratio: Literal[1] = 1
    downsample_ratio: Literal[2] = 2


class Text(DecoderSettings):
    """DeepseekV2Config of the model's own code."""

    model_type: Literal["deepseek_v2"] = "deepseek_v2"
    vocab_size: Vocabulary = 102400
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: DecoderLayers = 30
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = 32
    max_position_embeddings: Count = 2048
    rms_norm_eps: Epsilon = 1e-6
    rope_scaling: Any = None
    attention_bias: Literal[False] = False
    use_mla: bool = True
    q_lora_rank: Width | None = 1536
    kv_lora_rank: Width | None = 512
    qk_nope_head_dim: Annotated[int, Field(ge=0, le=4096)] = 128
    qk_rope_head_dim: Annotated[int, Field(ge=0, le=4096)] = 64
    v_head_dim: Annotated[int, Field(ge=0, le=4096)] = 128
    moe_intermediate_size: Width = 1407
    moe_layer_freq: Literal[1] = 1
    first_k_dense_replace: Annotated[int, Field(ge=0, le=1000)] = 0
    n_routed_experts: Experts | None = None
    n_shared_experts: Experts | None = None
    num_experts_per_tok: Experts | None = None
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    topk_method: Literal["greedy", "gready", "noaux_tc"] = "gready"
    n_group: Experts | None = None
    topk_group: Experts | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: Factor = 1.0


class Pictures(Settings):
    """DeepseekVLV2Processor of the model's own code; pictures are scaled by Pillow's bicubic filter."""

    candidate_resolutions: Candidates | None = None
    normalize: Literal[True] = True
    image_mean: Means = (0.5, 0.5, 0.5)
    image_std: Deviations = (0.5, 0.5, 0.5)


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Digest config.json and the processor's file."""
    whole, part = Whole.read(config), "language_config"
    text = Text.read(required(config, part), part=part)
    vision = Vision.read(required(config, "vision_config"), part="vision_config")
    sizes = ViewSizes(
        layers=vision.layers,
        width=vision.width,
        heads=vision.heads,
        mlp_size=int(vision.mlp_ratio * vision.width),
        image=vision.image_size,
        patch=vision.patch_size,
    )
    check_divides(("vision_config.width", sizes.width, sizes.heads))
    decoder, block, rotary = read_language(text)
    projector = Projector.read(config.get("projector_config"), part="projector_config")
    for key, found, wanted in (
        ("input_dim", projector.input_dim, sizes.width),
        ("n_embed", projector.n_embed, decoder.hidden_size),
    ):
        if found is not None and found != wanted:
            refuse(f"projector_config.{key}", found, CONFIG, f"the other sizes need {wanted}")
    experts = block.feed_forward
    return Model(
        decoder=decoder,
        block=block,
        rotary=rotary,
        selection=SelectionRule(
            ivc_fraction=0.1,
            row_fraction=0.15,
            seed_divisor=100,
            query_offset=1,
            softmax="thumbnail",
            views=True,
            whole_layers=(0,),
        ),
        encoder=ViewEncoder(read_pictures(whole, sizes, processor), sizes, decoder.hidden_size),
        image_token=None,
        vision_start_token=None,
        vision_end_token=None,
        stacks=tuple(experts.stacks(decoder)) if isinstance(experts, ExpertFeedForward) else (),
    )


def read_language(text: Text) -> tuple[DecoderSizes, DecoderBlock, RotarySizes]:
    """Read the decoder.

    Raises:
        UserError: sizes do not fit each other, or a setting is not supported.
    """
    if text.rope_scaling is not None:
        known = "this version supports null, which all published checkpoints of this family have"
        refuse("language_config.rope_scaling", text.rope_scaling, CONFIG, known)
    decoder = read_decoder(text, text.tie_word_embeddings)
    feed_forward = read_experts(text)
    if not text.use_mla:
        block = DecoderBlock(SelfAttention(SeparateProjections(bias=False)), feed_forward)
        return decoder, block, RotarySizes(theta=text.theta, sections=(decoder.head_dim // 2,))
    plain, turned, value, latent = text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim, text.kv_lora_rank
    if not (plain and turned and value and latent) or turned % 2 or plain % 2:
        raise inconsistent(
            "if language_config.use_mla is true, kv_lora_rank and v_head_dim must be above 0, and qk_nope_head_dim and "
            "qk_rope_head_dim even and above 0"
        )
    heads = {"kv_heads": decoder.heads, "head_dim": plain + turned, "value_dim": value}
    attention = LatentAttention(latent, turned, text.q_lora_rank)
    rotary = RotarySizes(theta=text.theta, sections=(turned // 2,))
    return decoder.model_copy(update=heads), DecoderBlock(attention, feed_forward), rotary


def read_experts(text: Text) -> ExpertFeedForward:
    """Read the feed-forward layers.

    Raises:
        UserError: the numbers of experts do not fit each other, or rows first choose groups of experts.
    """
    experts, chosen, groups = text.n_routed_experts or 0, text.num_experts_per_tok or 0, text.n_group or 1
    if groups > 1 and experts:
        check_divides(("language_config.n_routed_experts", experts, groups))
    if groups != 1 or (text.topk_group or 1) != 1:
        refuse("language_config.n_group", text.n_group, CONFIG, "this version supports 1, experts chosen among all")
    if experts and not 0 < chosen <= experts:
        raise inconsistent(f"num_experts_per_tok is {chosen}, but there are {experts} n_routed_experts")
    return ExpertFeedForward(
        dense=text.first_k_dense_replace if experts else text.num_hidden_layers,
        experts=experts,
        inner=text.moe_intermediate_size,
        chosen=chosen,
        shared=text.n_shared_experts or 0,
        sigmoid=text.scoring_func == "sigmoid",
        normalise=text.norm_topk_prob and chosen > 1,
        factor=text.routed_scaling_factor,
        bias=text.topk_method == "noaux_tc",
    )


def read_pictures(whole: Whole, sizes: ViewSizes, processor: Mapping[str, Any] | None) -> TwoViews:
    """Read how pictures are prepared.

    Raises:
        UserError: the second view's sizes are not multiples of a tile.
    """
    pictures = Pictures.read(processor, PROCESSOR)
    candidates = pictures.candidate_resolutions or whole.candidate_resolutions
    for candidate in candidates:
        if any(side % sizes.image for side in candidate):
            known = f"tiles are of {sizes.image} x {sizes.image} pixels"
            refuse("candidate_resolutions", list(candidate), CONFIG, known)
    return TwoViews(
        ViewPreprocessing(
            tile_pixels=sizes.image,
            tile_side=sizes.tokens,
            token_side=MERGE * sizes.patch,
            shapes=tuple((width // sizes.image, height // sizes.image) for width, height in candidates),
            fill=int(255 * pictures.image_mean[0]),
            rescale_factor=1 / 255,
            mean=pictures.image_mean,
            std=pictures.image_std,
        )
    )


PREFIXES = (  # ours, the model's own code's
    ("lm_head.", "language.lm_head."),
    ("model.", "language.model."),
    ("visual.row_separator", "image_newline"),
    ("visual.view_separator", "view_seperator"),
    ("visual.", "vision."),
    ("projector.linear_1.", "projector.layers.0."),
    ("projector.linear_2.", "projector.layers.2."),
)


def canonical_name(name: str) -> str:
    """Names of the model's own code to ours."""
    return renamed(name, ((stored, own) for own, stored in PREFIXES))


def stored_name(name: str) -> str:
    """Our names to those of the model's own code."""
    return renamed(name, PREFIXES)


def default_layer(sizes: DecoderSizes) -> DefaultLayer:
    """17 of 27 for DeepSeek-VL2-small, as the official evaluation; others in proportion."""
    return scaled_layer(sizes, {27: 17}, 17, 27)


CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '<|User|>: ' }}
{%- elif message.role == 'assistant' -%}
{{ '<|Assistant|>: ' }}
{%- endif -%}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- set said = namespace(text=false) -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<image>
{%- if not said.text and not (loop.nextitem.text or '').startswith('\\n') -%}
{{ '\\n' }}
{%- endif -%}
{%- else -%}
{%- set said.text = true -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ (eos_token or '<｜end▁of▁sentence｜>') if message.role == 'assistant' else '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|Assistant|>:
{%- endif -%}
"""
"""The conversation "deepseek" of the model's own code: pictures in front on lines of their own, pictures within the
text at their places."""


def stock_config(config: Mapping[str, Any], image_token: int) -> dict[str, Any]:
    """config.json for the PyTorch model of verify/: sizes by plain names, nothing left out."""
    model = read(config, None)
    experts, attention, encoder = model.block.feed_forward, model.block.attention, model.encoder
    assert isinstance(experts, ExpertFeedForward) and isinstance(encoder, ViewEncoder)
    latent = attention if isinstance(attention, LatentAttention) else None
    return {
        "architectures": ["TwoViewsOfExperts"],
        "image_token_id": image_token,
        "decoder": model.decoder.model_dump(),
        "theta": model.rotary.theta,
        "latent": latent and {"keys": latent.latent, "queries": latent.query_latent, "rotary": latent.rotary},
        "experts": dict(vars(experts)),
        "vision": encoder.sizes.model_dump(),
    }


FAMILY = Family(
    model_type="deepseek_vl_v2",
    preprocessing=ViewPreprocessing,
    pictures=TwoViews.of,
    axes=1,
    tiles=False,
    read=read,
    canonical_name=canonical_name,
    stored_name=stored_name,
    default_layer=default_layer,
    default_ratio=0.52,
    unused=("visual.attn_pool.",),
    positions=counted_positions,
    chat_template=CHAT_TEMPLATE,
    token_texts=TokenTexts("<image>"),
    template_marks=False,
    stock_layout=StockLayout(stock_config, lambda config, name, tensor: {name: tensor}),
    hub={
        "deepseek-vl2-tiny": "deepseek-ai/deepseek-vl2-tiny",
        "deepseek-vl2-small": "deepseek-ai/deepseek-vl2-small",
        "deepseek-vl2": "deepseek-ai/deepseek-vl2",
    },
)
