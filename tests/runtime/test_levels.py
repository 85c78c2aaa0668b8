"""Pictures that go up as levels, and embeddings that are gathered where the graphs run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.dtypes import FLOATS
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import NormalisedInputs, Visual
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.stream import Place
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import TINY


@pytest.fixture(scope="module", params=families.names())
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    return export(ExportRecipe(make_checkpoint(folder / "checkpoint", TINY[request.param]), folder / "bundle"))


def test_levels_become_the_pixels_that_the_host_makes(bundle: Bundle) -> None:
    """Also of pictures whose levels nobody knows."""
    _, _, picture = make_prompt(bundle, draw_picture())
    assert isinstance(picture, Visual)
    levels = picture.levels
    assert levels is not None and levels.values.dtype == np.uint8
    pixels = picture.inputs["pixel_values"]
    assert levels.values.size * levels.frames // levels.values.shape[2] == pixels.size
    assert picture.shape_of("pixel_values") == pixels.shape and picture.shape_of("nothing") is None
    session = FusedSession(bundle, "cpu")
    for given in (picture, replace(picture, inputs={**picture.inputs})):
        values = session.picture_inputs(given)
        found = {name: value.numpy() for name, value in values.items() if not isinstance(value, Place)}
        assert found.keys() == picture.inputs.keys()
        np.testing.assert_allclose(found["pixel_values"], pixels, rtol=3e-7, atol=3e-7)


def test_pixels_are_levels_normalised(bundle: Bundle) -> None:
    """Bit by bit, and in 16 bits what the float32 values round to."""
    _, _, picture = make_prompt(bundle, draw_picture())
    assert isinstance(picture, Visual) and picture.levels is not None
    levels, scaling = picture.levels, picture.levels.scaling
    mean, std = (np.array(of, np.float32)[:, None, None] for of in (scaling.mean, scaling.std))
    wanted = (levels.values.astype(np.float32) * np.float32(scaling.rescale_factor) - mean) / std
    wanted = wanted.repeat(levels.frames // wanted.shape[2], axis=2).reshape(levels.shape)
    assert np.array_equal(levels.pixel_values, wanted) and len(np.unique(wanted)) > 3
    halves = np.empty(levels.shape, np.float16)
    levels.write(halves, levels.table.astype(np.float16))
    assert np.array_equal(halves, wanted.astype(np.float16))


def test_pixels_are_made_when_they_are_looked_at() -> None:
    calls: list[int] = []

    class Watched:
        @property
        def pixel_values(self) -> str:
            calls.append(1)
            return "pixels"

    inputs = NormalisedInputs(Watched(), other=np.zeros(1))  # type: ignore[arg-type]
    assert [*inputs] == ["pixel_values", "other"] and len(inputs) == 2 and not calls
    assert inputs["pixel_values"] == "pixels" and calls == [1]


def test_rows_of_text_are_the_tables(bundle: Bundle) -> None:
    """Gathered from lm_head's weight where that is the table, and else uploaded."""
    session = FusedSession(bundle, "cpu")
    tokens = np.array([5, 9, 3, 3, 3, 7, 1], np.int32)
    text = np.array([0, 1, 5, 6], np.int32)
    for rows in (text, np.arange(7, dtype=np.int32)):
        found = session.embedded(tokens, rows).numpy()
        np.testing.assert_array_equal(found[0, rows], bundle.embed(tokens)[rows])


def test_stored_embeddings_are_the_same_values(bundle: Bundle) -> None:
    tokens, kinds = (
        np.array([5, 9, 3, 3], np.int32),
        [FLOATS[name].numpy for name in ("float32", "float16", "bfloat16")],
    )
    wanted = bundle.embed(tokens)
    found = [bundle.embed(tokens, kind) for kind in kinds]
    own = FLOATS[bundle.manifest.embedding.floats].numpy
    assert [one.dtype for one in found] == [own if kind == own else np.float32 for kind in kinds]
    for one in found:
        np.testing.assert_array_equal(one.astype(np.float32), wanted)


def test_lm_heads_weight_is_the_table_only_where_it_is(tmp_path: Path) -> None:
    for tied in (True, False):
        config = {**TINY["qwen2_vl"], "tie_word_embeddings": tied}
        folder = tmp_path / str(tied)
        bundle = export(ExportRecipe(make_checkpoint(folder / "checkpoint", config), folder / "bundle"))
        inputs = {value.name for value in FusedSession(bundle, "cpu")._sessions["rows"].get_inputs()}
        assert inputs == ({"tokens"} if tied else {"rows"})
