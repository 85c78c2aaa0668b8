"""What a family of LVLMs is, and how to find one: the file's name is the `model_type` of config.json."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import PIL.Image

from ivc_export import contract
from ivc_export.builder import Graph
from ivc_export.errors import UserError


class Grid(NamedTuple):
    """A picture's visual tokens: rows by columns, row-major."""

    rows: int
    columns: int

    @property
    def visual(self) -> int:
        """Number of visual tokens."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Picture:
    """A picture, ready for the vision graph.

    inputs: the vision graph's inputs by name, for one frame; floats in float32.
    """

    inputs: Mapping[str, npt.NDArray[Any]]
    grid: Grid


@dataclass(frozen=True)
class Model:
    """One checkpoint's configuration, digested by its family. `vision` is the family's own record."""

    decoder: contract.DecoderSizes
    rotary: contract.RotarySizes
    selection: contract.SelectionRule
    preprocessing: contract.Preprocessing
    image_token: int
    vision_start_token: int
    vision_end_token: int
    vision: Any

    def graph_info(
        self, name: contract.GraphName, dtype: contract.FloatName, selection_layer: int
    ) -> contract.GraphInfo:
        """Inputs and outputs of graph `name` for this model."""
        return contract.graph_info(name, dtype, self.decoder, self.rotary, self.preprocessing, selection_layer)


@dataclass(frozen=True)
class DefaultLayer:
    """The selection layer taken when the user names none; `calibrated` if it was published or measured."""

    layer: int
    calibrated: bool


@dataclass(frozen=True)
class Family:
    """Everything particular to one family.

    read: config.json, and the image processor's configuration if there is one, to a Model.
    canonical_name: a tensor's name in the checkpoint to ours (`model.*`, `visual.*`, `lm_head.weight`).
    vision: builds the encoder between the vision graph's inputs and `image_embeds`, which it returns.
    default_layer: the selection layer for a model of these sizes.
    picture: an RGB picture to the vision graph's inputs.
    positions: rotary positions of text (its number of tokens) and pictures in order, from the first free position on;
        returns int32 [axes, rows] and the next free position.
    hub: aliases that --model takes, to hub ids.
    tiny: config.json of a model small enough for tests.
    unused: beginnings of (canonical) names of tensors that checkpoints hold and no graph takes.
    """

    model_type: str
    read: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Model]
    canonical_name: Callable[[str], str]
    vision: Callable[[Graph, Model], ir.Value]
    default_layer: Callable[[contract.DecoderSizes], DefaultLayer]
    picture: Callable[[PIL.Image.Image, contract.Preprocessing], Picture]
    positions: Callable[[Sequence[int | Grid], int], tuple[npt.NDArray[np.int32], int]]
    hub: Mapping[str, str]
    tiny: Mapping[str, Any]
    unused: Sequence[str] = ()


def names() -> list[str]:
    """The model types that can be exported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


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


def required(config: Mapping[str, Any], key: str) -> Any:
    """`config[key]`.

    Raises:
        UserError: there is none.
    """
    if config.get(key) is None:
        raise UserError(f"config.json has no {key}: give the checkpoint's own config.json")
    return config[key]
