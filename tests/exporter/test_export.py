from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from samples.make_sample import make_checkpoint
from tests.conftest import Golden


def files(folder: Path) -> dict[str, str]:
    """Relative path to hash of every file below `folder`."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_a_bundle_has_what_a_runtime_needs(sample_bundle: Bundle, sample_checkpoint: Path) -> None:
    assert set(files(sample_bundle.folder)) == {
        "manifest.json", "vision.onnx", "prefix.onnx", "decoder.onnx", "weights/model.safetensors", "config.json",
        "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json",
    }  # fmt: skip
    (weights,) = sample_bundle.manifest.weights
    stored = (sample_checkpoint / "model.safetensors").read_bytes()
    assert weights.sha256 == hashlib.sha256(stored).hexdigest()
    assert (sample_bundle.folder / weights.file).read_bytes() == stored
    assert sample_bundle.manifest.tokens.stop == (507, 505)


def test_a_folder_without_processor_files_exports(golden_bundle: Bundle) -> None:
    assert golden_bundle.missing_processor_files() == ["tokenizer.json"]


def test_the_same_export_gives_the_same_bytes(sample_bundle: Bundle, sample_checkpoint: Path, tmp_path: Path) -> None:
    assert files(export(ExportRecipe(sample_checkpoint, tmp_path / "again")).folder) == files(sample_bundle.folder)


def test_a_failed_export_leaves_nothing_and_harms_no_older_bundle(sample_checkpoint: Path, tmp_path: Path) -> None:
    def fail(stage: str, done: int, total: int) -> None:
        if stage == "weights":
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        export(ExportRecipe(sample_checkpoint, tmp_path / "bundle"), fail)
    assert list(tmp_path.iterdir()) == []
    before = files(export(ExportRecipe(sample_checkpoint, tmp_path / "bundle", ratio=0.4)).folder)
    with pytest.raises(RuntimeError):
        export(ExportRecipe(sample_checkpoint, tmp_path / "bundle", force=True), fail)
    assert files(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_replaces_a_bundle_and_nothing_else(sample_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    export(ExportRecipe(sample_checkpoint, target))
    with pytest.raises(UserError, match="--force"):
        export(ExportRecipe(sample_checkpoint, target))
    assert export(ExportRecipe(sample_checkpoint, target, ratio=0.25, force=True)).manifest.default_ratio == 0.25
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a bundle"):
        export(ExportRecipe(sample_checkpoint, precious, force=True))
    assert (precious / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    export(ExportRecipe(sample_checkpoint, tmp_path / "empty"))


def test_force_replaces_what_a_link_points_to(sample_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(ExportRecipe(sample_checkpoint, tmp_path / "link"))
    export(ExportRecipe(sample_checkpoint, tmp_path / "link", ratio=0.25, force=True))
    assert (tmp_path / "link").is_symlink()
    assert Bundle.load(tmp_path / "real").manifest.default_ratio == 0.25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ratio": 0.0}, "ratio 0.0 is out of range"),
        ({"ratio": 1.5}, "ratio 1.5 is out of range"),
        ({"ratio": float("nan")}, "ratio nan is out of range"),
        ({"layer": 0}, "this model has 6 layers, so --layer takes 1 to 5 .its default is 3"),
        ({"layer": 6}, "layer 6 is out of range"),
        ({"max_visual": 1}, "at least 4"),
        ({"model": Path("/nowhere")}, "/nowhere is neither a folder nor an alias"),
        ({"output": Path("/proc/nowhere")}, "nothing can be written beside /proc/nowhere"),
    ],
)
def test_recipes_that_cannot_be(golden: Golden, tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    arguments = {"model": golden.folder, "output": tmp_path / "bundle"} | changes
    with pytest.raises(UserError, match=sentence):
        export(ExportRecipe(**arguments))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_max_visual_caps_pictures(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c")
    assert (
        export(ExportRecipe(checkpoint, tmp_path / "b", max_visual=100)).manifest.preprocessing.model_dump()[
            "max_pixels"
        ]
        == 78400
    )
    (checkpoint / "preprocessor_config.json").write_text('{"min_pixels": 200000, "max_pixels": 900000}')
    preprocessing = export(
        ExportRecipe(checkpoint, tmp_path / "c2", max_visual=100)
    ).manifest.preprocessing.model_dump()
    assert (preprocessing["min_pixels"], preprocessing["max_pixels"]) == (78400, 78400)
