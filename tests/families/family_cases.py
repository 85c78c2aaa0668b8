"""What the tests need to know of each tiny model beyond its family's own file: one entry a model, and a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ivc_export import families
from ivc_export.families.family import Family
from ivc_export.families.pictures import Grid
from samples.tiny import TINY


@dataclass(frozen=True)
class FamilyCase:
    """The test data of one tiny model of a family.

    selection: stem of its selection goldens, under tests/goldens/selection/; None where another family's cover it.
    grid: the picture of such a golden.
    official: transformers' image processor, for a manifest's preprocessing.
    """

    selection: str | None
    grid: Callable[[Mapping[str, Any]], Grid]
    official: Callable[[Any], Any]


def tiles(p: Any) -> Any:
    """transformers' image processor for pictures in tiles."""
    size = {"height": p.tile_pixels, "width": p.tile_pixels}
    limits = {"min_patches": p.min_tiles, "max_patches": p.max_tiles}
    return GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, image_mean=p.mean, image_std=p.std, **limits)


class TwoViews:
    """The official processor's pictures, by Pillow's own ImageOps.pad."""

    def __init__(self, p: Any) -> None:
        self.p = p

    def __call__(self, image: PIL.Image.Image, return_tensors: str) -> dict[str, npt.NDArray[Any]]:
        side, best = self.p.tile_pixels, (-1, 0, (1, 1))
        for columns, rows in self.p.shapes:
            scale = min(columns * side / image.width, rows * side / image.height)
            area = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
            waste = columns * rows * side**2 - area
            if area > best[0] or (area == best[0] and waste < best[1]):
                best = (area, waste, (columns, rows))
        columns, rows = best[2]
        whole, large = (
            PIL.ImageOps.pad(image, (across * side, down * side), PIL.Image.Resampling.BICUBIC, (127, 127, 127))
            for across, down in ((1, 1), (columns, rows))
        )
        corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        tiles = [whole, *(large.crop((x, y, x + side, y + side)) for x, y in corners)]
        pixels = np.stack([np.asarray(tile, np.float32).transpose(2, 0, 1) / np.float32(255) for tile in tiles])
        return {"pixel_values": (pixels - np.float32(0.5)) / np.float32(0.5)}


def view_grid(golden: Mapping[str, Any]) -> Grid:
    """Two views, of which the golden says what shows filling alone."""
    columns, rows = map(int, golden["tiles"])
    shown = np.setdiff1d([15 * row + column for row in range(14) for column in range(14)], golden["padding"])
    row, column = shown // 15, shown % 15
    content = (int(row.min()), int(column.min()), int(row.max()) + 1, int(column.max()) + 1)
    return Grid(14 * rows, 14 * columns, 14, content=content)


CASES: dict[str, FamilyCase] = {
    "deepseek_vl_v2": FamilyCase(selection="deepseek", grid=view_grid, official=TwoViews),
    "qwen2_vl": FamilyCase(
        selection="qwen",
        grid=lambda golden: Grid(int(golden["grid"][0]), int(golden["grid"][1])),
        official=lambda p: Qwen2VLImageProcessorPil(min_pixels=p.min_pixels, max_pixels=p.max_pixels),
    ),
    "qwen2_5_vl": FamilyCase(  # the official code that made the goldens is this family's
        selection="qwen",
        grid=lambda golden: Grid(int(golden["grid"][0]), int(golden["grid"][1])),
        official=lambda p: Qwen2VLImageProcessorPil(min_pixels=p.min_pixels, max_pixels=p.max_pixels),
    ),
    "qwen3_vl": FamilyCase(
        selection=None,
        grid=lambda golden: Grid(0, 0),
        official=lambda p: Qwen2VLImageProcessorPil(
            min_pixels=p.min_pixels, max_pixels=p.max_pixels, patch_size=p.patch_size
        ),
    ),
    "llava": FamilyCase(
        selection="llava",
        grid=lambda golden: Grid(24, 24),
        official=lambda p: CLIPImageProcessorPil(
            size={"shortest_edge": p.tile_pixels}, crop_size={"height": p.tile_pixels, "width": p.tile_pixels}
        ),
    ),
    "internvl": FamilyCase(
        selection="internvl",
        grid=lambda golden: Grid(16 * int(golden["aspect_ratio"][1]), 16 * int(golden["aspect_ratio"][0]), 16),
        official=tiles,
    ),
    "internvl3_5": FamilyCase(selection=None, grid=lambda golden: Grid(0, 0), official=tiles),
    "internvl_chat": FamilyCase(selection=None, grid=lambda golden: Grid(0, 0), official=tiles),
}


def family_of(name: str) -> Family:
    """The family of a tiny model."""
    return families.of(TINY[name]["model_type"])


def changed(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a tiny model with changes, of its parts too."""
    tiny: Any = TINY[name]
    parts = {
        key: {**tiny[key], **value} if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in changes.items()
    }
    return {**tiny, **parts}
