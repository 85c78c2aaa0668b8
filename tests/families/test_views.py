"""Pictures in two views: which tokens of the first show the picture."""

from __future__ import annotations

import pytest

from ivc_export.contract.preprocessing import ViewPreprocessing
from ivc_export.families.views import content


@pytest.mark.parametrize(
    ("pixels", "size", "wanted"),
    [
        (384, (384, 384), (0, 0, 14, 14)),
        (384, (800, 400), (3, 0, 11, 14)),
        (113, (113, 113), (0, 0, 4, 4)),  # its last pixel fills no patch, and no token shows it
        (113, (226, 113), (1, 0, 3, 4)),
    ],
)
def test_only_tokens_that_there_are_show_a_picture(
    pixels: int, size: tuple[int, int], wanted: tuple[int, int, int, int]
) -> None:
    side = -(-(pixels // 14) // 2)
    level = (0.5, 0.5, 0.5)
    p = ViewPreprocessing(
        tile_pixels=pixels,
        tile_side=side,
        token_side=28,
        shapes=((1, 1),),
        fill=127,
        rescale_factor=1,
        mean=level,
        std=level,
    )
    assert content(*size, p) == wanted
