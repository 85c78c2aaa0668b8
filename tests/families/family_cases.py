"""What the tests need to know of each tiny model beyond its family's own file: one entry a model, and a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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


CASES: dict[str, FamilyCase] = {
    "qwen2_vl": FamilyCase(
        selection="qwen",
        grid=lambda golden: Grid(*map(int, golden["grid"])),
        official=lambda p: Qwen2VLImageProcessorPil(min_pixels=p.min_pixels, max_pixels=p.max_pixels),
    ),
    "qwen2_5_vl": FamilyCase(  # the official code that made the goldens is this family's
        selection="qwen",
        grid=lambda golden: Grid(*map(int, golden["grid"])),
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
