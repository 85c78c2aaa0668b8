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
    """Texts of the tokens that show a picture: the image token, and those before and behind a picture's, if any."""

    image: str
    start: str | None = None
    end: str | None = None


@dataclass(frozen=True)
class Model:
    """One checkpoint's configuration, digested by its family.

    block: what its decoder layers are made of. stacks: matrices that its graphs take as one.
    image_token, vision_start_token, vision_end_token: ids that config.json states; None where the tokenizer does, or
    where the family has no such token.
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
        """How its pictures are made ready, as the manifest says it."""
        return self.encoder.pictures.preprocessing

    def graph_info(self, name: GraphName, dtype: FloatName, selection_layer: int) -> GraphInfo:
        """Inputs and outputs of graph `name` for this model."""
        sizes = (self.decoder, self.rotary, self.selection, self.preprocessing)
        return graph_info(name, dtype, *sizes, selection_layer)


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

    preprocessing: the kind of settings by which its pictures are made ready.
    pictures: such settings, of a checkpoint or a manifest, to what makes pictures ready.
    axes: of its rotary positions.
    tiles: whether it cuts pictures into tiles, and chooses tokens within each.
    read: config.json, and the image processor's configuration if there is one, to a Model.
    canonical_name: a tensor's name in the checkpoint to ours (`model.*`, `visual.*`, `lm_head.weight`).
    stored_name: the inverse, as transformers 4.4x names it, or the family's own code.
    default_layer: the selection layer for a model of these sizes.
    positions: rotary positions of text (its number of tokens) and pictures in order, from the first free position on;
        returns int32 [axes, rows] and the next free position.
    chat_template: of the family, for checkpoints that come with none, or with one that cannot show pictures.
    chat_template_of: config.json to that template, where it depends on it.
    picture_mark: what templates of some checkpoints write where the image token is to stand; None for nothing else.
    token_texts: of the tokens that show a picture.
    template_marks: whether chat templates write the tokens before and behind a picture's image tokens.
    hub: aliases that --model takes, to hub ids.
    default_ratio: fraction of visual tokens kept when the user names none.
    stock_layout: for checkpoints that transformers cannot load as they are.
    video: config.json, the video processor's settings if there are any, and the id of the token that stands for a
    visual token of a video, to how videos are made ready; None for families that take none.
    video_text: that token's text.
    unused: beginnings of (canonical) names of tensors that checkpoints hold and no graph takes.
    foreign: of a config.json of the same models in a layout that is not read, the sentence that says so; else None.
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
    """The published selection layer for this many layers, or else `layer` of `layers` in proportion, uncalibrated."""
    if sizes.layers in published:
        return DefaultLayer(published[sizes.layers], calibrated=True)
    scaled = round(sizes.layers * layer / layers)
    return DefaultLayer(min(sizes.cuts[-1], max(sizes.cuts[0], scaled)), calibrated=False)


def renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """`name` with the first of the (old, new) prefixes that it has replaced."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
