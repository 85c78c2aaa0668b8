"""What a family of LVLMs is, and how to find one: the file's name is the `model_type` of config.json."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import PIL.Image

from ivc_export import contract
from ivc_export.errors import UserError
from ivc_export.graph.builder import Graph

STRIP = 32_000_000
"""Pixels that are resized at a time: 128 MB in Pillow."""

TILES_ASPECT_LIMIT = 3000
"""Of pictures that are cut into tiles. Beyond it they show nothing, and take memory without bounds to scale."""


class Grid(NamedTuple):
    """A picture's visual tokens: rows by columns, row-major.

    tile: where it is not 0, tokens come tile by tile, of tile x tile tokens each, tiles and the tokens within them
    row-major; behind several tiles comes a thumbnail of the whole picture, of one tile.
    """

    rows: int
    columns: int
    tile: int = 0

    @property
    def blocks(self) -> list[int]:
        """Number of visual tokens of each tile, thumbnail included; without tiles, of the picture."""
        if not self.tile:
            return [self.rows * self.columns]
        tiles = self.rows * self.columns // self.tile**2
        return [self.tile**2] * (tiles + (tiles > 1))

    @property
    def visual(self) -> int:
        """Number of visual tokens."""
        return sum(self.blocks)

    @property
    def cells(self) -> npt.NDArray[np.int32]:
        """Row and column of each visual token but the thumbnail's, in their order, int32 [rows * columns, 2]."""
        side = self.tile or max(self.rows, self.columns)
        row, column = np.mgrid[: self.rows, : self.columns].reshape(2, -1)
        order = np.lexsort((column, row, column // side, row // side))
        return np.stack([row[order], column[order]], axis=1).astype(np.int32)


@dataclass(frozen=True)
class Picture:
    """A picture, ready for the vision graph.

    inputs: the vision graph's inputs by name, for one frame; floats in float32.
    """

    inputs: Mapping[str, npt.NDArray[Any]]
    grid: Grid


class TokenTexts(NamedTuple):
    """Texts of the tokens that show a picture: the image token, and those before and behind a picture's, if any."""

    image: str
    start: str | None = None
    end: str | None = None


@dataclass(frozen=True)
class Model:
    """One checkpoint's configuration, digested by its family. `vision` is the family's own record.

    image_token, vision_start_token, vision_end_token: ids that config.json states; None where the tokenizer does, or
    where the family has no such token.
    """

    decoder: contract.DecoderSizes
    rotary: contract.RotarySizes
    selection: contract.SelectionRule
    preprocessing: contract.Preprocessing
    image_token: int | None
    vision_start_token: int | None
    vision_end_token: int | None
    vision: Any

    def graph_info(
        self, name: contract.GraphName, dtype: contract.FloatName, selection_layer: int
    ) -> contract.GraphInfo:
        """Inputs and outputs of graph `name` for this model."""
        sizes = (self.decoder, self.rotary, self.selection, self.preprocessing)
        return contract.graph_info(name, dtype, *sizes, selection_layer)


@dataclass(frozen=True)
class DefaultLayer:
    """The selection layer taken when the user names none; `calibrated` if it was published or measured."""

    layer: int
    calibrated: bool


@dataclass(frozen=True)
class StockLayout:
    """A layout that transformers knows instead of the family's own.

    config: config.json, and the image token's id, to config.json as transformers would have it.
    tensors: config.json, a tensor's name and the tensor (NumPy's or torch's) to those that transformers would have, by
    name.
    """

    config: Callable[[Mapping[str, Any], int], dict[str, Any]]
    tensors: Callable[[Mapping[str, Any], str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """Everything particular to one family.

    read: config.json, and the image processor's configuration if there is one, to a Model.
    canonical_name: a tensor's name in the checkpoint to ours (`model.*`, `visual.*`, `lm_head.weight`).
    stored_name: the inverse, as transformers 4.4x names it, or the family's own code.
    vision: builds the encoder between the vision graph's inputs and `image_embeds`, which it returns.
    default_layer: the selection layer for a model of these sizes.
    picture: an RGB picture to the vision graph's inputs.
    positions: rotary positions of text (its number of tokens) and pictures in order, from the first free position on;
        returns int32 [axes, rows] and the next free position.
    stock_inputs: a Picture as transformers' get_image_features takes it, by name, pictures along the first axis.
    chat_template: of the family, for checkpoints that come with none, or with one that cannot show pictures.
    chat_template_of: config.json to that template, where it depends on it.
    token_texts: of the tokens that show a picture.
    template_marks: whether chat templates write the tokens before and behind a picture's image tokens.
    hub: aliases that --model takes, to hub ids.
    tiny: config.json of a model small enough for tests.
    tiny_tokens: special tokens of that model by id.
    default_ratio: fraction of visual tokens kept when the user names none.
    stock_layout: for checkpoints that transformers cannot load as they are.
    unused: beginnings of (canonical) names of tensors that checkpoints hold and no graph takes.
    foreign: of a config.json of the same models in a layout that is not read, the sentence that says so; else None.
    """

    model_type: str
    read: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Model]
    canonical_name: Callable[[str], str]
    stored_name: Callable[[str], str]
    vision: Callable[[Graph, Model], ir.Value]
    default_layer: Callable[[contract.DecoderSizes], DefaultLayer]
    picture: Callable[[PIL.Image.Image, contract.Preprocessing], Picture]
    positions: Callable[[Sequence[int | Grid], int], tuple[npt.NDArray[np.int32], int]]
    stock_inputs: Callable[[Picture, contract.Preprocessing], dict[str, npt.NDArray[Any]]]
    chat_template: str
    token_texts: TokenTexts
    template_marks: bool
    hub: Mapping[str, str]
    tiny: Mapping[str, Any]
    tiny_tokens: Mapping[int, str]
    default_ratio: float = 0.5
    stock_layout: StockLayout | None = None
    unused: Sequence[str] = ()
    foreign: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    chat_template_of: Callable[[Mapping[str, Any]], str] | None = None

    def own_template(self, config: Mapping[str, Any]) -> str:
        """The family's chat template for a checkpoint with this config.json.

        Raises:
            UserError: config.json asks for one that is not known.
        """
        return self.chat_template_of(config) if self.chat_template_of else self.chat_template


SENSES = ("vision", "visual", "image", "img", "mm_", "audio", "video")
"""What keys of a config.json name where a model takes more than text."""


SHARED = ("settings", "text_models")
"""Modules of this folder that are no family's."""


@cache
def names() -> tuple[str, ...]:
    """The model types that can be exported."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED))


def of(model_type: str | None) -> Family:
    """The family called `model_type`.

    Raises:
        UserError: there is none.
    """
    if model_type not in names():
        near = difflib.get_close_matches(str(model_type), names(), n=3, cutoff=0.5) or names()
        raise UserError(
            f"model type {model_type!r} of config.json is not supported: this version exports {', '.join(near)}"
        )
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family


def described(config: Mapping[str, Any]) -> Family:
    """The family of the model that a config.json describes.

    Raises:
        UserError: there is none; or its model is in a layout that is not read, or sees nothing.
    """
    for name in names():
        if (sentence := of(name).foreign(config)) is not None:
            raise UserError(sentence)
    model_type = config.get("model_type")
    sees = any(mark in key for key in config for mark in SENSES)
    if model_type not in names() and not sees and isinstance(config.get("hidden_size"), int):
        raise UserError(
            f"config.json describes a model of text alone, of type {model_type!r}, and pruning is for pictures: give a "
            f"vision-language model, of type {', '.join(names())}"
        )
    return of(model_type)


def required(config: Mapping[str, Any], key: str) -> Any:
    """`config[key]`.

    Raises:
        UserError: there is none.
    """
    if config.get(key) is None:
        raise UserError(f"config.json has no {key}: give the checkpoint's own config.json")
    return config[key]


def scaled_layer(sizes: contract.DecoderSizes, published: Mapping[int, int], layer: int, layers: int) -> DefaultLayer:
    """The published selection layer for this many layers, or else `layer` of `layers` in proportion, uncalibrated."""
    if sizes.layers in published:
        return DefaultLayer(published[sizes.layers], calibrated=True)
    return DefaultLayer(min(sizes.layers - 1, max(1, round(sizes.layers * layer / layers))), calibrated=False)


def scaled_pixels(
    image: PIL.Image.Image,
    width: int,
    height: int,
    scaling: contract.Scaling,
    box: tuple[int, int, int, int] | None = None,
) -> npt.NDArray[np.float32]:
    """A picture resized to width x height and normalised, float32 [rows, columns, 3].

    box: left, top, right and bottom of what is kept of the resized picture; None keeps all of it.
    """
    left, top, right, bottom = box or (0, 0, width, height)
    kernel = PIL.Image.Resampling[scaling.resample.upper()]
    across = resized_rows(image.convert("RGB") if image.mode != "RGB" else image, width, left, right, kernel)
    turned = PIL.Image.fromarray(np.ascontiguousarray(across.transpose(1, 0, 2)))
    resized = resized_rows(turned, height, top, bottom, kernel).transpose(1, 0, 2)
    mean, std = np.array(scaling.mean, np.float32), np.array(scaling.std, np.float32)
    pixels: npt.NDArray[np.float32] = (resized.astype(np.float32) * np.float32(scaling.rescale_factor) - mean) / std
    return pixels


def resized_rows(
    image: PIL.Image.Image, width: int, first: int, end: int, kernel: PIL.Image.Resampling
) -> npt.NDArray[np.uint8]:
    """Each row of an RGB picture resized to `width` pixels, of which those from `first` to `end` are kept.

    uint8 [image.height, end - first, 3]. The picture's rows and then, turned, its columns make what Pillow makes of
    both at once, rows first; from 13 on it chooses the order by the shape. A strip of rows at a time bounds the memory.
    """
    kept = np.empty((image.height, end - first, 3), np.uint8)
    rows = max(1, STRIP // max(image.width, width))
    for start in range(0, image.height, rows):
        strip = image.crop((0, start, image.width, min(start + rows, image.height)))
        wide = strip.resize((width, strip.height), kernel)
        kept[start : start + strip.height] = np.asarray(wide.crop((first, 0, end, strip.height)))
    return kept


def check_shape(width: int, height: int, limit: int) -> None:
    """Check that a picture's longer side has at most `limit` times the pixels of its shorter one.

    Raises:
        UserError: it has more.
    """
    if max(width, height) > limit * min(width, height):
        raise UserError(f"a picture of {width} x {height} is too elongated: crop it to an aspect ratio below {limit}")


def covered(width: int, height: int, preprocessing: contract.Preprocessing) -> tuple[int, int, int, int]:
    """The part of a picture of this size that its visual tokens cover: left, top, right and bottom in its pixels."""
    if not isinstance(preprocessing, contract.TilePreprocessing) or preprocessing.fit == "stretch":
        return 0, 0, width, height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """`name` with the first of the (old, new) prefixes that it has replaced."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def counted_positions(segments: Sequence[int | Grid], start: int) -> tuple[npt.NDArray[np.int32], int]:
    """One-dimensional rotary positions, which count text and visual tokens alike; as Family.positions."""
    rows = sum(part.visual if isinstance(part, Grid) else part for part in segments)
    return np.arange(start, start + rows, dtype=np.int32)[None], start + rows
