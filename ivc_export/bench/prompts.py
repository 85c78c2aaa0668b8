"""Makes pictures of noise and prompts of a given size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import PIL.Image

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.manifest import Manifest
from ivc_export.contract.preprocessing import PatchPreprocessing, Preprocessing, ViewPreprocessing
from ivc_export.errors import UserError
from ivc_export.families.pictures import Visual

LEAST_TEXT = 8
"""The fewest text tokens: the picture's marks, and some behind it that vote."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, with the image tokens, and the picture for them."""

    tokens: list[int]
    picture: Visual

    @property
    def visual(self) -> int:
        """Number of visual tokens."""
        return self.picture.grid.visual


def noise_prompt(bundle: Bundle, visual: int, text: int) -> Prompt:
    """Make a picture of noise with about `visual` tokens, and `text` random tokens around it.

    A picture's tokens fill a grid, so the grid closest to a square is taken. A family with tiles of fixed size takes
    the closest number of tiles.

    Raises:
        UserError: the bundle takes no such picture, or there is too little text.
    """
    m, generator = bundle.manifest, np.random.default_rng(0)
    if text < LEAST_TEXT:
        raise UserError(f"{text} text tokens are too few: give {LEAST_TEXT} or more")
    most = most_visual(m)
    if not 1 <= visual <= most:
        raise UserError(
            f"{visual} visual tokens are out of range: give 1 to {most}, which is what one picture can have in "
            "this bundle. For more, export with a larger --max-visual; preprocessor_config.json of the model may "
            "limit it, too"
        )
    width, height = picture_size(m.preprocessing, visual)
    noise = PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
    picture = families.preparation(m).picture(noise, m.tokens.image)
    before, behind = ([t] if t is not None else [] for t in (m.tokens.vision_start, m.tokens.vision_end))
    words = np.setdiff1d(np.arange(m.decoder.vocab_size), [m.tokens.image, *before, *behind, *m.tokens.stop])
    drawn = generator.choice(words, text - len(before) - len(behind)).tolist()
    half = len(drawn) // 2
    return Prompt([*drawn[:half], *before, *picture.tokens, *behind, *drawn[half:]], picture)


def most_visual(m: Manifest) -> int:
    """The most visual tokens that a picture has."""
    return min(m.max_visual, m.preprocessing.most_visual)


def picture_size(preprocessing: Preprocessing, visual: int) -> tuple[int, int]:
    """Width and height in pixels of a picture with about `visual` tokens, as close to a square as possible."""
    if isinstance(preprocessing, ViewPreprocessing):
        columns, rows = min(preprocessing.shapes, key=lambda shape: abs(preprocessing.visual(*shape) - visual))
        return columns * preprocessing.tile_pixels, rows * preprocessing.tile_pixels
    if isinstance(preprocessing, PatchPreprocessing):
        cells, side = visual, preprocessing.token_side
    else:
        cells, side = max(1, round(visual / preprocessing.tile_side**2) - 1), preprocessing.tile_pixels
    rows = max(1, math.isqrt(cells))
    return side * max(1, cells // rows), side * rows
