"""The record that describes a family of LVLMs, and parts that several families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.stacks import Stack
from ivc_export.contract.graphs import graph_info
from ivc_export.contract.manifest import DecoderSizes, GraphInfo, RotarySizes, Selection
from ivc_export.contract.names import GraphName
from ivc_export.contract.preprocessing import Preprocessing, VideoPreprocessing
from ivc_export.dtypes import FloatName
from ivc_export.families.encoder import Encoder, Preparation
from ivc_export.families.pictures import Grid
from ivc_export.graph.decoder_block import DecoderBlock


class TokenTexts(NamedTuple):
    """Texts of the tokens that show a picture: the image token, and the tokens before and behind a picture's image
    tokens, if any."""

    image: str
    start: str | None = None
    end: str | None = None


@dataclass(frozen=True)
class Model:
    """One checkpoint's configuration, as read by its family.

    block: the parts of its decoder layers. stacks: matrices that its graphs take as one. image_token,
    vision_start_token, vision_end_token: ids in config.json; None if the tokenizer has them, or if the family has no
    such token.
    """

    decoder: DecoderSizes
    block: DecoderBlock
    rotary: RotarySizes
    selection: Selection
    encoder: Encoder
    image_token: int | None
    vision_start_token: int | None
    vision_end_token: int | None
    stacks: tuple[Stack, ...] = ()

    @property
    def preprocessing(self) -> Preprocessing:
        """How its pictures are prepared, in the manifest's form."""
        return self.encoder.pictures.preprocessing

    def graph_info(self, name: GraphName, dtype: FloatName, selection_layer: int) -> GraphInfo:
        """Inputs and outputs of graph `name` for this model."""
        sizes = (self.decoder, self.rotary, self.selection, self.preprocessing)
        return graph_info(name, dtype, *sizes, selection_layer)


@dataclass(frozen=True)
class DefaultLayer:
    """The selection layer if the user names none. `calibrated` is true if it was published or measured."""

    layer: int
    calibrated: bool


@dataclass(frozen=True)
class StockLayout:
    """A layout that transformers supports, for families whose own layout it does not.

    config: converts config.json, with the image token's id, to transformers' config.json. tensors: converts
    config.json, a tensor's name and the tensor (NumPy's or torch's) to transformers' tensors, by name.
    """

    config: Callable[[Mapping[str, Any], int], dict[str, Any]]
    tensors: Callable[[Mapping[str, Any], str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """Everything that is special about one family.

    preprocessing: the kind of settings by which its pictures are prepared.
    pictures: makes the code that prepares pictures, from such settings of a checkpoint or a manifest.
    axes: number of axes of its rotary positions.
    tiles: whether it cuts pictures into tiles, and chooses tokens within each.
    read: reads config.json, and the image processor's configuration if there is one, into a Model.
    canonical_name: converts a tensor's name in the checkpoint to ours (`model.*`, `visual.*`, `lm_head.weight`).
    stored_name: the inverse, to the name of transformers 4.4x, or of the family's own code.
    default_layer: the selection layer for a model of these sizes.
    positions: rotary positions of text (its number of tokens) and pictures in order, from the first free position on;
        returns int32 [axes, rows] and the next free position.
    chat_template: the family's template, for checkpoints without one, or with one that cannot show pictures.
    chat_template_of: gives that template by config.json, if it depends on it.
    picture_mark: what templates of some checkpoints write in the place of the image token; None if they write that.
    token_texts: of the tokens that show a picture.
    template_marks: whether chat templates write the tokens before and behind a picture's image tokens.
    hub: hub ids, by the aliases that --model takes.
    default_ratio: fraction of visual tokens kept if the user names none.
    stock_layout: for checkpoints that transformers cannot load directly.
    video: gives the settings for videos, from config.json, the video processor's settings if there are any, and the id
        of the token that stands for a visual token of a video; None for families without videos.
    video_text: that token's text.
    unused: beginnings of (canonical) names of tensors that checkpoints contain and no graph takes.
    foreign: gives a sentence if a config.json is of the same models in an unsupported layout; else None.
    """

    model_type: str
    preprocessing: type[Preprocessing]
    pictures: Callable[[Preprocessing], Preparation]
    axes: int
    tiles: bool
    read: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Model]
    canonical_name: Callable[[str], str]
    stored_name: Callable[[str], str]
    default_layer: Callable[[DecoderSizes], DefaultLayer]
    positions: Callable[[Sequence[int | Grid], int], tuple[npt.NDArray[np.int32], int]]
    chat_template: str
    token_texts: TokenTexts
    template_marks: bool
    hub: Mapping[str, str]
    default_ratio: float = 0.5
    stock_layout: StockLayout | None = None
    video: Callable[[Mapping[str, Any], Mapping[str, Any] | None, int], VideoPreprocessing] | None = None
    video_text: str | None = None
    unused: Sequence[str] = ()
    foreign: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    chat_template_of: Callable[[Mapping[str, Any]], str] | None = None
    picture_mark: str | None = None

    def own_template(self, config: Mapping[str, Any]) -> str:
        """The family's chat template for a checkpoint with this config.json.

        Raises:
            UserError: config.json asks for one that is not known.
        """
        return self.chat_template_of(config) if self.chat_template_of else self.chat_template


def scaled_layer(sizes: DecoderSizes, published: Mapping[int, int], layer: int, layers: int) -> DefaultLayer:
    """The published selection layer for this many layers. If there is none, `layer` of `layers` in proportion,
    uncalibrated."""
    if sizes.layers in published:
        return DefaultLayer(published[sizes.layers], calibrated=True)
    scaled = round(sizes.layers * layer / layers)
    return DefaultLayer(min(sizes.cuts[-1], max(sizes.cuts[0], scaled)), calibrated=False)


def renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """`name`, with the first matching prefix of the (old, new) pairs replaced."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
