"""A picture prepared for a family: its grid of visual tokens, and its pixels, scaled as Pillow does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image

from ivc_export.contract.preprocessing import Scaling
from ivc_export.errors import UserError

PIXELS = "pixel_values"
"""The vision graphs' input with pixels."""

STRIP = 32_000_000
"""How many pixels are resized at a time: 128 MB in Pillow."""

PIECE = 1 << 17
"""How many levels are looked up at a time, so that what is in between stays in the processor's cache."""

TILES_ASPECT_LIMIT = 3000
"""The largest aspect ratio of pictures that are cut into tiles. Beyond it they show nothing, and scaling them takes
unlimited memory."""


class Grid(NamedTuple):
    """Visual tokens: rows by columns, row-major, one frame after another along time.

    tile: if it is not 0, a frame's tokens come tile by tile, of tile x tile tokens each. Tiles, and the tokens within
        them, are row-major. Behind several tiles comes a thumbnail of the whole frame, of one tile.
    time: number of frames; 1 for a still picture.
    content: if it is not None, a frame is two views. The first is a thumbnail of tile x tile tokens, of which rows
        `content[0]` to `content[2]` (not included) and columns `content[1]` to `content[3]` show the picture. Then come
        rows x columns tokens. Both are row-major, with a separator behind each row, and one between them.
    interval: distance of frames in rotary positions of time, which are rounded down.
    """

    rows: int
    columns: int
    tile: int = 0
    time: int = 1
    content: tuple[int, int, int, int] | None = None
    interval: float = 1.0

    @property
    def frames(self) -> list[Grid]:
        """The grid of each frame."""
        return [self._replace(time=1)] * self.time

    @property
    def blocks(self) -> list[int]:
        """Numbers of visual tokens within which IVC tokens are chosen: each tile's, thumbnails included.

        Without tiles, these are each frame's. With two views, these are the first view's, the separator, and those of
        each row of the second view.
        """
        if self.content is not None:
            return [self.tile * (self.tile + 1), 1, *[self.columns + 1] * self.rows] * self.time
        if not self.tile:
            return [self.rows * self.columns] * self.time
        tiles = self.rows * self.columns // self.tile**2
        return [self.tile**2] * (tiles + (tiles > 1)) * self.time

    @property
    def visual(self) -> int:
        """Number of visual tokens."""
        return sum(self.blocks)

    @property
    def extents(self) -> dict[str, int]:
        """Visual tokens along each axis, for JSON."""
        return {"time": self.time, "rows": self.rows, "columns": self.columns}

    @property
    def batch(self) -> int:
        """How many rows along the first axis of vision's output contain them: its tiles, frames, or views as one."""
        return self.time if self.content is not None else len(self.blocks)

    @property
    def detail(self) -> npt.NDArray[np.int32]:
        """The visual token of each of `cells`, int32 [time * rows * columns]."""
        row, column = np.mgrid[: self.rows, : self.columns].reshape(2, -1)
        if self.content is not None:
            one = self.tile * (self.tile + 1) + 1 + row * (self.columns + 1) + column
        else:
            one = np.arange(self.rows * self.columns)
        frame = self.visual // self.time
        return np.concatenate([frame * number + one for number in range(self.time)]).astype(np.int32)

    @property
    def thumbnail(self) -> npt.NDArray[np.int32]:
        """The visual tokens of a frame's thumbnail, row-major, without separators. Empty if there is no thumbnail."""
        row, column = np.mgrid[: self.tile, : self.tile].reshape(2, -1)
        if self.content is not None:
            return (row * (self.tile + 1) + column).astype(np.int32)
        first = self.rows * self.columns
        return np.arange(first, self.visual // self.time, dtype=np.int32)

    @property
    def separators(self) -> npt.NDArray[np.int32]:
        """The visual tokens that show no place of the picture, but the end of a row or a view."""
        places = np.concatenate([self.thumbnail, self.detail]) if self.content is not None else np.arange(self.visual)
        return np.setdiff1d(np.arange(self.visual), places).astype(np.int32)

    @property
    def cells(self) -> npt.NDArray[np.int32]:
        """Row and column of each visual token of `detail`, int32 [time * rows * columns, 2]."""
        side = self.tile if self.tile and self.content is None else max(self.rows, self.columns)
        row, column = np.mgrid[: self.rows, : self.columns].reshape(2, -1)
        order = np.lexsort((column, row, column // side, row // side))
        return np.tile(np.stack([row[order], column[order]], axis=1), (self.time, 1)).astype(np.int32)


@dataclass(frozen=True)
class Levels:
    """Pixels of a picture or of frames before normalisation, in the order of pixel_values.

    values: uint8 [outer, 3, frames, inner]; frames is 1 if one frame stands for all `frames`. shape: of pixel_values,
    which has [outer, 3, frames, inner] in this order.
    """

    values: npt.NDArray[np.uint8]
    scaling: Scaling
    shape: tuple[int, ...]
    frames: int = 1

    @cached_property
    def pixel_values(self) -> npt.NDArray[np.float32]:
        """Normalised, as a vision graph takes them."""
        pixels = np.empty(self.shape, np.float32)
        self.write(pixels, self.table)
        return pixels

    @property
    def table(self) -> npt.NDArray[np.float32]:
        """Each level after normalisation, by channel, float32 [3, 256]."""
        mean, std = (np.array(of, np.float32)[:, None] for of in (self.scaling.mean, self.scaling.std))
        levels: npt.NDArray[np.float32] = np.arange(256, dtype=np.float32) * np.float32(self.scaling.rescale_factor)
        return (levels - mean) / std

    def write(self, pixels: npt.NDArray[Any], table: npt.NDArray[Any]) -> None:
        """Write pixel_values to a contiguous array of their shape. table: what to write for each level, [3, 256]."""
        outer, channels, _, inner = self.values.shape
        target = pixels.reshape(outer, channels, self.frames, inner)
        some = max(1, PIECE // (channels * inner))
        for start in range(0, outer, some):
            for channel, values in enumerate(self.values[start : start + some].transpose(1, 0, 2, 3)):
                target[start : start + some, channel] = table[channel].take(values, mode="clip")

    def split(self, count: int) -> list[Levels]:
        """The same in `count` parts along the first axis."""
        shape = (self.shape[0] // count, *self.shape[1:])
        return [replace(self, values=part, shape=shape) for part in np.split(self.values, count)]


class NormalisedInputs(Mapping[str, npt.NDArray[Any]]):
    """A vision graph's inputs by name. pixel_values are computed from `levels` when they are first read."""

    def __init__(self, levels: Levels, **others: npt.NDArray[Any]) -> None:
        self.levels, self._others = levels, others

    def of(self, levels: Levels) -> NormalisedInputs:
        """The same inputs with other pixels."""
        return NormalisedInputs(levels, **self._others)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.levels.pixel_values if name == PIXELS else self._others[name]

    def __iter__(self) -> Iterator[str]:
        return iter((PIXELS, *self._others))

    def __len__(self) -> int:
        return 1 + len(self._others)


@dataclass(frozen=True)
class Visual:
    """A picture, or frames of a video, prepared for the vision graph.

    inputs: the vision graph's inputs by name; floats in float32.
    grid: the grid of its visual tokens.
    token_id: the token that stands for each of them in the prompt.
    kind: "image" or "video", for sentences.
    seconds: time between the temporal patches of a video.
    before, more: for a video whose times are written, the text in front of this temporal patch, and how many patches of
        the same video follow.
    """

    inputs: Mapping[str, npt.NDArray[Any]]
    grid: Grid
    token_id: int
    kind: Literal["image", "video"] = "image"
    seconds: float = 0.0
    before: str = ""
    more: int = 0

    @property
    def levels(self) -> Levels | None:
        """The levels of its pixel_values, if they are known."""
        return self.inputs.levels if isinstance(self.inputs, NormalisedInputs) else None

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of one of its inputs. None if it has no input of that name."""
        if name == PIXELS and self.levels is not None:
            return self.levels.shape
        return self.inputs[name].shape if name in self.inputs else None

    @property
    def frames(self) -> list[Mapping[str, npt.NDArray[Any]]]:
        """The inputs of each frame alone. For a still picture these are all inputs."""
        if self.grid.time == 1:
            return [self.inputs]
        if isinstance(self.inputs, NormalisedInputs):
            return [self.inputs.of(levels) for levels in self.inputs.levels.split(self.grid.time)]
        pixels = np.split(self.inputs[PIXELS], self.grid.time)
        return [{**self.inputs, PIXELS: part} for part in pixels]

    @property
    def tokens(self) -> list[int]:
        """What stands for it in the prompt: token_id once for each visual token."""
        return [self.token_id] * self.grid.visual


def scaled_levels(
    image: PIL.Image.Image,
    width: int,
    height: int,
    scaling: Scaling,
    box: tuple[int, int, int, int] | None = None,
) -> npt.NDArray[np.uint8]:
    """A picture resized to width x height, uint8 [rows, columns, 3].

    box: left, top, right and bottom of the part of the resized picture that is kept; None keeps all of it.
    """
    left, top, right, bottom = box or (0, 0, width, height)
    kernel = PIL.Image.Resampling[scaling.resample.upper()]
    across = resized_rows(image.convert("RGB") if image.mode != "RGB" else image, width, left, right, kernel)
    turned = PIL.Image.fromarray(np.ascontiguousarray(across.transpose(1, 0, 2)))
    return resized_rows(turned, height, top, bottom, kernel).transpose(1, 0, 2)


def tile_levels(tiles: npt.NDArray[np.uint8], scaling: Scaling) -> Levels:
    """Tiles [tiles, 3, rows, columns] as an encoder of fixed size takes them."""
    return Levels(np.ascontiguousarray(tiles).reshape(len(tiles), 3, 1, -1), scaling, tiles.shape)


def resized_rows(
    image: PIL.Image.Image, width: int, first: int, end: int, kernel: PIL.Image.Resampling
) -> npt.NDArray[np.uint8]:
    """Resize each row of an RGB picture to `width` pixels, and keep those from `first` to `end`.

    Returns uint8 [image.height, end - first, 3]. Resizing the rows and then, transposed, the columns gives what Pillow
    up to 12 gives for both at once; from 13 on Pillow chooses the order by the shape. A strip of rows at a time limits
    the memory.
    """
    kept = np.empty((image.height, end - first, 3), np.uint8)
    rows = max(1, STRIP // max(image.width, width))
    for start in range(0, image.height, rows):
        strip = image.crop((0, start, image.width, min(start + rows, image.height)))
        wide = strip.resize((width, strip.height), kernel)
        kept[start : start + strip.height] = np.asarray(wide.crop((first, 0, end, strip.height)))
    return kept


def check_shape(width: int, height: int, limit: int) -> None:
    """Check that a picture's longer side has at most `limit` times the pixels of its shorter side.

    Raises:
        UserError: it has more.
    """
    if max(width, height) > limit * min(width, height):
        raise UserError(f"a picture of {width} x {height} is too elongated: crop it to an aspect ratio below {limit}")
