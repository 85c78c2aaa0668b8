"""Rounding floats to 4 and 8 bits without data: the search, what a bundle then holds, and what runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.formats.nbits import Packing, dequantise, pack_blocks, pack_values
from ivc_export.checkpoint.formats.rounding import find_grid, importance_of, round_values
from ivc_export.cli.export import command
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import Size, estimate_bundle, estimate_recipe
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe, Quantisation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.verify.parity import check
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.checkpoint.quantised import LAYOUTS, write
from tests.checkpoint.test_toy_format import answers, largest
from tests.conftest import LOGIT_TOLERANCE

Wide = npt.NDArray[np.float32]
EVERYTHING = {"lm_head": "int8", "embeddings": "int8", "vision": "int8"}
QUANTISATIONS = {
    "int4": Quantisation("int4", 32),
    "int4 with zero points": Quantisation("int4", 64, asymmetric=True),
    "int8": Quantisation("int8"),
    "everything": Quantisation("int4", 32, lm_head="int8", embeddings="int8", vision="int8"),
    "lm_head alone": Quantisation(lm_head="int8"),
    "two copies of embeddings": Quantisation("int4", 32, lm_head="int4", embeddings="int8"),
}


def rounded(
    values: Wide, packing: Packing, norm: Wide | None = None, search: bool = True, dtype: str = "float16"
) -> Wide:
    """What the values become."""
    features = values.shape[1]
    grid = find_grid(values, packing, importance_of(norm, features), dtype, search)
    points = pack_values((grid.points + packing.middle).astype(np.uint8), packing.bits) if packing.zero_points else None
    packed = pack_blocks(round_values(values, packing, grid), packing)
    return dequantise(packed, grid.scales, points, packing.bits, features)


@pytest.mark.parametrize("features", [16, 200, 256, 528])
@pytest.mark.parametrize("packing", [Packing(4, 32), Packing(4, 128), Packing(4, 64, True), Packing(8, 128)])
def test_the_search_leaves_less_output_error_than_rounding_to_nearest(packing: Packing, features: int) -> None:
    generator = np.random.default_rng(features)
    values = generator.standard_t(5, (64, features)).astype(np.float32)
    norm = generator.uniform(0.2, 3, features).astype(np.float32)
    rows = generator.standard_normal((512, features)).astype(np.float32) * norm
    plain, plainly, searched = (
        np.linalg.norm(rows @ (rounded(values, packing, of, search) - values).T)
        for of, search in ((None, False), (None, True), (norm, True))
    )
    assert searched < plainly < plain if packing.bits == 4 else searched < 1.02 * plain


@pytest.mark.parametrize("packing", [Packing(4, 32), Packing(4, 32, True), Packing(8, 32), Packing(8, 32, True)])
def test_no_block_is_worse_for_the_search(packing: Packing) -> None:
    """Where scales stay as they were found; and zeros stay zeros."""
    values = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    values[0], values[1], values[2] = 0, np.abs(values[1]), -np.abs(values[2])
    found, plain = (rounded(values, packing, None, search, "float32") for search in (True, False))
    assert not found[0].any() and np.isfinite(found).all()
    error, before = (np.square(one - values).reshape(-1, 32).sum(1) for one in (found, plain))
    assert (error <= 1.0001 * before).all() and error.sum() < before.sum()


CASES = [(name, True) for name in QUANTISATIONS] + [("everything", False)]
"""Quantisations, and whether embeddings are tied."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("floats")
    return {
        tied: make_checkpoint(folder / str(tied), TINY["qwen2_vl"] | {"tie_word_embeddings": tied}, dtype="float16")
        for tied in (True, False)
    }


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_a_rounded_bundle_computes_with_its_own_values(
    checkpoints: dict[bool, Path], tmp_path: Path, name: str, tied: bool
) -> None:
    """PyTorch multiplies by what the bundle holds, so errors are those of float32; and by no other weights."""
    checkpoint = checkpoints[tied]
    bundle = export(ExportRecipe(checkpoint, tmp_path / "b", layer=2, quantisation=QUANTISATIONS[name]))
    report = check(bundle, checkpoint, steps=1)
    assert report.passed, [c for c in report.comparisons if not c.passed]
    wanted = answers(OnnxSession(bundle, threads=1))
    assert largest(answers(FusedSession(bundle, "cpu")), wanted) < LOGIT_TOLERANCE
    assert largest(answers(OnnxSession(export(ExportRecipe(checkpoint, tmp_path / "c", layer=2)), 1)), wanted) > 1e-3


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_the_dry_run_knows_what_a_rounded_bundle_takes(
    checkpoints: dict[bool, Path], tmp_path: Path, name: str, tied: bool
) -> None:
    checkpoint = checkpoints[tied]
    recipe = ExportRecipe(checkpoint, tmp_path / "b", quantisation=QUANTISATIONS[name])
    said, found = estimate_recipe(recipe, [Size(56, 56)]), export(recipe)
    held = sum(tensor.nbytes for tensor in load_file(found.folder / "weights" / "model.safetensors").values())
    bundle = estimate_bundle(found, [Size(56, 56)])
    plain = estimate_recipe(ExportRecipe(checkpoint, tmp_path / "c"), [Size(56, 56)])
    assert said.weight_bytes == bundle.weight_bytes == held
    assert name == "lm_head alone" or held < plain.weight_bytes  # which may be a second copy, of rows filled up
    assert said.parameters == bundle.parameters == plain.parameters
    assert said.quantisation == recipe.quantisation.said and found.notes[-1] == said.quantisation


def test_tied_embeddings_in_8_bits_are_one_copy(checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints[True]
    bundle = export(ExportRecipe(checkpoint, tmp_path / "b", quantisation=QUANTISATIONS["everything"]))
    names = [n for n in load_file(bundle.folder / "weights" / "model.safetensors") if "embed" in n and "patch" not in n]
    assert sorted(names) == [f"model.embed_tokens.weight.{part}" for part in ("packed", "scales")]
    table = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
    tokens = np.array([0, 7, len(table) - 1], np.int32)
    step = np.abs(table[tokens]).max() / 127
    assert 0 < np.abs(bundle.embed(tokens) - table[tokens]).max() <= 0.6 * step


def test_an_embedding_that_says_what_it_is_not_is_refused(checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints[True]
    bundle = export(
        ExportRecipe(checkpoint, tmp_path / "b", quantisation=Quantisation(lm_head="int8", embeddings="int8"))
    )
    path = bundle.folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"embedding": content["embedding"] | {"packed": None}}))
    with pytest.raises(UserError, match=r"embedding\.packed does not fit|embedding table is not within"):
        Bundle.load(bundle.folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "group": ({"group_size": 48}, "weights cannot be quantised in groups of 48: give one of 32, 64, 128"),
    "format": ({"weights": "int3"}, "weights cannot be quantised to 'int3': give one of int4, int8"),
    "embeddings": ({"embeddings": "int4"}, "embeddings cannot be quantised to 'int4': give one of int8"),
    "zero points": ({"asymmetric": True}, "zero points are for quantised decoder layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rounded_so_is_refused(name: str) -> None:
    options, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        Quantisation(**options)


COMMANDS: dict[str, tuple[str, str]] = {
    "native": ("--weight-format int4 --lowering native", "these graphs hold only floats: leave out --lowering native"),
    "linked": ("--weight-format int4 --weights link", "cannot be linked: leave out --weights link"),
    "asym": ("--asym", "--asym works only with quantised decoder layers: give --weight-format int4 or int8 as well"),
    "tied": ("--embeddings int8", "give --lm-head int8 as well, so that both use one copy in 8 bits"),
}


@pytest.mark.parametrize("dry", ["--dry-run", "--quiet"])
@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, name: str, dry: str) -> None:
    options, sentence = COMMANDS[name]
    make_checkpoint(tmp_path / "c", TINY["qwen2_vl"] | {"tie_word_embeddings": True})
    arguments = ["--model", str(tmp_path / "c"), "--output", str(tmp_path / "b"), *options.split(), dry]
    with pytest.raises(UserError, match=sentence):
        command(arguments)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_layers_that_are_quantised_already_are_not_rounded(tmp_path: Path, dry: bool) -> None:
    stored, _ = write(make_checkpoint(tmp_path / "plain"), tmp_path, LAYOUTS["AWQ"])
    recipe = ExportRecipe(stored, tmp_path / "b", quantisation=Quantisation("int4"))
    with pytest.raises(UserError, match=r"decoder layers are already quantised \(awq\): leave out --weight-format"):
        _ = estimate_recipe(recipe, [Size(56, 56)]) if dry else export(recipe)


def test_lm_head_of_a_quantised_checkpoint_can_be_rounded(tmp_path: Path) -> None:
    stored, _ = write(make_checkpoint(tmp_path / "plain"), tmp_path, LAYOUTS["AWQ"])
    bundle = export(ExportRecipe(stored, tmp_path / "b", layer=2, quantisation=Quantisation(lm_head="int8")))
    assert {one.format for one in bundle.manifest.weight_formats.values()} == {"int4", "int8"}
    assert check(bundle, stored, steps=1).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    from safetensors.numpy import save_file

    checkpoint = make_checkpoint(tmp_path / "c")
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = bad
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight .* infinite or NaN"):
        export(ExportRecipe(checkpoint, tmp_path / "b", quantisation=Quantisation("int4")))
    assert not (tmp_path / "b").exists()
