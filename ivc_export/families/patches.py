"""Pictures at their own size, cut into patches, as several families take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from ivc_export.contract.preprocessing import PatchPreprocessing, Preprocessing
from ivc_export.families.encoder import Preparation, of_kind
from ivc_export.families.pictures import Grid, Visual, check_shape, scaled_pixels

ASPECT_LIMIT = 200  # as the official image processor


@dataclass(frozen=True)
class PatchPictures(Preparation):
    """Pictures at their own size, cut into patches."""

    preprocessing: PatchPreprocessing

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> PatchPictures:
        """By these settings.

        Raises:
            UserError: they are not of patches.
        """
        return cls(of_kind(PatchPreprocessing, preprocessing))

    def picture(self, image: PIL.Image.Image, token_id: int) -> Visual:
        """Scale, normalise and cut a picture into patches, merge blocks of patches row-major.

        Source: Qwen2VLImageProcessor in transformers; a still picture repeats over the temporal patch.
        """
        p = self.preprocessing
        height, width = resized(image.height, image.width, p)
        pixels = scaled_pixels(image, width, height, p)
        rows, columns = height // p.patch_size, width // p.patch_size
        blocks = (rows // p.merge_size, p.merge_size, columns // p.merge_size, p.merge_size)
        # from [row block, row, y, column block, column, x, channel]
        # to [row block, column block, row, column, channel, y, x]
        patches = pixels.reshape(*blocks[:2], p.patch_size, *blocks[2:], p.patch_size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        patches = patches.reshape(rows * columns, 3, 1, -1).repeat(p.temporal_patch_size, axis=2)
        position = np.mgrid[:rows, :columns].reshape(2, *blocks).transpose(1, 3, 2, 4, 0)
        inputs = {
            "pixel_values": patches.reshape(1, rows * columns, -1),
            "patch_position": position.reshape(-1, 2).astype(np.int32),
        }
        return Visual(inputs, Grid(blocks[0], blocks[2]), token_id)

    def stock_inputs(self, visual: Visual) -> dict[str, npt.NDArray[Any]]:
        """Patches, and the grid of patches (time, rows, columns)."""
        grid, side, pixels = visual.grid, self.preprocessing.merge_size, visual.inputs["pixel_values"]
        return {
            "pixel_values": pixels.reshape(-1, pixels.shape[-1]),
            "image_grid_thw": np.array([(grid.time, side * grid.rows, side * grid.columns)]),
        }


def resized(height: int, width: int, p: PatchPreprocessing) -> tuple[int, int]:
    """The size that a picture is scaled to: multiples of patch x merge, within min_pixels and max_pixels.

    Source: smart_resize of Qwen2VLImageProcessor in transformers.
    """
    check_shape(width, height, ASPECT_LIMIT)
    unit = p.token_side
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > p.max_pixels:
        scale = math.sqrt(height * width / p.max_pixels)
        rows, columns = (max(1, math.floor(side / scale / unit)) for side in (height, width))
    elif rows * columns * unit**2 < p.min_pixels:
        scale = math.sqrt(p.min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / unit) for side in (height, width))
    return rows * unit, columns * unit
