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
    """How pictures are made ready for an encoder: what a bundle's manifest is enough for.

    preprocessing: the settings, of the kind that the family takes.
    """

    preprocessing: Preprocessing

    @abstractmethod
    def picture(self, image: PIL.Image.Image, token_id: int) -> Visual:
        """An RGB picture to the vision graph's inputs; token_id stands for it in the prompt.

        Raises:
            UserError: it is too elongated.
        """

    @abstractmethod
    def stock_inputs(self, visual: Visual) -> dict[str, npt.NDArray[Any]]:
        """What transformers' get_image_features takes for it, by name, pictures along the first axis."""

    def video(self, clip: Clip, settings: VideoPreprocessing, most: int) -> list[Visual]:
        """Frames of a video to the vision graph's inputs: one Visual, or several with text in between.

        most: visual tokens of the video, whose frames are scaled down to fit.

        Raises:
            UserError: it does not fit, or is too elongated; or the family takes no videos.
        """
        raise UserError("this model takes pictures and no videos: give pictures")

    def covered(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The part of a picture of this size that its visual tokens cover: left, top, right and bottom in its pixels.

        All of it, where a family does not say otherwise.
        """
        return 0, 0, width, height

    def scaled(self, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
        """The width and height that the covered part of a picture of this size, which gave `grid`, was scaled to."""
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
        """Build it from the vision graph's inputs to `image_embeds`, which it returns.

        Where the decoder has `deepstack`, it makes those outputs, too.
        """


def of_kind(kind: type[P], preprocessing: Preprocessing) -> P:
    """`preprocessing`, which a family takes of this kind alone.

    Raises:
        UserError: it is of another.
    """
    if not isinstance(preprocessing, kind):
        wanted = kind.model_fields["kind"].default
        raise UserError(
            f"the model's pictures are cut into {wanted}, and its preprocessing.kind is {preprocessing.kind!r}: "
            "export it again"
        )
    return preprocessing
