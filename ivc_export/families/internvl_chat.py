"""InternVL 2.5 and 3 in the original code's layout, with a Qwen2 or InternLM2 decoder.

The same graphs from other names: InternLM2's fused query-key-value weight is multiplied whole and split behind it, so
that no weight is copied. transformers has no model of this layout: `ivc-check` loads such a checkpoint into its model
of the other. InternLM2's checkpoints come without a tokenizer.json, which `ivc-run` needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ivc_export.errors import UserError
from ivc_export.families import Model, StockLayout, read_decoder, renamed, required
from ivc_export.families.internvl import FAMILY as TRANSFORMERS
from ivc_export.families.internvl import SHUFFLE, VisionSizes, check_plain, make_model
from ivc_export.families.internvl import stored_name as transformers_name

IMAGE_TOKENS = {"qwen2": 151667, "internlm2": 92546}
"""<IMG_CONTEXT> by decoder; <img> and </img> are the two ids before it in the tokenizers of both."""


def read(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Model:
    """Digest config.json of the original layout, whose decoder is Qwen2 or InternLM2."""
    text, vision = required(config, "llm_config"), required(config, "vision_config")
    check_plain(
        {
            "downsample_ratio": (config.get("downsample_ratio", 0.5), 1 / SHUFFLE),
            "select_layer": (config.get("select_layer", -1), -1),
            "ps_version": (config.get("ps_version", "v2"), "v2"),
            "vision_config.hidden_act": (vision.get("hidden_act", "gelu"), "gelu"),
            "vision_config.norm_type": (vision.get("norm_type", "layer_norm"), "layer_norm"),
            "vision_config.qk_normalization": (vision.get("qk_normalization", False), False),
        }
    )
    kind = text.get("model_type")
    if kind not in IMAGE_TOKENS:
        raise UserError(f"llm_config.model_type {kind!r} of config.json is not supported: only qwen2 and internlm2")
    fused = kind == "internlm2"
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    decoder = read_decoder(text, tied, qkv_bias=bool(text.get("bias", True)) if fused else True)
    sizes = VisionSizes(
        layers=required(vision, "num_hidden_layers"),
        width=required(vision, "hidden_size"),
        heads=required(vision, "num_attention_heads"),
        mlp_size=required(vision, "intermediate_size"),
        image=config.get("force_image_size") or required(vision, "image_size"),
        patch=required(vision, "patch_size"),
        epsilon=vision.get("layer_norm_eps", 1e-6),
        qkv_bias=vision.get("qkv_bias", False),
        fused_qkv=True,
    )
    tiled = config.get("dynamic_image_size", True) and config.get("use_thumbnail", True)
    tiles = (config.get("min_dynamic_patch") or 1, config.get("max_dynamic_patch") or 12) if tiled else (1, 1)
    # config.json does not name the token: the original code looks it up in the tokenizer of the decoder
    image_token = config.get("img_context_token_id") or IMAGE_TOKENS[kind]
    decoder = decoder.model_copy(update={"fused_qkv": fused})
    return make_model(decoder, text, sizes, processor or {}, tiles, image_token)


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


TEXT_KEYS = (  # that mean the same in both layouts; the original files hold many others, of older transformers
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "hidden_act"),
)


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the original layout as transformers' layout has it."""
    text, vision, model = config["llm_config"], config["vision_config"], read(config, None)
    sizes: VisionSizes = model.vision
    own: dict[str, Any] = {"model_type": "qwen2"}
    if model.decoder.fused_qkv:
        own = {"model_type": "llama", "attention_bias": model.decoder.qkv_bias}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": model.image_token,
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
    """A tensor of the original layout, NumPy's or torch's, as transformers' layout has it: fused ones in three."""
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
    canonical_name=canonical_name,
    stored_name=stored_name,
    stock_layout=StockLayout(stock_config, stock_tensors),
    hub={
        "internvl2.5-1b": "OpenGVLab/InternVL2_5-1B",
        "internvl2.5-2b": "OpenGVLab/InternVL2_5-2B",
        "internvl2.5-4b": "OpenGVLab/InternVL2_5-4B",
        "internvl2.5-8b": "OpenGVLab/InternVL2_5-8B",
    },
    tiny={
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 112,
        "img_context_token_id": 503,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "use_thumbnail": True,
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "bias": False,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 4096,
            "eos_token_id": 505,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "gelu",
            "image_size": 112,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "qk_normalization": False,
            "qkv_bias": True,
        },
    },
)
