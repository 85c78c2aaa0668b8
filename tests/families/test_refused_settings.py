"""Settings that this version does not know are refused in one sentence, before any weight is looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ivc_export import cli
from samples.tiny import TINY
from tests.families.family_cases import changed

QWEN, QWEN3, LLAVA, INTERNVL, CHAT = "qwen2_vl", "qwen3_vl", "llava", "internvl", "internvl_chat"
ROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}
CONFIGURED: list[tuple[str, dict[str, Any], str]] = [
    (
        QWEN,
        {"hidden_act": "gelu"},
        "hidden_act 'gelu' of config.json is not supported: this version supports 'silu' or",
    ),
    (QWEN, {"rms_norm_eps": 0}, "rms_norm_eps 0 of config.json is not supported: it should be greater than 0"),
    (QWEN, {"num_attention_heads": 10**9}, "num_attention_heads 1000000000 of config.json"),
    (QWEN, {"vocab_size": 2**40}, "vocab_size 1099511627776 of config.json"),
    (QWEN, {"hidden_size": 10**300}, "hidden_size 1000"),
    (QWEN, {"hidden_size": "64"}, "hidden_size '64' of config.json is not supported: it should be a valid integer"),
    (QWEN, {"hidden_size": True}, "hidden_size True of config.json"),
    (QWEN, {"head_dim": 8}, "inconsistent (mrope_section [2, 3, 3] must have three numbers whose sum is 4"),
    (QWEN, {"head_dim": 15}, "inconsistent (head_dim is 15"),
    (QWEN, {"num_attention_heads": 2, "head_dim": 16}, "inconsistent (head_dim is 16, but 2 heads share a hidden_size"),
    (
        QWEN,
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        "layer_types 'sliding_attention' of config",
    ),
    (QWEN, {"layer_types": ["full_attention"]}, "inconsistent (there are 1 layer_types, but num_hidden_layers is 4"),
    (QWEN, {"use_sliding_window": True, "max_window_layers": 3}, "use_sliding_window True of config.json is not supp"),
    (QWEN, {"use_sliding_window": "no"}, "use_sliding_window 'no' of config.json"),
    (QWEN, {"rope_theta": 0}, "rope_theta 0 of config.json"),
    (QWEN, {"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor 0.5 of"),
    (QWEN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 of config.json"),
    (QWEN, {"rope_scaling": {**ROPE, "mrope_section": [0, 4, 4]}}, "mrope_section [0, 4, 4]"),
    (QWEN, {"rope_scaling": [1]}, "rope_scaling [1] of config.json is not supported: it should be an object"),
    (QWEN, {"vision_config": 7}, "vision_config 7 of config.json is not supported: it should be an object"),
    (QWEN, {"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act 'gelu' of config.json"),
    (QWEN, {"vision_config": {"in_channels": 4}}, "vision_config.in_channels 4 of config.json"),
    (QWEN, {"vision_config": {"hidden_size": 96}}, "inconsistent (vision_config.hidden_size is 96, but the decoder's"),
    (QWEN, {"vision_config": {"rope_theta": 1e6}}, "vision_config.rope_theta 1000000.0 of config.json"),
    (QWEN, {"vision_config": {"rope_parameters": {"rope_theta": 5.0}}}, "rope_parameters.rope_theta 5.0 of"),
    (
        QWEN,
        {"vision_config": {"patch_size": [14, 16]}},
        "patch_size [14, 16] of config.json is not supported: only squ",
    ),
    ("qwen2_5_vl", {"vision_config": {"window_size": 14}}, "inconsistent (vision_config.window_size is 14"),
    ("qwen2_5_vl", {"vision_config": {"out_hidden_size": 32}}, "inconsistent (vision_config.out_hidden_size is 32"),
    *(
        (QWEN3, changes, sentence)
        for changes, sentence in (
            (
                {"text_config": {"attention_bias": True}},
                "text_config.attention_bias True of config.json is not supported",
            ),
            ({"text_config": {"rope_scaling": {"rope_type": "yarn"}}}, "text_config.rope_scaling.rope_type 'yarn' of"),
            ({"text_config": {"rope_scaling": {"mrope_section": [2, 3, 3]}}}, "mrope_section [2, 3, 3] of config.json"),
            (
                {"text_config": {"rope_scaling": {"mrope_section": [4, 3, 2]}}},
                "mrope_section [4, 3, 2] must have three numbers whose sum is 8",
            ),
            (
                {"text_config": {"rope_scaling": {"mrope_interleaved": False}}},
                "rope_scaling.mrope_interleaved False of",
            ),
            (
                {"text_config": {"num_hidden_layers": 3}},
                "inconsistent (there are 3 vision_config.deepstack_visual_indexes, but",
            ),
            (
                {"text_config": {"hidden_size": 48}},
                "inconsistent (vision_config.out_hidden_size is 64, but the decoder's",
            ),
            ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act 'gelu' of config.json"),
            (
                {"vision_config": {"num_position_embeddings": 50}},
                "num_position_embeddings 50 of config.json is not supp",
            ),
            ({"vision_config": {"deepstack_visual_indexes": [0, 4]}}, "deepstack_visual_indexes [0, 4] of config.json"),
            (
                {"vision_config": {"deepstack_visual_indexes": [2, 1]}},
                "[2, 1] of config.json is not supported: give laye",
            ),
            (
                {"model_type": "qwen3_vl_moe"},
                "a Qwen3-VL with a mixture of experts (qwen3_vl_moe), but this version exp",
            ),
        )
    ),
    (
        LLAVA,
        {"text_config": {"attention_bias": True}},
        "text_config.attention_bias True of config.json is not supported",
    ),
    (LLAVA, {"text_config": {"mlp_bias": True}}, "text_config.mlp_bias True of config.json is not supported: this ver"),
    (LLAVA, {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu' of config.json"),
    (LLAVA, {"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type 'siglip_vision_model'"),
    (LLAVA, {"vision_config": {"layer_norm_eps": float("nan")}}, "vision_config.layer_norm_eps nan of config.json"),
    (
        LLAVA,
        {"vision_feature_layer": 9},
        "vision_feature_layer 9 of config.json is not supported: give one of the 3 layers",
    ),
    (INTERNVL, {"vision_config": {"use_mean_pooling": False}}, "vision_config.use_mean_pooling False of config.json"),
    (INTERNVL, {"vision_config": {"use_absolute_position_embeddings": False}}, "use_absolute_position_embeddings Fal"),
    (INTERNVL, {"text_config": {"model_type": ["qwen2"]}}, "text_config.model_type ['qwen2'] of config.json"),
    (INTERNVL, {"vision_feature_layer": -2}, "vision_feature_layer -2 of config.json"),
    (INTERNVL, {"text_config": {"use_sliding_window": True, "max_window_layers": 0}}, "use_sliding_window True of"),
    (
        CHAT,
        {"llm_config": {"bias": True}},
        "llm_config.bias True of config.json is not supported: this version supports F",
    ),
    (CHAT, {"llm_config": {"hidden_act": "gelu"}}, "llm_config.hidden_act 'gelu' of config.json"),
    (CHAT, {"pad2square": True}, "pad2square True of config.json"),
    (CHAT, {"use_thumbnail": False}, "use_thumbnail False of config.json"),
    (CHAT, {"ps_version": None}, "config.json has no ps_version"),
    (CHAT, {"max_dynamic_patch": 10**9}, "max_dynamic_patch 1000000000 of config.json"),
    (CHAT, {"min_dynamic_patch": 13}, "inconsistent (a picture has at least 13, and at most 12"),
]
PROCESSED: list[tuple[str, dict[str, Any], str]] = [
    (
        QWEN,
        {"do_resize": False},
        "do_resize False of the image processor's settings is not supported: this version supports True",
    ),
    (QWEN, {"do_convert_rgb": False}, "do_convert_rgb False of the image processor's settings"),
    (QWEN, {"do_normalize": "no"}, "do_normalize 'no' of the image processor's settings"),
    (
        QWEN,
        {"resample": 6},
        "resample 6 of the image processor's settings is not supported: this version supports 0, 1, 2",
    ),
    (QWEN, {"rescale_factor": 0}, "rescale_factor 0 of the image processor's settings"),
    (QWEN, {"rescale_factor": float("inf")}, "rescale_factor inf of the image processor's settings"),
    (QWEN, {"image_std": [0.2, 0.0, 0.2]}, "image_std.1 0.0 of the image processor's settings"),
    (QWEN, {"image_std": 0}, "image_std.0 0 of the image processor's settings"),
    (QWEN, {"image_mean": [0.5, 0.5]}, "image_mean"),
    (QWEN, {"image_mean": [0.5, 0.5, float("nan")]}, "image_mean.2 nan of the image processor's settings"),
    (
        QWEN,
        {"patch_size": 16},
        "patch_size 16 of the image processor's settings is not supported: vision_config.patch_",
    ),
    (QWEN, {"merge_size": 4}, "merge_size 4 of the image processor's settings is not supported: vision_config.spatial"),
    (QWEN, {"temporal_patch_size": 1}, "temporal_patch_size 1 of the image processor's settings"),
    (QWEN, {"size": {"height": 448, "width": 448}}, "size {'height': 448, 'width': 448} of the image processor's set"),
    (
        QWEN,
        {"size": 448},
        "size 448 of the image processor's settings is not supported: give shortest_edge and longest",
    ),
    (QWEN, {"size": {"longest_edge": 10**6}}, "size {'longest_edge': 1000000} of the image processor's settings"),
    (QWEN, {"min_pixels": 10**6, "max_pixels": 10**5}, "min_pixels 1000000 of the image processor's settings"),
    (QWEN, {"max_pixels": 2**31}, "max_pixels 2147483648 of the image processor's settings"),
    (QWEN, {"max_pixels": -1}, "max_pixels -1 of the image processor's settings"),
    (QWEN, {"size": {"shortest_edge": -1, "longest_edge": 5}}, "size {'shortest_edge': -1, 'longest_edge': 5} of"),
    (QWEN, {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type 'CLIPImageProcessor' of the image"),
    (LLAVA, {"do_resize": False}, "do_resize False of the image processor's settings"),
    (LLAVA, {"do_center_crop": False}, "do_center_crop False of the image processor's settings"),
    (LLAVA, {"do_center_crop": None}, "do_center_crop False of the image processor's settings"),
    (LLAVA, {"do_pad": True}, "do_pad True of the image processor's settings"),
    (LLAVA, {"size": 224}, "size 224 of the image processor's settings is not supported: the shorter side is scaled"),
    (LLAVA, {"size": {"height": 112, "width": 112}}, "size {'height': 112, 'width': 112} of the image processor's"),
    (LLAVA, {"size": 112, "default_to_square": True}, "size {'height': 112, 'width': 112} of the image processor's"),
    (LLAVA, {"crop_size": 100}, "crop_size 100 of the image processor's settings is not supported"),
    (LLAVA, {"crop_size": {"height": 112, "width": 96}}, "crop_size {'height': 112, 'width': 96} of the image"),
    (INTERNVL, {"size": {"shortest_edge": 112}}, "size {'shortest_edge': 112} of the image processor's settings"),
    (INTERNVL, {"size": 448}, "size 448 of the image processor's settings"),
    (INTERNVL, {"max_patches": 0}, "max_patches 0 of the image processor's settings"),
    (INTERNVL, {"min_patches": 13}, "inconsistent (a picture has at least 13, and at most 12"),
    (CHAT, {"size": 224}, "size 224 of the image processor's settings"),
    (CHAT, {"do_resize": False}, "do_resize False of the image processor's settings"),
]


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What an export of the folder's JSON files says: one sentence, before any weight is looked at."""
    assert cli.ivc_export(["--model", str(folder), "--output", str(folder / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert not (folder / "out").exists()
    return err


@pytest.mark.parametrize(("name", "changes", "sentence"), CONFIGURED, ids=[f"{n} {c}" for n, c, _ in CONFIGURED])
def test_configurations_that_are_refused(
    name: str, changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(name, changes)))
    assert sentence in refused(tmp_path, capsys)


@pytest.mark.parametrize(("name", "settings", "sentence"), PROCESSED, ids=[f"{n} {s}" for n, s, _ in PROCESSED])
def test_image_processors_that_are_refused(
    name: str, settings: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY[name]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert sentence in refused(tmp_path, capsys)
