from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ivc_export.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.parity import check, close, same_rows
from tests.conftest import Golden


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
    with pytest.raises(UserError, match="has another decoder than"):
        check(golden_bundle, sample_checkpoint)
    with pytest.raises(UserError, match=r"has no config.json"):
        check(golden_bundle, tmp_path)


ROWS = np.array([0, 1, 3, 5, 8, 9], np.int32)  # of 10; 0 and 9 are text
VISUAL = np.arange(1, 9, dtype=np.int32)
SCORE = np.array([0.9, 0.1, 0.8, 0.5, 0.7, 0.5 + 1e-7, 0.2, 0.6], np.float32)  # rows 4 and 6 nearly tie


@pytest.mark.parametrize(
    ("found", "error", "passed"),
    [
        ([0, 1, 3, 5, 8, 9], 0.0, True),
        ([0, 1, 3, 4, 5, 9], 1e-7, False),  # 8 left for 4: 0.1 apart
        ([0, 1, 3, 4, 5, 9], 0.3, False),  # a wrong score excuses nothing
        ([0, 1, 3, 5, 9], 1e-7, False),  # one row too few
        ([0, 1, 3, 8, 5, 9], 1e-7, False),  # not ascending
        ([0, 1, 3, 5, 5, 8], 1e-7, False),  # a row twice, a text row lost
        ([1, 2, 3, 5, 8, 9], 1e-7, False),  # a text row exchanged
    ],
)
def test_rows_are_the_same_or_tie(found: list[int], error: float, passed: bool) -> None:
    assert same_rows(np.array(found, np.int32), ROWS, VISUAL, SCORE, error).passed is passed


def test_rows_within_the_measured_error_are_called_a_tie() -> None:
    wanted, found = np.array([0, 1, 3, 4, 9], np.int32), np.array([0, 1, 3, 6, 9], np.int32)
    assert not same_rows(found, wanted, VISUAL, SCORE, 1e-9).passed
    comparison = same_rows(found, wanted, VISUAL, SCORE, 1e-7)
    assert comparison.passed and "a tie" in comparison.note


def test_tensors_of_another_shape_fail_without_a_number() -> None:
    comparison = close("logits", "logits", [(np.ones(3), torch.ones(4))])
    assert (comparison.error, comparison.passed) == (None, False)
    assert not close("logits", "logits", [(np.array([np.nan]), torch.ones(1))]).passed
