"""InternVL 2.5, 3 and 3.5 in the original code's layout, with a Qwen2, Qwen3 or InternLM2 decoder.

The graphs are those of `internvl`; only the names of the weights differ. InternLM2 has one fused weight for query, key
and value. It is multiplied whole and the result is split, so that no weight is copied.

**Selection.** With InternLM2, tokens are scored as in the official code: by the product of layer k-1's value weights
with its input, without the norm. The official code does not cover Qwen2 and Qwen3. With these, tokens are scored by the
layer's values, as in the other families.

transformers has no model of this layout, so `ivc-check` loads such a checkpoint into the model of the other layout.
InternLM2's checkpoints have no tokenizer.json: the export makes it from their tokenizer.model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from ivc_export.contract.manifest import Scored
from ivc_export.contract.records import Count, Depth, Epsilon, Heads, SideLength, Tiles, TokenId, Width
from ivc_export.errors import UserError
from ivc_export.families.family import Model, StockLayout, renamed
from ivc_export.families.internvl import FAMILY as TRANSFORMERS
from ivc_export.families.internvl import SHUFFLE, Half, VisionSizes, decoder_settings, make_model, without_thoughts
from ivc_export.families.internvl import stored_name as transformers_name
from ivc_export.families.settings import (
    CONFIG,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PROCESSOR,
    Deviations,
    Means,
    PictureSettings,
    Settings,
    check_edges,
    refuse,
    required,
)
from ivc_export.families.text_models import (
    DecoderLayers,
    DecoderSettings,
    PlainRope,
    Qwen2Text,
    Qwen3Text,
    Vocabulary,
    read_decoder,
)
from ivc_export.graph.decoder_block import DecoderBlock, ProjectionsByHead, self_attention_block


class Whole(Settings):
    """InternVLChatConfig of the original code. A field without a default must be in the file: the original default is
    not supported."""

    select_layer: Literal[-1] = -1
    pad2square: Literal[False] = False
    force_image_size: SideLength | None = None
    downsample_ratio: Half = 1 / SHUFFLE
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    ps_version: Literal["v2"]
    min_dynamic_patch: Tiles = 1
    max_dynamic_patch: Tiles = 6
    img_context_token_id: TokenId | None = None
    """null, as published: the original code asks the tokenizer."""
    tie_word_embeddings: bool = False


class Vision(Settings):
    """InternVisionConfig of the original code. A field without a default must be in the file: the original default is
    not supported."""

    num_channels: Literal[3] = 3
    patch_size: SideLength = 14
    image_size: SideLength = 224
    qkv_bias: bool = False
    hidden_size: Width = 3200
    num_attention_heads: Heads = 25
    intermediate_size: Width = 12800
    qk_normalization: Literal[False]
    num_hidden_layers: Depth = 48
    hidden_act: Literal["gelu"] = "gelu"
    norm_type: Literal["layer_norm"]
    layer_norm_eps: Epsilon = 1e-6


class InternLM2Text(DecoderSettings):
    """InternLM2Config of the original code. Its biases, on by default there, are not supported."""

    block: ClassVar[DecoderBlock] = self_attention_block(ProjectionsByHead(bias=False))
    scored: ClassVar[Scored] = "unnormed-values"

    model_type: Literal["internlm2"] = "internlm2"
    vocab_size: Vocabulary = 103168
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: DecoderLayers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Epsilon = 1e-6
    rope_parameters: PlainRope | None = None
    rope_scaling: PlainRope | None = None
    bias: Literal[False]
    rope_pos_id_version: Literal["default"] = "default"


class Pictures(PictureSettings):
    """The original code scales pictures itself. Its files have settings of CLIP's processor, which say the same."""

    size: Any = None
    crop_size: Any = None
    image_mean: Means = IMAGENET_MEAN
    image_std: Deviations = IMAGENET_STD


TEXTS: Mapping[str, type[DecoderSettings]] = {"qwen2": Qwen2Text, "qwen3": Qwen3Text, "internlm2": InternLM2Text}


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Digest config.json of the original layout, whose decoder is Qwen2 or InternLM2."""
    whole, text = Whole.read(config), decoder_settings(required(config, "llm_config"), "llm_config", TEXTS)
    sizes = read_sizes(whole, config)
    decoder = read_decoder(text, whole.tie_word_embeddings or text.tie_word_embeddings)
    pictures = Pictures.read(processor, PROCESSOR)
    for key, size in (("size", pictures.size), ("crop_size", pictures.crop_size)):
        check_edges(
            key, size, {"height": sizes.image, "width": sizes.image}, "a tile has the size of the encoder's input"
        )
    if whole.dynamic_image_size and not whole.use_thumbnail:
        refuse("use_thumbnail", False, CONFIG, "it must be true if dynamic_image_size is")
    tiles = (whole.min_dynamic_patch, whole.max_dynamic_patch) if whole.dynamic_image_size else (1, 1)
    return make_model(decoder, text, sizes, pictures, tiles, whole.img_context_token_id)


def read_sizes(whole: Whole, config: Mapping[str, Any]) -> VisionSizes:
    """Sizes of the vision encoder. whole: what was read of `config`."""
    vision = Vision.read(required(config, "vision_config"), part="vision_config")
    return VisionSizes(
        layers=vision.num_hidden_layers,
        width=vision.hidden_size,
        heads=vision.num_attention_heads,
        mlp_size=vision.intermediate_size,
        image=whole.force_image_size or vision.image_size,
        patch=vision.patch_size,
        epsilon=vision.layer_norm_eps,
        qkv_bias=vision.qkv_bias,
        fused_qkv=True,
    )


SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
"""The beginning of conversations that the original code names internvl2_5, such as those of InternVL 2.5 and 3."""

CHAT_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
<|im_start|>system
{{ DEFAULT_SYSTEM }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- set said = namespace(text=false) -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<IMG_CONTEXT>
{%- if not said.text and not (loop.nextitem.text or '').startswith('\\n') -%}
{{ '\\n' }}
{%- endif -%}
{%- else -%}
{%- set said.text = true -%}
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
"""A conversation of the original code: pictures in front on lines of their own, pictures within the text at their
places."""


def template_of(config: Mapping[str, Any]) -> str:
    """The template of the conversation that config.json names, with its system message.

    Raises:
        UserError: it names another one than internvl2_5.
    """
    name, system = config.get("template") or "internvl2_5", config.get("system_message")
    if name != "internvl2_5":
        raise UserError(
            f"template {name!r} of config.json is not supported, only 'internvl2_5': put a chat_template.jinja that "
            "shows pictures beside it"
        )
    if system is not None and not isinstance(system, str):
        raise UserError(f"system_message of config.json is {system!r}, which is not text: write a text, or remove it")
    template = without_thoughts(CHAT_TEMPLATE, config.get("llm_config"))
    return template.replace("DEFAULT_SYSTEM", json.dumps(SYSTEM if system is None else system, ensure_ascii=False))


PREFIXES = (  # ours, the original code's
    ("lm_head.", "language_model.output."),
    ("lm_head.", "language_model.lm_head."),
    ("model.embed_tokens.", "language_model.model.tok_embeddings."),
    ("model.", "language_model.model."),
    ("visual.", "vision_model."),
    ("projector.layer_norm.", "mlp1.0."),
    ("projector.linear_1.", "mlp1.1."),
    ("projector.linear_2.", "mlp1.3."),
)
VISION_PARTS = (
    (".cls_token", ".class_embedding"),
    (".patch_embeddings.projection.", ".patch_embedding."),
    (".position_embeddings", ".position_embedding"),
    (".encoder.layer.", ".encoder.layers."),
    (".attention.qkv.", ".attn.qkv."),
    (".attention.projection_layer.", ".attn.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
)
TEXT_PARTS = (  # InternLM2's; Qwen2's are ours
    (".self_attn.qkv_proj.", ".attention.wqkv."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
)


def canonical_name(name: str) -> str:
    """Names of the original code to ours."""
    name = renamed(name, ((stored, own) for own, stored in PREFIXES))
    for own, stored in VISION_PARTS if name.startswith("visual.") else TEXT_PARTS:
        name = name.replace(stored, own)
    return name


def stored_name(name: str) -> str:
    """Our names to those of the original code with InternLM2."""
    for own, stored in VISION_PARTS if name.startswith("visual.") else TEXT_PARTS:
        name = name.replace(own, stored)
    return renamed(name, PREFIXES)


TEXT_KEYS = (  # these mean the same in both layouts; the original files have many others, of older transformers
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "hidden_act"),
    "head_dim",
)


def stock_config(config: Mapping[str, Any], image_token: int) -> dict[str, Any]:
    """config.json of the original layout, converted to transformers' layout."""
    text, vision, model = config["llm_config"], config["vision_config"], read(config, None)
    sizes = read_sizes(Whole.read(config), config)
    own: dict[str, Any] = {"model_type": text.get("model_type") or next(iter(TEXTS))}
    if model.block == InternLM2Text.block:
        own = {"model_type": "llama", "attention_bias": False}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": image_token,
        "tie_word_embeddings": model.decoder.tied_embeddings,
        "text_config": {key: text[key] for key in TEXT_KEYS if key in text} | own,
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": sizes.width,
            "intermediate_size": sizes.mlp_size,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "attention_bias": sizes.qkv_bias,
            "image_size": [sizes.image, sizes.image],
            "patch_size": [sizes.patch, sizes.patch],
            "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
        },
    }


def stock_tensors(config: Mapping[str, Any], name: str, tensor: Any) -> dict[str, Any]:
    """A tensor of the original layout, NumPy's or torch's, converted to transformers' layout: a fused one becomes
    three."""
    own, decoder = canonical_name(name), read(config, None).decoder
    stem, fused, suffix = own.partition("qkv_proj." if ".qkv_proj." in own else "qkv.")
    if not fused:
        return {transformers_name(own): tensor}
    if fused == "qkv_proj.":  # by key-value head: its queries, its key, its value
        group, rest = decoder.heads // decoder.kv_heads, tensor.shape[1:]
        by_head = tensor.reshape(decoder.kv_heads, group + 2, decoder.head_dim, *rest)
        parts = [by_head[:, :group], by_head[:, group], by_head[:, group + 1]]
        parts = [part.reshape(-1, *rest) for part in parts]
    else:
        third = tensor.shape[0] // 3
        parts = [tensor[i * third : (i + 1) * third] for i in range(3)]
    names = (transformers_name(f"{stem}{part}_proj.{suffix}") for part in "qkv")
    return dict(zip(names, parts, strict=True))


FAMILY = replace(
    TRANSFORMERS,
    model_type="internvl_chat",
    read=read,
    chat_template=template_of({}),
    chat_template_of=template_of,
    canonical_name=canonical_name,
    stored_name=stored_name,
    stock_layout=StockLayout(stock_config, stock_tensors),
    hub={
        "internvl2.5-1b": "OpenGVLab/InternVL2_5-1B",
        "internvl2.5-2b": "OpenGVLab/InternVL2_5-2B",
        "internvl2.5-4b": "OpenGVLab/InternVL2_5-4B",
        "internvl2.5-8b": "OpenGVLab/InternVL2_5-8B",
    },
)
