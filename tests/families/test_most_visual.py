"""The most visual tokens of a picture, as exports and engines take them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import MOST_VISUAL
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.tensorrt import build as engine
from ivc_export.tensorrt.build import build
from ivc_export.tensorrt.recipe import EngineRecipe
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

TILED = ["llava", "internvl", "internvl_chat"]


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("tiled")
    checkpoints = {name: make_checkpoint(folder / name, TINY[name]) for name in TILED}
    return {
        name: export(ExportRecipe(path, folder / f"{name}-b", max_visual=400)) for name, path in checkpoints.items()
    }


def test_exports_and_engines_share_their_most_visual_tokens(tmp_path: Path) -> None:
    most = MOST_VISUAL
    assert ExportRecipe("a", tmp_path, max_visual=most).max_visual == EngineRecipe(max_visual=most).max_visual
    with pytest.raises(UserError, match=f"max_visual {most + 1} is too large: give at most {most} visual tokens"):
        ExportRecipe("a", tmp_path, max_visual=most + 1)
    with pytest.raises(UserError, match=f"max-visual {most + 1} is out of range: give 1 to {most}"):
        EngineRecipe(max_visual=most + 1)


@pytest.mark.parametrize("name", TILED)
def test_engines_below_a_tile_are_refused_before_any_work(
    tiled: dict[str, Bundle], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "load_tensorrt", lambda target: pytest.fail("work began"))
    bundle = tiled[name]
    tile = bundle.manifest.graphs["vision"].outputs[0].shape[1]
    assert isinstance(tile, int)
    before = sorted(bundle.folder.rglob("*"))
    with pytest.raises(UserError, match=f"max-visual {tile - 1} is too small: .* at least {tile} visual tokens"):
        build(bundle, EngineRecipe(max_visual=tile - 1, opt_visual=1))
    assert sorted(bundle.folder.rglob("*")) == before
    engine.check_takes_a_picture(bundle, EngineRecipe(max_visual=tile, opt_visual=1))


def test_an_export_below_a_tile_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", TINY["llava"])
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="max_visual 12 is too small: a picture gives this model at least 64 visual"):
        export(ExportRecipe(checkpoint, tmp_path / "b", max_visual=12))
