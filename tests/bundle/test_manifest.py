"""Manifests that were edited, or whose fields deny each other: one sentence each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.integrity import verify_files
from ivc_export.contract.manifest import CONSTANTS, constants_sha256
from ivc_export.contract.names import MANIFEST


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(sample_bundle.folder, tmp_path / "bundle")


def edit(bundle: Path, keys: str, value: Any) -> None:
    """Set a field, "a.b.0" being the first of b of a; and the hash with it."""
    content = json.loads((bundle / MANIFEST).read_text())
    part: Any = content
    *before, last = [int(key) if key.isdecimal() else key for key in keys.split(".")]
    for key in before:
        part = part[key]
    part[last] = value
    (bundle / MANIFEST).write_text(json.dumps(content | {"constants_sha256": constants_sha256(content)}))


def refusal(bundle: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.ivc_run([str(bundle), "--prompt", "Where?", "--max-tokens", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        ("family", "llava", "does not fit the other fields"),
        (
            "weight_formats",
            {"model.layers.0.mlp.down_proj": {"format": "int4"}},
            "the weights of model.layers.0.mlp.down_proj are int4, and the graphs that they are floats",
        ),
        ("family", "qwen9", "family 'qwen9' is not one of"),
        ("family", "../errors", "family '../errors' is not one of"),
        ("dtype", "float16", "embedding.dtype does not fit"),
        ("lowering", "plugin", "lowering does not fit"),
        ("lowering", "\x1b[31m", "lowering does not fit"),
        ("selection_layer", 4, "selection_layer does not fit"),
        ("selection_layer", 1, "graphs.prefix does not fit"),
        ("selection_layer", 10**30, "selection_layer does not fit"),
        ("max_visual", 4, "preprocessing does not fit"),
        ("max_visual", 1 << 40, "is damaged (max_visual"),
        ("default_ratio", float("nan"), "is damaged (default_ratio"),
        ("decoder.layers", 5, "graphs.decoder does not fit"),
        ("decoder.heads", 3, "decoder.kv_heads does not fit"),
        ("decoder.vocab_size", 511, "embedding.shape does not fit"),
        ("decoder.head_dim", 1 << 40, "is damaged (decoder.head_dim"),
        ("decoder.value_dim", 8, "graphs.prefix does not fit"),
        ("decoder.value_dim", 0, "is damaged (decoder.value_dim"),
        ("decoder.deepstack", 1, "graphs.vision does not fit"),
        ("decoder.deepstack", 4, "decoder.deepstack does not fit"),
        ("decoder.deepstack", 3, "selection_layer does not fit"),
        ("decoder.rms_norm_epsilon", float("inf"), "is damaged (decoder.rms_norm_epsilon"),
        ("rotary.sections", [8], "rotary.sections does not fit"),
        ("rotary.sections", [2, 3, 4], "rotary.sections does not fit"),
        ("selection.tiles", True, "selection.tiles does not fit"),
        ("selection.whole_layers", [9], "selection.whole_layers does not fit"),
        ("selection.whole_layers", [0, 0], "selection.whole_layers does not fit"),
        ("selection.query_offset", 1 << 40, "is damaged (selection.query_offset"),
        ("preprocessing.max_pixels", 1 << 30, "preprocessing does not fit"),
        ("preprocessing.patch_size", 28, "graphs.vision does not fit"),
        ("tokens.image", 512, "tokens does not fit"),
        ("tokens.stop", [1 << 31], "is damaged (tokens.stop"),
        ("embedding.offset", 1 << 62, "the embedding table is not within its file"),
        ("embedding.shape", [1 << 30, 1 << 30], "the embedding table is not within its file"),
        ("embedding.file", "config.json", "which is not one of its weight files"),
        ("weights", [], "names no weight files"),
        ("graphs.vision.file", "prefix.onnx", "graphs.vision does not fit"),
        ("graphs.vision.outputs.0.shape.2", 65, "graphs.vision does not fit"),
        ("residual_scale", 0.5, "residual_scale does not fit"),
        ("residual_scale", 0, "is damaged (residual_scale"),
        ("weight_formats", {"lm_head": {"format": "int3"}}, "was made by a newer ivc-export (weight_formats.lm_head"),
        ("selection.method", "dart", "was made by a newer ivc-export (selection: Input tag 'dart'"),
        ("selection.method", "fastv", "was made by a newer ivc-export (selection.ivc_fraction: Extra inputs"),
        ("selection.surprise", 1, "was made by a newer ivc-export (selection.surprise: Extra inputs"),
        ("surprise", 1, "was made by a newer ivc-export (surprise: Extra inputs"),
        ("preprocessing.kind", "frames", "was made by a newer ivc-export (preprocessing"),
        ("chat", {"begin": {"before": "<u>"}}, "is damaged (chat.begin.behind: Field required"),
        (
            "schema_version",
            1,
            "version 1, but this ivc-export reads 2: export the model again with ivc-export --model",
        ),
        ("graphs.vision.sha256", None, "is damaged (graphs.vision.sha256"),
        ("weights.0.header_sha256", "abc", "is damaged (weights.0.header_sha256"),
        ("graphs.vision.sha256", "0" * 64, "vision.onnx is not the graph that was exported"),
    ],
)
def test_fields_that_deny_each_other(
    bundle: Path, keys: str, value: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(bundle, keys, value)
    assert sentence in refusal(bundle, capsys)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("selection.ivc_fraction", 0.2),
        ("selection.query_offset", 3),
        ("selection.softmax", "all"),
        ("rotary.theta", 10000.0),
        ("rotary.sections", [3, 3, 2]),
        ("preprocessing.mean", [0.5, 0.5, 0.5]),
        ("tokens.stop", [1]),
        ("default_ratio", 0.25),
        ("decoder.rms_norm_epsilon", 1e-5),
        ("embedding.offset", 0),
    ],
)
def test_an_edit_that_would_change_answers_is_told(
    bundle: Path, keys: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sealed = json.loads((bundle / MANIFEST).read_text())["constants_sha256"]
    edit(bundle, keys, value)
    edited = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(edited | {"constants_sha256": sealed}))
    command = f"export the model again with ivc-export --model CHECKPOINT --output {bundle} --force"
    assert command in refusal(bundle, capsys)


def test_a_graph_that_changed_is_told(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "decoder.onnx"
    path.write_bytes(path.read_bytes().replace(b"ivc-export", b"ivc-expert", 1))
    assert "decoder.onnx is not the graph that was exported" in refusal(bundle, capsys)


def test_the_hash_covers_all_but_what_may_change(sample_bundle: Bundle) -> None:
    content = json.loads((sample_bundle.folder / MANIFEST).read_text())
    assert content["constants_sha256"] == constants_sha256(content)
    assert {*content} - CONSTANTS == {"schema_version", "calibrated", "weights", "versions", "constants_sha256"}
    assert all(constants_sha256(content | {name: "?"}) != content["constants_sha256"] for name in CONSTANTS)


@pytest.mark.parametrize(("field", "default"), [("weight_formats", {}), ("chat", None), ("residual_scale", 1)])
def test_optional_fields_may_be_absent(bundle: Path, field: str, default: Any) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    before = Bundle.load(bundle).manifest.model_copy(update={field: default})
    content.pop(field)
    (bundle / MANIFEST).write_text(json.dumps(content | {"constants_sha256": constants_sha256(content)}))
    assert Bundle.load(bundle).manifest.model_dump(exclude={"constants_sha256"}) == before.model_dump(
        exclude={"constants_sha256"}
    )


@pytest.mark.parametrize("field", ["constants_sha256", "graphs.decoder.sha256", "selection.ivc_fraction", "versions"])
def test_required_fields_are_asked_for(bundle: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    part = content
    *before, last = field.split(".")
    for key in before:
        part = part[key]
    part.pop(last)
    (bundle / MANIFEST).write_text(json.dumps(content))
    assert f"is damaged ({field}: Field required): export the model again with ivc-export" in refusal(bundle, capsys)


def test_a_bundle_whose_weights_nobody_read_gets_their_hashes(bundle: Path) -> None:
    whole = json.loads((bundle / MANIFEST).read_text())
    content = json.loads((bundle / MANIFEST).read_text())
    for entry in content["weights"]:
        entry["sha256"] = None
    (bundle / MANIFEST).write_text(json.dumps(content))
    verify_files(Bundle.load(bundle))
    assert json.loads((bundle / MANIFEST).read_text()) == whole
