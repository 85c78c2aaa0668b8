"""Checkpoints in the original layout of a family that transformers knows in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ivc_export import families
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.verify.parity import check
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

FAMILY = families.of("internvl_chat")
CONFIG = TINY[FAMILY.model_type]
QWEN2 = {
    **{key: value for key, value in CONFIG["llm_config"].items() if key != "bias"},
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
}

QWEN3 = {**TINY["internvl3_5"]["text_config"], "architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("language_model.model.tok_embeddings.weight", "model.embed_tokens.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.output.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.model.layers.3.attention.wqkv.weight", "model.layers.3.self_attn.qkv_proj.weight"),
        ("language_model.model.layers.3.attention.wo.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("language_model.model.layers.3.self_attn.q_proj.bias", "model.layers.3.self_attn.q_proj.bias"),
        ("language_model.model.layers.3.self_attn.k_norm.weight", "model.layers.3.self_attn.k_norm.weight"),
        ("language_model.model.layers.3.feed_forward.w1.weight", "model.layers.3.mlp.gate_proj.weight"),
        ("language_model.model.layers.3.feed_forward.w2.weight", "model.layers.3.mlp.down_proj.weight"),
        ("language_model.model.layers.3.feed_forward.w3.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"),
        ("language_model.model.layers.3.attention_norm.weight", "model.layers.3.input_layernorm.weight"),
        ("language_model.model.layers.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ("vision_model.embeddings.class_embedding", "visual.embeddings.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual.embeddings.position_embeddings"),
        (
            "vision_model.embeddings.patch_embedding.bias",
            "visual.embeddings.patch_embeddings.projection.bias",
        ),
        ("vision_model.encoder.layers.2.attn.qkv.bias", "visual.encoder.layer.2.attention.qkv.bias"),
        (
            "vision_model.encoder.layers.2.attn.proj.weight",
            "visual.encoder.layer.2.attention.projection_layer.weight",
        ),
        ("vision_model.encoder.layers.2.ls1", "visual.encoder.layer.2.lambda_1"),
        ("vision_model.encoder.layers.2.norm2.weight", "visual.encoder.layer.2.layernorm_after.weight"),
        ("vision_model.encoder.layers.2.mlp.fc1.weight", "visual.encoder.layer.2.mlp.fc1.weight"),
        ("mlp1.0.weight", "projector.layer_norm.weight"),
        ("mlp1.3.bias", "projector.linear_2.bias"),
    ],
)
def test_names_of_the_original_code_are_known(stored: str, own: str) -> None:
    assert FAMILY.canonical_name(stored) == own


def test_samples_have_the_original_codes_names(tmp_path: Path) -> None:
    names = {*load_file(make_checkpoint(tmp_path / "c", CONFIG) / "model.safetensors")}
    assert "language_model.model.layers.0.attention.wqkv.weight" in names
    assert "vision_model.encoder.layers.1.attn.qkv.weight" in names
    assert not [name for name in names if not name.startswith(("language_model.", "vision_model.", "mlp1."))]


@pytest.mark.parametrize("text", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_a_decoder_of_qwens_equals_transformers_layout(text: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", {**CONFIG, "llm_config": text})
    bundle = export(ExportRecipe(checkpoint, tmp_path / "b", max_visual=400))
    report = check(bundle, checkpoint, steps=1)
    assert report.passed, [c for c in report.comparisons if not c.passed]


def test_what_older_versions_wrote_does_not_reach_transformers() -> None:
    old = {
        "attn_implementation": "flash_attention_2",
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "id2label": {},
    }
    assert FAMILY.stock_layout is not None
    found = FAMILY.stock_layout.config({**CONFIG, "llm_config": {**CONFIG["llm_config"], **old}}, 503)["text_config"]
    assert not {*old} & {*found}
    assert (found["model_type"], found["attention_bias"], found["rope_theta"]) == ("llama", False, 1000000)


def test_fused_weights_are_split_by_key_value_head() -> None:
    """Rows numbered by what they are: head, then queries 0 and 1, key 2, value 3 of each key-value head."""
    stock, config = FAMILY.stock_layout, CONFIG
    assert stock is not None
    heads, size = 2, 16
    rows = np.array([(head, part, d) for head in range(heads) for part in range(4) for d in range(size)])
    name = "language_model.model.layers.0.attention.wqkv.weight"
    found = stock.tensors(config, name, rows)
    q, k, v = (found[f"language_model.model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    assert q[:, :2].reshape(4, size, 2)[:, 0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert k[:, :2].reshape(2, size, 2)[:, 5].tolist() == [[0, 2], [1, 2]]
    assert v[:, :2].reshape(2, size, 2)[:, 9].tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"select_layer": -2}, "select_layer -2"),
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"llm_config": {**QWEN2, "model_type": "phi3"}}, "llm_config.model_type 'phi3'"),
        ({"llm_config": {**QWEN3, "model_type": "qwen3_moe"}}, "llm_config.model_type 'qwen3_moe'"),
        (
            {"llm_config": {**QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0}}},
            "llm_config.rope_scaling.type 'yarn'",
        ),
        ({"vision_config": {**CONFIG["vision_config"], "norm_type": "rms_norm"}}, "vision_config.norm_type 'rms_norm'"),
        ({"force_image_size": 100}, "is not divisible by"),
    ],
)
def test_what_is_not_supported_says_so(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        FAMILY.read({**CONFIG, **changes}, None)
