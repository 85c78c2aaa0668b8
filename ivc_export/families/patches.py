"""Cuts pictures of any size into patches, for several families."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from ivc_export.contract.preprocessing import PatchPreprocessing, Preprocessing, VideoPreprocessing
from ivc_export.errors import UserError
from ivc_export.families.encoder import Preparation, of_kind
from ivc_export.families.pictures import Grid, Levels, NormalisedInputs, Visual, check_shape, scaled_levels
from ivc_export.families.videos import Clip

ASPECT_LIMIT = 200  # as the official image processor


@dataclass(frozen=True)
class PatchPictures(Preparation):
    """Pictures of any size, cut into patches."""

    preprocessing: PatchPreprocessing

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> PatchPictures:
        """Make it from these settings.

        Raises:
            UserError: they are of another kind.
        """
        return cls(of_kind(PatchPreprocessing, preprocessing))

    def picture(self, image: PIL.Image.Image, token_id: int) -> Visual:
        """Scale, normalise and cut a picture into patches, merge blocks of patches row-major.

        Source: Qwen2VLImageProcessor in transformers; a still picture repeats over the temporal patch.
        """
        p = self.preprocessing
        height, width = resized(image.height, image.width, p.token_side, p.min_pixels, p.max_pixels)
        patches = frame_patches(scaled_levels(image, width, height, p), p)
        levels = Levels(patches, p, (1, len(patches), p.patch_dim), p.temporal_patch_size)
        inputs = NormalisedInputs(levels, patch_position=patch_positions(height, width, p))
        return Visual(inputs, Grid(height // p.token_side, width // p.token_side), token_id)

    def video(self, clip: Clip, settings: VideoPreprocessing, most: int) -> list[Visual]:
        """Scale all frames to one size, and cut each temporal patch of frames into patches. The last frame repeats to
        fill one.

        The result is one Visual of all frames, or, if their times are written, one Visual for each temporal patch.
        Source: Qwen2VLVideoProcessor and Qwen3VLVideoProcessor in transformers.
        """
        p, seconds = self.preprocessing, clip.seconds
        deep = p.temporal_patch_size
        height, width = frame_size(clip, settings, p, most)
        patches = [frame_patches(scaled_levels(frame, width, height, settings), p) for frame in clip.frames]
        patches += patches[-1:] * (-len(patches) % deep)
        times = [(seconds[i] + seconds[min(i + deep, len(seconds)) - 1]) / 2 for i in range(0, len(seconds), deep)]
        pixels = np.stack(patches, axis=2)  # [patches, channel, frame, 1, pixels of a patch]
        pixels = pixels.reshape(len(pixels), 3, len(times), deep, -1).transpose(2, 0, 1, 3, 4)
        position, grid = patch_positions(height, width, p), Grid(height // p.token_side, width // p.token_side)
        apart = deep / clip.rate
        if not settings.timestamps:
            rate = settings.positions_per_second
            step = 1.0 if rate is None else float(np.float32(rate) * np.float32(apart))
            inputs = video_inputs(pixels, settings, position)
            whole = grid._replace(time=len(times), interval=step)
            return [Visual(inputs, whole, settings.token, "video", 0.0 if rate is None else apart)]
        return [
            Visual(
                video_inputs(pixels[i : i + 1], settings, position),
                grid,
                settings.token,
                "video",
                before=f"<{times[i]:.1f} seconds>",
                more=len(times) - 1 - i,
            )
            for i in range(len(times))
        ]

    def stock_inputs(self, visual: Visual) -> dict[str, npt.NDArray[Any]]:
        """Patches, and the grid of patches (time, rows, columns); of a video also the seconds between frames."""
        grid, side, pixels = visual.grid, self.preprocessing.merge_size, visual.inputs["pixel_values"]
        pixels = pixels.reshape(-1, pixels.shape[-1])
        shape = np.array([(grid.time, side * grid.rows, side * grid.columns)])
        if visual.kind == "image":
            return {"pixel_values": pixels, "image_grid_thw": shape}
        seconds = {"second_per_grid_ts": np.array([visual.seconds], np.float32)} if visual.seconds else {}
        return {"pixel_values_videos": pixels, "video_grid_thw": shape, **seconds}


def video_inputs(
    pixels: npt.NDArray[np.uint8], settings: VideoPreprocessing, position: npt.NDArray[np.int32]
) -> NormalisedInputs:
    """Temporal patches' levels [times, patches, 3, frames, pixels of a patch], and the places of patches."""
    times, patches, _, deep, size = pixels.shape
    values = np.ascontiguousarray(pixels).reshape(times * patches, 3, deep, size)
    return NormalisedInputs(Levels(values, settings, (times, patches, 3 * deep * size), deep), patch_position=position)


def frame_patches(pixels: npt.NDArray[np.uint8], p: PatchPreprocessing) -> npt.NDArray[np.uint8]:
    """A picture's pixels [height, width, 3] as patches, merge blocks of them row-major, [patches, 3, 1, pixels]."""
    height, width, _ = pixels.shape
    blocks = (height // p.token_side, p.merge_size, p.patch_size, width // p.token_side, p.merge_size, p.patch_size)
    # from [row block, row, y, column block, column, x, channel]
    # to [row block, column block, row, column, channel, y, x]
    turned = pixels.reshape(*blocks, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return turned.reshape(-1, 3, 1, p.patch_size**2)


def patch_positions(height: int, width: int, p: PatchPreprocessing) -> npt.NDArray[np.int32]:
    """Row and column of each patch of a picture of this size, in the order of frame_patches, int32 [patches, 2]."""
    rows, columns = height // p.patch_size, width // p.patch_size
    blocks = (rows // p.merge_size, p.merge_size, columns // p.merge_size, p.merge_size)
    position = np.mgrid[:rows, :columns].reshape(2, *blocks).transpose(1, 3, 2, 4, 0)
    return position.reshape(-1, 2).astype(np.int32)


def resized(
    height: int, width: int, unit: int, min_pixels: int, max_pixels: int, frames: int = 1, counted: int = 1
) -> tuple[int, int]:
    """The size to which a picture is scaled: multiples of `unit`, within min_pixels and max_pixels.

    frames: how many share the pixels. counted: how many of them count, if their number is rounded. Source: smart_resize
    of Qwen2VLImageProcessor and Qwen3VLVideoProcessor in transformers.
    """
    check_shape(width, height, ASPECT_LIMIT)
    rows, columns = round(height / unit), round(width / unit)
    if counted * rows * columns * unit**2 > max_pixels:
        return shrunk(height, width, unit, max_pixels, frames)
    if counted * rows * columns * unit**2 < min_pixels:
        scale = math.sqrt(min_pixels / (frames * height * width))
        rows, columns = (math.ceil(side * scale / unit) for side in (height, width))
    return rows * unit, columns * unit


def shrunk(height: int, width: int, unit: int, max_pixels: int, frames: int = 1) -> tuple[int, int]:
    """The largest size of about this shape with at most max_pixels in all frames, in multiples of `unit`, at least
    one."""
    scale = math.sqrt(frames * height * width / max_pixels)
    rows, columns = (max(1, math.floor(side / scale / unit)) for side in (height, width))
    return rows * unit, columns * unit


def frame_size(clip: Clip, settings: VideoPreprocessing, p: PatchPreprocessing, most: int) -> tuple[int, int]:
    """The size to which a video's frames are scaled: the official size, or a smaller one if that gives too many tokens.

    most: visual tokens of the video.

    Raises:
        UserError: no size gives so few, or the video is too elongated.
    """
    (width, height), count, deep, unit = clip.size, len(clip.indices), p.temporal_patch_size, p.token_side
    frames, counted = 1, 1
    if settings.pixels_of == "video":
        frames, counted = count, max(deep, round(count / deep) * deep)
        if min(height, width) < unit:
            scale = unit / min(height, width)
            height, width = int(height * scale), int(width * scale)
    size = resized(height, width, unit, settings.min_pixels, settings.max_pixels, frames, counted)
    patches = -(-count // deep)
    each = max(1, most // patches)
    if size[0] * size[1] > each * unit**2:
        size = shrunk(height, width, unit, each * unit**2)
    visual = patches * (size[0] // unit) * (size[1] // unit)
    if visual > most:
        raise UserError(
            f"{clip.name} gives at least {visual:,} visual tokens in {count} frames of {width} x {height}, but this "
            f"bundle takes {most:,}: take fewer frames (--max-frames, --fps), or export with a larger --max-visual"
        )
    return size
