"""A family's vision encoder: how pictures are prepared for it, and its graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import numpy.typing as npt
import onnx_ir as ir
import PIL.Image

from ivc_export.contract.preprocessing import (
    FixedPreprocessing,
    PatchPreprocessing,
    Preprocessing,
    VideoPreprocessing,
    ViewPreprocessing,
)
from ivc_export.errors import UserError
from ivc_export.families.pictures import Grid, Visual
from ivc_export.families.videos import Clip
from ivc_export.graph.builder import Graph

P = TypeVar("P", PatchPreprocessing, FixedPreprocessing, ViewPreprocessing)


class Preparation(ABC):
    """Prepares pictures for an encoder. A bundle's manifest has everything it needs.

    preprocessing: the settings, of the kind that the family takes.
    """

    preprocessing: Preprocessing

    @abstractmethod
    def picture(self, image: PIL.Image.Image, token_id: int) -> Visual:
        """Turn an RGB picture into the vision graph's inputs. token_id stands for it in the prompt.

        Raises:
            UserError: it is too elongated.
        """

    @abstractmethod
    def stock_inputs(self, visual: Visual) -> dict[str, npt.NDArray[Any]]:
        """The inputs of transformers' get_image_features for it, by name, with pictures along the first axis."""

    def video(self, clip: Clip, settings: VideoPreprocessing, most: int) -> list[Visual]:
        """Turn frames of a video into the vision graph's inputs: one Visual, or several with text in between.

        most: the most visual tokens of the video; frames are scaled down to fit.

        Raises:
            UserError: it does not fit, or is too elongated; or the family takes no videos.
        """
        raise UserError("this model takes no videos: give pictures")

    def covered(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The part of a picture of this size that its visual tokens cover: left, top, right and bottom in its pixels.

        It is the whole picture, unless a family says otherwise.
        """
        return 0, 0, width, height

    def scaled(self, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
        """The width and height to which the covered part of a picture of this size was scaled, if it gave `grid`."""
        side = self.preprocessing.token_side
        return grid.columns * side, grid.rows * side

    def shown(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The part of a picture that its visual tokens cover."""
        box = self.covered(*image.size)
        return image if box == (0, 0, *image.size) else image.crop(box)


class Encoder(ABC):
    """One checkpoint's vision encoder."""

    pictures: Preparation

    @abstractmethod
    def graph(self, g: Graph) -> ir.Value:
        """Build the encoder on the vision graph's inputs, and return `image_embeds`.

        If the decoder has `deepstack`, it also makes these outputs.
        """


def of_kind(kind: type[P], preprocessing: Preprocessing) -> P:
    """`preprocessing`, if it is of the kind that a family takes.

    Raises:
        UserError: it is of another kind.
    """
    if not isinstance(preprocessing, kind):
        wanted = kind.model_fields["kind"].default
        raise UserError(
            f"the model's pictures are cut into {wanted}, but its preprocessing.kind is {preprocessing.kind!r}: "
            "export the model again"
        )
    return preprocessing
