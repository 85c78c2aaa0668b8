from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ivc_export.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.parity import check
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
    with pytest.raises(UserError, match="has 4 layers, the bundle 6"):
        check(golden_bundle, sample_checkpoint)
    with pytest.raises(UserError, match="transformers cannot load"):
        check(golden_bundle, tmp_path)
