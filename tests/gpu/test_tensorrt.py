"""Engines built and run by TensorRT against onnxruntime on the CPU. Needs TensorRT and a GPU; takes minutes.

python -m pytest -m gpu tests/gpu/test_tensorrt.py

IVC_PLUGIN names our plugin's library, without which the native graphs alone are built. IVC_TACTIC_SOURCES is as
ivc-build's --tactic-sources.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.dtypes import FloatName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.tensorrt.records import TENSORRT
from ivc_export.runtime.tensorrt.session import TensorrtSession
from ivc_export.tensorrt.build import build
from ivc_export.tensorrt.recipe import EngineRecipe
from samples.make_sample import make_checkpoint
from samples.tiny import wide
from tests.conftest import Golden, make_overflowing_checkpoint, random_picture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="TensorRT is not installed"),
]
PLUGIN = os.environ.get("IVC_PLUGIN")
SOURCES = os.environ.get("IVC_TACTIC_SOURCES")
PROMPT = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]


def engines(
    bundle: Bundle, dtype: FloatName, plugin: bool, max_visual: int = 160, max_new: int = 64
) -> TensorrtSession:
    recipe = EngineRecipe(
        dtype=dtype,
        max_visual=max_visual,
        max_text=64,
        max_new=max_new,
        opt_visual=max_visual // 3,
        opt_text=32,
        plugin=Path(PLUGIN) if plugin and PLUGIN else None,
        tactic_sources=tuple(SOURCES.split(",")) if SOURCES else None,
    )
    build(bundle, recipe)
    return TensorrtSession(bundle, plugin=recipe.plugin)


def old() -> bool:
    """Whether TensorRT is too old for bfloat16."""
    found = importlib.util.find_spec("tensorrt") is not None
    return found and int(importlib.import_module("tensorrt").__version__.split(".")[0]) < 10


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float16",
        pytest.param("bfloat16", marks=pytest.mark.skipif("old()", reason="this TensorRT has no bfloat16")),
    ],
)
@pytest.mark.parametrize(
    "plugin", [False, pytest.param(True, marks=pytest.mark.skipif(not PLUGIN, reason="IVC_PLUGIN is not set"))]
)
def test_conversations_follow_onnxruntime(
    golden: Golden, golden_bundle: Bundle, tmp_path: Path, dtype: FloatName, plugin: bool
) -> None:
    """A picture, decode steps, a turn without and one with two pictures, and decode steps, over one cache."""
    bundle = Bundle.load(shutil.copytree(golden_bundle.folder, tmp_path / "bundle"))
    found, wanted = engines(bundle, dtype, plugin).converse(0.4), HostConversation(OnnxSession(bundle), 0.4)
    two = [1, 500, *[503] * 12, 501, 3, 500, *[503] * 20, 501, 7, 8]
    pictures = [random_picture(Grid(3, 4), 1), random_picture(Grid(4, 5), 2)]
    tolerance = {kind: bound for kind, (bound, _) in TENSORRT.tolerances[dtype].errors.items()}
    turns = [
        (golden.tokens, [golden.picture]),
        ([5], []),
        ([6], []),
        ([9, 8, 7], []),
        (two, pictures),
        ([5], []),
        ([6], []),
    ]
    for tokens, shown in turns:
        reference = wanted.run(tokens, shown)
        step = found.run(tokens, shown, reference.keep_index)
        if dtype == "float32":
            np.testing.assert_array_equal(step.prefix["keep_index"], reference.keep_index)
        score = np.abs(step.prefix["token_score"] - reference.prefix["token_score"]).max()
        assert score < tolerance["token_score"]
        assert np.abs(step.logits - reference.logits).max() < tolerance["logits"] * max(
            1, np.abs(reference.logits).max()
        )


@pytest.mark.skipif(not PLUGIN, reason="IVC_PLUGIN is not set")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava", "internvl"])
def test_the_plugins_attention_follows_onnxruntime(family: str, dtype: FloatName, tmp_path: Path) -> None:
    """Two conversations on one set of engines, a turn of each at a time; heads are of sizes that the kernels take."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", wide(family, heads=4))
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", max_visual=160))
    noise = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    picture = families.preparation(bundle.manifest).picture(PIL.Image.fromarray(noise), bundle.manifest.tokens.image)
    shown = [1, 2, *picture.tokens, 7, 8, 9]
    session = engines(bundle, dtype, plugin=True, max_visual=picture.grid.visual, max_new=640)
    tolerance = {kind: bound for kind, (bound, _) in TENSORRT.tolerances[dtype].errors.items()}
    pairs = [(session.converse(r), HostConversation(OnnxSession(bundle), r)) for r in (0.4, 0.7)]
    for found, _ in pairs:
        assert found.cache.written
    for tokens, pictures in [
        (shown, [picture]),
        ([5], []),
        ([6], []),
        ([7], []),
        ([9, 8], []),
        (shown, [picture]),
        ([5], []),
    ]:
        for found, wanted in pairs:
            reference = wanted.run(tokens, pictures)
            step = found.run(tokens, pictures, reference.keep_index)
            if dtype == "float32":
                np.testing.assert_array_equal(step.prefix["keep_index"], reference.keep_index)
            largest = max(1, np.abs(reference.logits).max())
            assert np.abs(step.logits - reference.logits).max() < tolerance["logits"] * largest


def test_activations_beyond_float16(tmp_path: Path) -> None:
    bundle = export(ExportRecipe(make_overflowing_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"))
    picture = random_picture(Grid(4, 5), 0)
    wanted = HostConversation(OnnxSession(bundle)).run(PROMPT, [picture])
    assert np.abs(wanted.prefix["hidden_states"]).max() > 65504
    session = engines(bundle, "float16", plugin=False)
    step = session.converse().run(PROMPT, [picture], wanted.keep_index)
    bound, _ = TENSORRT.tolerances["float16"].errors["logits"]
    assert np.abs(step.logits - wanted.logits).max() < bound * np.abs(wanted.logits).max()
