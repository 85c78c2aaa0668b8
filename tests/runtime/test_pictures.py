from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ivc_export import cli, families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.preprocessing import FixedPreprocessing, Preprocessing
from ivc_export.errors import UserError
from ivc_export.families import pictures
from ivc_export.runtime.pictures import open_picture
from samples.tiny import TINY
from tests.conftest import PIXEL_TOLERANCE, rows_first
from tests.families.family_cases import CASES


def noise(size: tuple[int, int], channels: int = 3) -> PIL.Image.Image:
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return PIL.Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


@pytest.fixture(params=["llava", "internvl"])
def tiled(request: pytest.FixtureRequest) -> tuple[str, Preprocessing]:
    family = families.of(request.param)
    return family.model_type, family.read(TINY[family.model_type], None).preprocessing


@pytest.mark.parametrize("size", [(900, 3), (3, 900), (1801, 7), (5, 1299)], ids=str)
def test_strips_have_the_official_processors_pixels(
    tiled: tuple[str, Preprocessing], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a strip is resized in one piece or in many."""
    name, preprocessing = tiled
    image = noise(size)
    with monkeypatch.context() as patched:
        patched.setattr(PIL.Image.Image, "resize", rows_first)
        wanted = CASES[name].official(preprocessing)(image, return_tensors="np")["pixel_values"]
    for strip in (pictures.STRIP, 50_000):
        monkeypatch.setattr(pictures, "STRIP", strip)
        found = families.of(name).pictures(preprocessing).picture(image, 0).inputs["pixel_values"]
        assert np.abs(found - wanted).max() < PIXEL_TOLERANCE


@pytest.mark.parametrize("size", [(9000, 3), (3, 1500)], ids=str)
def test_a_strip_takes_little_memory(
    tiled: tuple[str, Preprocessing], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No picture of more than 32 million pixels is made on the way, though 1,008,000 x 336 are in LLaVA's."""
    name, preprocessing = tiled
    assert isinstance(preprocessing, FixedPreprocessing)
    preprocessing = preprocessing.model_copy(update={"tile_pixels": 336})
    made: list[int] = []
    whole = PIL.Image.Image.resize

    def resize(image: PIL.Image.Image, size: tuple[int, int], *rest: Any) -> PIL.Image.Image:
        made.append(size[0] * size[1])
        return whole(image, size, *rest)

    monkeypatch.setattr(PIL.Image.Image, "resize", resize)
    families.of(name).pictures(preprocessing).picture(noise(size), 0)
    assert 336**2 <= max(made) <= 32_000_000


@pytest.mark.parametrize("size", [(3001, 1), (1, 9000)], ids=str)
def test_what_only_shows_a_line_is_refused(tiled: tuple[str, Preprocessing], size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"is too elongated: crop it to an aspect ratio below 3000"):
        families.of(tiled[0]).pictures(tiled[1]).picture(noise(size), 0)


@pytest.mark.parametrize(("name", "other"), [("qwen2_vl", "llava"), ("llava", "qwen2_vl"), ("internvl", "qwen2_5_vl")])
def test_settings_of_another_kind_are_refused(name: str, other: str) -> None:
    settings = families.of(other).read(TINY[other], None).preprocessing
    with pytest.raises(UserError, match=rf"its preprocessing\.kind is '{settings.kind}': export the model again"):
        families.of(name).pictures(settings)


@pytest.mark.parametrize("name", families.names())
def test_tokens_of_a_picture_stand_for_its_grid(name: str) -> None:
    visual = families.of(name).read(TINY[name], None).encoder.pictures.picture(noise((300, 200)), 7)
    assert visual.tokens == [7] * visual.grid.visual
    assert visual.grid.extents["time"] == 1


TRANSPARENT = noise((40, 30)).convert("P")
TRANSPARENT.info["transparency"] = 3

COLOURS: list[tuple[str, PIL.Image.Image, str]] = [
    ("png", noise((40, 30), 1), ""),
    ("png", noise((40, 30), 2), ""),
    ("png", noise((40, 30), 4), ""),
    ("png", TRANSPARENT, ""),
    ("png", noise((40, 30)).convert("1"), ""),
    ("png", PIL.Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "Values above 255 become white"),
    ("jpg", noise((40, 30)).convert("CMYK"), "is CMYK. It is converted to RGB without its colour profile"),
    ("tif", noise((40, 30)).convert("CMYK"), "is CMYK"),
]


@pytest.mark.parametrize(("ending", "image", "told"), COLOURS, ids=[f"{i.mode}.{e}" for e, i, _ in COLOURS])
def test_colours_become_pillows_rgb(ending: str, image: PIL.Image.Image, told: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{ending}"
    image.save(path)
    with PIL.Image.open(path) as stored:
        assert stored.mode == image.mode
        wanted = np.asarray(stored.convert("RGB"))
    for source in (path, PIL.Image.open(path)):
        notes: list[str] = []
        found = open_picture(source, notes.append)
        np.testing.assert_array_equal(np.asarray(found), wanted)
        assert (told in notes[0] if told else not notes) and len(notes) == bool(told)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_turned_whoever_opened_it(tmp_path: Path, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    noise((60, 30)).save(tmp_path / "turned.png", exif=exif)
    with PIL.Image.open(tmp_path / "turned.png") as theirs:
        wanted = np.asarray(PIL.ImageOps.exif_transpose(theirs))
        np.testing.assert_array_equal(np.asarray(open_picture(theirs)), wanted)
        assert theirs.size == (60, 30)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "turned.png")), wanted)


def test_an_upright_rgb_picture_is_not_copied() -> None:
    image = noise((40, 30))
    assert open_picture(image) is image


def test_the_command_says_that_a_picture_was_cmyk(
    sample_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise((60, 60)).convert("CMYK").save(tmp_path / "print.jpg")
    arguments = [str(sample_bundle.folder), "--image", str(tmp_path / "print.jpg"), "--prompt", "Where?"]
    assert cli.ivc_run([*arguments, "--max-tokens", "1"]) == 0
    assert capsys.readouterr().err.count("print.jpg is CMYK") == 1
