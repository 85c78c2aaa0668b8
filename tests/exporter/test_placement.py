"""Weight files on their way into a bundle: copied, linked, converted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.formats.weight_format import DerivedTensor
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.errors import UserError
from ivc_export.exporter import placement
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from samples.make_sample import make_checkpoint
from tests.conftest import random_picture


def logits(bundle: Bundle) -> Any:
    tokens = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]
    return HostConversation(OnnxSession(bundle)).run(tokens, [random_picture(Grid(4, 5), 0)]).logits


def weights(bundle: Bundle) -> dict[str, Any]:
    return {
        name: array for file in bundle.manifest.weights for name, array in load_file(bundle.folder / file.file).items()
    }


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", list(FLOATS))
def test_a_conversion_is_the_same_as_a_checkpoint_saved_in_that_dtype(
    tmp_path: Path, stored: FloatName, dtype: FloatName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_CHUNK", 4096)  # pieces smaller than tensors
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype=stored)
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype=dtype))
    wanted = np.dtype(dtype)
    found, source = weights(bundle), load_file(checkpoint / "model.safetensors")
    assert set(found) == set(source)
    for name, array in source.items():
        assert found[name].dtype == wanted
        np.testing.assert_array_equal(found[name].astype(np.float32), array.astype(wanted).astype(np.float32))
    assert bundle.manifest.dtype == dtype == bundle.manifest.embedding.dtype
    (file,) = bundle.manifest.weights
    assert file.sha256 == hashlib.sha256((bundle.folder / file.file).read_bytes()).hexdigest()
    save_file({name: array.astype(wanted) for name, array in source.items()}, checkpoint / "model.safetensors")
    np.testing.assert_array_equal(logits(bundle), logits(export(ExportRecipe(checkpoint, tmp_path / "other"))))


def test_tensors_that_are_no_floats_and_metadata_stay(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.int64), "b": np.ones((2, 3), np.float32), "c": np.zeros(0, np.float32)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = placement_tensors(tmp_path / "x.safetensors")
    (conversion,) = placement.plan_conversions(stored, "bfloat16").values()
    (tmp_path / "y.safetensors").write_bytes(b"".join(placement.convert(conversion)))
    assert (tmp_path / "y.safetensors").stat().st_size == conversion.size
    found = load_file(tmp_path / "y.safetensors")
    np.testing.assert_array_equal(found["a"], arrays["a"])
    assert found["b"].dtype == found["c"].dtype == ml_dtypes.bfloat16 and found["b"].shape == (2, 3)
    with safe_open(tmp_path / "y.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert len(conversion.header) % 8 == 0


def test_stacked_tensors_of_two_files_are_cast_and_written_into_the_first(tmp_path: Path) -> None:
    experts = {f"experts.{i}": np.random.default_rng(i).standard_normal((3, 5), np.float32) for i in range(4)}
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, names in zip(files, (("experts.2", "experts.0"), ("experts.1", "experts.3")), strict=True):
        save_file({name: experts[name] for name in names} | {file.stem: np.ones(3, np.uint8)}, file)
    stored = [tensor for file in files for tensor in placement_tensors(file)]
    sources = tuple(sorted((t for t in stored if t.name in experts), key=lambda t: t.name))
    one = DerivedTensor("experts", "float32", (4, 3, 5), sources, lambda: (x for s in sources for x in s.rows(40)))
    assert {x.shape for x in one.pieces()} == {(2, 5), (1, 5)}  # two rows at a time, and what is left
    found = {}
    for file, conversion in placement.plan_conversions(stored, "float16", [one]).items():
        (tmp_path / "new.safetensors").write_bytes(b"".join(placement.convert(conversion)))
        found[file.stem] = load_file(tmp_path / "new.safetensors")
    assert {name: {*tensors} for name, tensors in found.items()} == {"a": {"a", "experts"}, "b": {"b"}}
    np.testing.assert_array_equal(found["a"]["experts"], np.stack([*experts.values()]).astype(np.float16))
    assert placement.plan_conversions(stored, None) == {}


def test_values_of_derived_tensors_must_fit_their_dtype(tmp_path: Path) -> None:
    save_file({"x": np.full((2, 2), 1e6, np.float32)}, tmp_path / "a.safetensors")
    (stored,) = placement_tensors(tmp_path / "a.safetensors")
    one = DerivedTensor("y", "float32", (2, 2), (stored,), stored.rows)
    (conversion,) = placement.plan_conversions([stored], "float16", [one]).values()
    with pytest.raises(UserError, match=r"y in a.safetensors has values up to 1e\+06"):
        list(placement.convert(conversion))


def placement_tensors(file: Path) -> Any:
    from ivc_export.checkpoint.folder import read_index

    return read_index(file).values()


def test_files_in_the_right_dtype_are_copied_as_they_are(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype="float16")
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype="float16"))
    copied = (bundle.folder / "weights" / "model.safetensors").read_bytes()
    assert copied == (checkpoint / "model.safetensors").read_bytes()


def test_mixed_dtypes_need_a_choice(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {"model.norm.weight": np.ones(64, np.float16)}, checkpoint / "model.safetensors")
    with pytest.raises(
        UserError,
        match=r"model.norm.weight .* is float16, but other tensors are float32: convert them all with --dtype",
    ):
        export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    assert export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype="bfloat16")).manifest.dtype == "bfloat16"


@pytest.mark.parametrize("value", [65519.0, 65520.0, -1e6])
def test_a_value_beyond_float16_is_named(tmp_path: Path, value: float) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, checkpoint / "model.safetensors")
    if value == 65519.0:
        assert (
            weights(export(ExportRecipe(checkpoint, tmp_path / "b", dtype="float16")))["model.norm.weight"][3] == 65504
        )
        return
    with pytest.raises(UserError, match=r"model.norm.weight in model.safetensors has values up to .* --dtype bfloat16"):
        export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype="bfloat16"))


def cache_of_links(checkpoint: Path, cache: Path, hash_names: bool = True) -> Path:
    """The checkpoint as the hub's cache holds it: blobs, and a snapshot of symbolic links to them."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / ("c" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        name = digest if hash_names and file.suffix == ".safetensors" else digest[:40]
        (blobs / name).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / name)
    return snapshot


@pytest.mark.parametrize("in_cache", [True, False])
def test_linked_weights_are_the_file_itself(sample_checkpoint: Path, tmp_path: Path, in_cache: bool) -> None:
    checkpoint = cache_of_links(sample_checkpoint, tmp_path / "cache") if in_cache else sample_checkpoint
    stored = checkpoint / "model.safetensors"
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", weights="link"))
    placed = bundle.folder / "weights" / "model.safetensors"
    assert placed.samefile(stored) and not placed.is_symlink()
    (file,) = bundle.manifest.weights
    assert file.sha256 == (hashlib.sha256(stored.read_bytes()).hexdigest() if in_cache else None)
    np.testing.assert_array_equal(
        logits(bundle), logits(export(ExportRecipe(checkpoint, tmp_path / "copied", weights="copy")))
    )
    assert not (tmp_path / "copied" / "weights" / "model.safetensors").is_symlink()


def test_what_cannot_be_linked_says_what_to_do(
    sample_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="another dtype cannot be linked"):
        export(ExportRecipe(sample_checkpoint, tmp_path / "bundle", weights="link", dtype="float16"))
    for number, sentence in ((18, "another file system"), (1, "another user's"), (31, "Too many links")):

        def refuse(source: Path, target: Path, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(
            UserError, match=f"cannot be linked .{'.*' if number != 31 else ''}{sentence}.*--weights copy"
        ):
            export(ExportRecipe(sample_checkpoint, tmp_path / "bundle", weights="link"))
    assert list(tmp_path.iterdir()) == []


def test_native_graphs_are_recorded_and_run(sample_checkpoint: Path, sample_bundle: Bundle, tmp_path: Path) -> None:
    bundle = export(ExportRecipe(sample_checkpoint, tmp_path / "bundle", lowering="native"))
    assert (bundle.manifest.lowering, sample_bundle.manifest.lowering) == ("native", "portable")
    assert {node.domain for node in ir.load(bundle.folder / "prefix.onnx").graph.all_nodes()} == {""}
    np.testing.assert_array_equal(logits(bundle), logits(sample_bundle))
