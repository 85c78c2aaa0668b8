from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file, save_file

from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.recording import Recording
from ivc_export.contract.manifest import SelectionRule
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.backends import BACKENDS
from ivc_export.runtime.interface import Step
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.plan import Run
from ivc_export.runtime.tolerances import FLOAT16, TENSORRT_BFLOAT16, TENSORRT_FLOAT16
from ivc_export.selection.ivc_prune import IVC_PRIORITY, Selected, select
from ivc_export.verify.oracle import record
from ivc_export.verify.parity import (
    Comparison,
    Floats,
    check,
    close,
    compare,
    compare_choice,
    same_rows,
)
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from tests.conftest import Golden
from tests.runtime.rounding import RoundedSession


@pytest.mark.parametrize("ratio", [None, 1.0, 0.1])
def test_a_faithful_bundle_passes(golden: Golden, golden_bundle: Bundle, ratio: float | None) -> None:
    report = check(golden_bundle, golden.folder, ratio=ratio, steps=3)
    assert report.passed, [c for c in report.comparisons if not c.passed]
    names = [c.name for c in report.comparisons]
    for wanted in ("image_embeds", "token_score", "keep_index", "logits of prefill", "logits of decode step 3"):
        assert wanted in names
    assert [f"keys and values of layer {i}" in names for i in range(6)] == [True] * 6
    assert report.kept_tokens == {None: 60, 1.0: 120, 0.1: 12}[ratio]


@pytest.mark.parametrize(
    ("name", "first_to_fail"),
    [
        ("visual.blocks.1.attn.proj.weight", "image_embeds"),
        ("model.layers.1.mlp.down_proj.weight", "keys and values of layer 2"),
        ("model.layers.4.self_attn.o_proj.weight", "keys and values of layer 5"),
        ("lm_head.weight", "logits of prefill"),
    ],
)
def test_a_wrong_weight_is_found_where_it_is(
    golden: Golden, golden_bundle: Bundle, tmp_path: Path, name: str, first_to_fail: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(golden_bundle.folder, folder)
    path = folder / "weights" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * np.float32(1.001)
    save_file(tensors, path, metadata={"format": "pt"})
    report = check(Bundle.load(folder), golden.folder, steps=1)
    failed = [c.name for c in report.comparisons if not c.passed]
    assert failed and failed[0] == first_to_fail
    assert not report.passed


def test_another_model_is_refused(golden_bundle: Bundle, sample_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the decoder of .* differs from that of"):
        check(golden_bundle, sample_checkpoint)
    with pytest.raises(UserError, match=r"has no config.json"):
        check(golden_bundle, tmp_path)


def first_failure(comparisons: Sequence[Comparison]) -> str | None:
    return next((c.name for c in comparisons if not c.passed), None)


GREY = PIL.Image.new("RGB", (560, 560), (90, 120, 130))  # patches that differ by position alone: scores nearly tie


def half_precision(tmp_path: Path, seed: int, image: PIL.Image.Image, ratio: float = 0.5) -> tuple[Bundle, Recording]:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype="float16", seed=seed)
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    return bundle, record(bundle, checkpoint, make_prompt(bundle, image)[1], [image], ratio, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_bundles_that_are_widened_are_as_exact(dtype: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    report = check(export(ExportRecipe(checkpoint, tmp_path / "bundle")), checkpoint, steps=2)
    assert report.passed and report.dtype == "float32"


def test_weights_are_rounded_as_the_bundles_are(golden: Golden, tmp_path: Path) -> None:
    """A bundle converted to float16, against the float32 checkpoint: the same weights on both sides."""
    converted = tmp_path / "converted"
    shutil.copytree(golden.folder, converted)
    tensors = load_file(converted / "model.safetensors")
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    save_file(half, converted / "model.safetensors", metadata={"format": "pt"})
    bundle = export(ExportRecipe(converted, tmp_path / "bundle"))
    assert bundle.manifest.dtype == "float16"
    assert check(bundle, golden.folder, steps=1).passed


@pytest.mark.parametrize("seed", [1, 2])  # of those tried, 1 has ties of seeds and of rows, 2 of rows
def test_near_ties_in_float16_are_ties_and_hide_nothing(seed: int, tmp_path: Path) -> None:
    bundle, reference = half_precision(tmp_path, seed, GREY, ratio=0.3)
    report, step = compare(OnnxSession(bundle, dtype="float16"), reference, [GREY])
    assert report.passed, [c for c in report.comparisons if not c.passed]
    assert any("a tie" in c.note for c in report.comparisons)
    wanted = reference.of("prefill", "prefix")["keep_index"]
    assert not np.array_equal(step.prefix["keep_index"], wanted)
    np.testing.assert_array_equal(step.keep_index, wanted)  # the decoder ran on the reference's rows


@pytest.mark.parametrize(
    ("name", "first_to_fail"),
    [
        ("visual.blocks.1.attn.proj.weight", "image_embeds"),
        ("model.layers.1.self_attn.v_proj.weight", "keys and values of layer 1"),
        ("model.layers.2.mlp.down_proj.weight", "keys and values of layer 3"),
        ("lm_head.weight", "logits of prefill"),
    ],
)
def test_a_perturbed_layer_is_found_in_float16(name: str, first_to_fail: str, tmp_path: Path) -> None:
    image = draw_picture()
    bundle, reference = half_precision(tmp_path, 0, image)
    path = bundle.folder / "weights" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = (tensors[name].astype(np.float32) * 1.05).astype(np.float16)
    save_file(tensors, path, metadata={"format": "pt"})
    report, _ = compare(OnnxSession(bundle, dtype="float16"), reference, [image])
    assert first_failure(report.comparisons) == first_to_fail


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (1.5, False)])
def test_tensorrts_tolerances_in_bfloat16_hold_rounded_runs(
    scale: float, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rounding each value to bfloat16 costs is within them, and not within float16's; a wrong weight is not."""
    image = draw_picture()
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype="bfloat16")
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    reference = record(bundle, checkpoint, make_prompt(bundle, image)[1], [image], 0.5, 2)
    path = bundle.folder / "weights" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = (tensors[name].astype(np.float32) * scale).astype(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    wider = replace(BACKENDS["onnxruntime-cpu"], tolerances={"float32": TENSORRT_BFLOAT16})
    monkeypatch.setitem(BACKENDS, "onnxruntime-cpu", wider)
    report, _ = compare(RoundedSession(bundle), reference, [image])
    assert report.passed is passes
    if passes:
        errors = {c.name: c.error or 0.0 for c in report.comparisons}
        assert errors["image_embeds"] > TENSORRT_FLOAT16.errors["image_embeds"][0]
        assert errors["logits of prefill"] > FLOAT16.errors["logits"][0]
    else:
        assert first_failure(report.comparisons) == "keys and values of layer 3"


def test_bounds_are_told_from_what_was_measured() -> None:
    for one in (one for backend in BACKENDS.values() for one in backend.tolerances.values()):
        assert any("not measured" in why for _, why in one.errors.values()) is not one.measured
    wide, narrow = TENSORRT_BFLOAT16.errors, TENSORRT_FLOAT16.errors
    assert all(wide[kind][0] == pytest.approx(8 * bound) for kind, (bound, _) in narrow.items())


def test_a_recorded_run_of_another_model_is_refused(sample_bundle: Bundle, tmp_path: Path) -> None:
    _, reference = half_precision(tmp_path, 0, draw_picture())
    with pytest.raises(UserError, match="the stored run is not a run of"):
        compare(OnnxSession(sample_bundle), reference, [draw_picture()])
    with pytest.raises(UserError, match=r"cannot compute a float32 bundle in float16"):
        OnnxSession(sample_bundle, dtype="float16")


VISUAL, TEXT = 200, 20
RULE = SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=2)


def choice(values: Floats, seed: int = 0) -> tuple[Run, Selected]:
    """A run of 200 visual tokens and 20 rows of text, and what is chosen of it by `values`."""
    rows = np.arange(VISUAL + TEXT, dtype=np.int32)
    priority = np.zeros(VISUAL, np.float32)
    priority[np.random.default_rng(seed).permutation(VISUAL)[:30]] = IVC_PRIORITY - np.arange(30)
    parts = (rows[:VISUAL], rows[VISUAL:], rows[VISUAL + 2 :])
    run = Run(rows, (), rows[None, None], *parts, lambda: priority, 100, {}, len(rows))
    return run, select(values, priority, *parts, 100, RULE)


def compared(run: Run, found: Selected, own: Floats, values: Floats, wanted: Selected, tolerance: float) -> list[Any]:
    outputs = {"keep_index": found.keep_index, "token_score": found.token_score, "seed_index": found.seed_index}
    step = Step(run, (), outputs, {})
    return compare_choice(step, own, values, wanted, RULE, tolerance, "")


def random_values(seed: int) -> tuple[Floats, Floats]:
    """Values of which many nearly tie, and the same with the noise of a reduced precision."""
    generator = np.random.default_rng(seed)
    clusters = generator.standard_normal((2, 12, 16), np.float32)
    values = clusters[:, generator.integers(0, 12, VISUAL + TEXT)]
    values = values + np.float32(1e-3) * generator.standard_normal(values.shape, np.float32)
    return values, values + np.float32(1e-3) * generator.standard_normal(values.shape, np.float32)


def test_every_flip_that_noise_causes_is_a_tie() -> None:
    """And no case is without its comparison: 200 cases, of which most flip rows and many flip seeds."""
    flips = {"seed_index": 0, "keep_index": 0}
    for seed in range(200):
        values, noisy = random_values(seed)
        run, wanted = choice(values, seed)
        _, found = choice(noisy, seed)
        comparisons = compared(run, found, noisy, values, wanted, tolerance=1e-4)
        assert all(c.passed for c in comparisons), (seed, comparisons)
        for c in comparisons:
            if "a tie" in c.note:
                flips[c.name] += 1
    assert min(flips.values()) > 50, flips


def test_a_wrong_choice_is_no_tie() -> None:
    values, noisy = random_values(0)
    run, wanted = choice(values)
    _, found = choice(noisy)
    score, free = wanted.token_score, run.ivc_priority == 0
    kept = np.isin(run.visual_index, found.keep_index)
    worst_out = int(np.flatnonzero(~kept & free)[score[~kept & free].argmin()])
    best_in = next(int(t) for t in np.argsort(-score) if kept[t] and free[t] and t not in found.seed_index)
    ivc = int(np.flatnonzero(kept & ~free)[0])
    for left in (best_in, ivc):
        keep = np.sort(np.append(found.keep_index[found.keep_index != left], worst_out)).astype(np.int32)
        wrong = Selected(keep, found.token_score, found.seed_index)
        assert first_failure(compared(run, wrong, noisy, values, wanted, 1e-4)) == "keep_index"
    seeds = np.array([worst_out, found.seed_index[1]], np.int32)
    wrong = Selected(found.keep_index, found.token_score, seeds)
    assert first_failure(compared(run, wrong, noisy, values, wanted, 1e-4)) == "seed_index"
    wrong = Selected(found.keep_index, found.token_score, np.repeat(found.seed_index[:1], 2))
    assert first_failure(compared(run, wrong, noisy, values, wanted, 1e-4)) == "seed_index"
    scaled = Selected(found.keep_index, found.token_score * np.float32(1.05), found.seed_index)
    assert first_failure(compared(run, scaled, noisy, values, wanted, 1e-4)) == "token_score"
    wrong = Selected(found.keep_index, found.token_score, found.seed_index[:1])
    assert first_failure(compared(run, wrong, noisy, values, wanted, 1e-4)) == "seed_index"


def test_rows_exchanged_within_the_noise_fail_on_the_graphs_own_values() -> None:
    """A wrong index that reduced precision would excuse is found where nothing is rounded."""
    values, noisy = random_values(3)
    run, wanted = choice(values)
    _, found = choice(noisy)
    kept = np.isin(run.visual_index, found.keep_index)
    free = (run.ivc_priority == 0) & ~np.isin(np.arange(VISUAL), found.seed_index)
    last = int(np.flatnonzero(kept & free)[found.token_score[kept & free].argmin()])
    first = int(np.flatnonzero(~kept & free)[found.token_score[~kept & free].argmax()])
    assert found.token_score[last] > found.token_score[first]
    keep = np.sort(np.append(found.keep_index[found.keep_index != last], first)).astype(np.int32)
    wrong = Selected(keep, found.token_score, found.seed_index)
    assert first_failure(compared(run, wrong, noisy, values, wanted, 1e-4)) is None
    assert first_failure(compared(run, wrong, noisy, noisy, found, 1e-6)) == "keep_index"


ROWS = np.array([0, 1, 3, 5, 8, 9], np.int32)  # of 10; 0 and 9 are text
VISUAL_ROWS = np.arange(1, 9, dtype=np.int32)
SCORE = np.array([0.9, 0.1, 0.8, 0.5, 0.7, 0.5 + 1e-7, 0.2, 0.6], np.float32)  # rows 4 and 6 nearly tie


FREE = np.arange(8, dtype=np.int32)


@pytest.mark.parametrize(
    ("found", "error", "passed"),
    [
        ([0, 1, 3, 5, 8, 9], 0.0, True),
        ([0, 1, 3, 4, 5, 9], 1e-7, False),  # 8 left for 4: 0.1 apart
        ([0, 1, 3, 5, 9], 1e-7, False),  # one row too few
        ([0, 1, 3, 8, 5, 9], 1e-7, False),  # not ascending
        ([0, 1, 3, 5, 5, 8], 1e-7, False),  # a row twice, a text row lost
        ([1, 2, 3, 5, 8, 9], 1e-7, False),  # a text row exchanged
    ],
)
def test_rows_are_the_same_or_tie(found: list[int], error: float, passed: bool) -> None:
    assert same_rows("", np.array(found, np.int32), ROWS, VISUAL_ROWS, SCORE, FREE, error).passed is passed


def test_rows_within_the_measured_error_are_called_a_tie() -> None:
    wanted, found = np.array([0, 1, 3, 4, 9], np.int32), np.array([0, 1, 3, 6, 9], np.int32)
    assert not same_rows("", found, wanted, VISUAL_ROWS, SCORE, FREE, 1e-9).passed
    comparison = same_rows("", found, wanted, VISUAL_ROWS, SCORE, FREE, 1e-7)
    assert comparison.passed and "a tie" in comparison.note
    fixed = FREE[FREE != 3]  # row 4 is a seed or an IVC token, whatever its score
    assert not same_rows("", found, wanted, VISUAL_ROWS, SCORE, fixed, 1e-7).passed


def test_tensors_of_another_shape_fail_without_a_number() -> None:
    comparison = close("logits", 1e-4, [(np.ones(3), np.ones(4))])
    assert (comparison.error, comparison.passed) == (None, False)
    assert not close("logits", 1e-4, [(np.array([np.nan]), np.ones(1))]).passed
