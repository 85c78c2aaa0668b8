"""How pictures become what an encoder takes, as manifests say it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ivc_export.contract.records import Count, Factor, Frozen, Level, SideLength, Tiles, TokenId
from ivc_export.errors import UserError

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


class Scaling(Frozen):
    """How pixels are scaled: times rescale_factor, minus mean, by std, the latter two per RGB channel.

    A processor that leaves one of these steps out has a factor of 1, or means of 0 and deviations of 1.
    """

    rescale_factor: Factor
    mean: tuple[Level, Level, Level]
    std: tuple[Factor, Factor, Factor]
    resample: Resample = "bicubic"
    """Pillow's filter."""


class PatchPreprocessing(Scaling):
    """How a picture becomes patches, at its own size. Pixel counts are of the resized picture."""

    kind: Literal["patches"] = "patches"
    patch_size: int = Field(gt=0, le=256)
    merge_size: int = Field(gt=0, le=64)
    temporal_patch_size: int = Field(gt=0, le=64)
    min_pixels: Count
    max_pixels: Count

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x frames x height x width."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def token_side(self) -> int:
        """Pixels along one side of a visual token."""
        return self.patch_size * self.merge_size

    @property
    def least_visual(self) -> int:
        """Visual tokens of the smallest picture."""
        return max(1, -(-self.min_pixels // self.token_side**2))

    @property
    def most_visual(self) -> int:
        """Visual tokens of the largest picture."""
        return self.max_pixels // self.token_side**2

    def capped(self, max_visual: int) -> PatchPreprocessing:
        """With max_pixels such that a picture gives at most `max_visual` tokens."""
        most = min(self.max_pixels, max_visual * self.token_side**2)
        return self.model_copy(update={"max_pixels": most, "min_pixels": min(self.min_pixels, most)})


class VideoPreprocessing(Scaling):
    """How frames of a video are chosen, scaled and placed; they become patches as pictures do."""

    token: TokenId
    """Stands for one visual token of a video."""
    fps: float = Field(gt=0, le=1000)
    """Frames that are taken a second, where nobody says how many."""
    min_frames: Count
    max_frames: Count
    choice: Literal["steps", "ends"]
    """Whether frames are taken in equal steps from the first on, whole temporal patches of them, or evenly from the
    first to the last."""
    min_pixels: Count
    max_pixels: Count
    pixels_of: Literal["frame", "video"]
    """What has so many pixels: each resized frame, or all of them."""
    positions_per_second: float | None = Field(gt=0, le=1e6)
    """How far frames lie apart in rotary positions of time; None where it is one a temporal patch."""
    timestamps: bool
    """Whether the time of each temporal patch is written before its tokens, which are then a picture of their own."""


class FixedPreprocessing(Scaling):
    """How a picture becomes what an encoder of fixed size takes: one tile, or several and a thumbnail of the whole.

    Of the shapes of min_tiles to max_tiles tiles, fewest first, the one closest to the picture's aspect ratio is taken
    (width / height, by absolute difference); a later one of the same difference takes its place if the picture has
    more than half as many pixels as it has.
    """

    kind: Literal["tiles"] = "tiles"
    tile_pixels: SideLength
    """Pixels along one side of a tile."""
    tile_side: int = Field(gt=0, le=1024)
    """Visual tokens along one side of a tile."""
    min_tiles: Tiles
    max_tiles: Tiles
    """Without the thumbnail, which a picture of several tiles has behind them."""
    fit: Literal["crop", "stretch"]
    """Whether the middle of the picture is cut out, or all of it is stretched to the tiles."""

    @property
    def token_side(self) -> int:
        """Pixels along one side of a visual token."""
        return self.tile_pixels // self.tile_side

    @property
    def least_visual(self) -> int:
        """Visual tokens of the smallest picture."""
        return self.tile_side**2 * (self.min_tiles + (self.min_tiles > 1))

    @property
    def most_visual(self) -> int:
        """Visual tokens of the largest picture."""
        return self.tile_side**2 * (self.max_tiles + (self.max_tiles > 1))

    def capped(self, max_visual: int) -> FixedPreprocessing:
        """With max_tiles such that a picture gives at most `max_visual` tokens.

        Raises:
            UserError: one tile has more.
        """
        tile = self.tile_side**2
        if max_visual < tile:
            raise UserError(
                f"max_visual {max_visual} is too small: a picture gives this model at least {tile} visual tokens"
            )
        most = max(1, min(self.max_tiles, max_visual // tile - 1))  # a single tile has no thumbnail
        return self.model_copy(update={"max_tiles": most, "min_tiles": min(self.min_tiles, most)})


class ViewPreprocessing(Scaling):
    """How a picture becomes two views of it: one tile that shows all of it, and several tiles that show it larger.

    Each view keeps the picture's aspect ratio, and is filled up on both sides. Of the shapes of tiles the one is taken
    in which the picture has most pixels, at most its own; of equals the one with the least filling, the first of these.
    """

    kind: Literal["views"] = "views"
    tile_pixels: SideLength
    """Pixels along one side of a tile."""
    tile_side: int = Field(gt=0, le=1024)
    """Visual tokens along one side of a tile."""
    token_side: SideLength
    """Pixels along one side of a visual token; the last of a row or column may reach beyond its tile."""
    shapes: tuple[tuple[Tiles, Tiles], ...] = Field(min_length=1, max_length=256)
    """Columns and rows of tiles that the second view may have."""
    fill: int = Field(ge=0, le=255)
    """Level of the filling, before it is scaled."""

    def visual(self, columns: int, rows: int) -> int:
        """Visual tokens of a picture of so many tiles: of both views a separator behind each row, and one between."""
        side = self.tile_side
        return side * (side + 1) + 1 + side * rows * (side * columns + 1)

    @property
    def least_visual(self) -> int:
        """Visual tokens of the smallest picture."""
        return min(self.visual(*shape) for shape in self.shapes)

    @property
    def most_visual(self) -> int:
        """Visual tokens of the largest picture."""
        return max(self.visual(*shape) for shape in self.shapes)

    def capped(self, max_visual: int) -> ViewPreprocessing:
        """With the shapes alone that give at most `max_visual` tokens.

        Raises:
            UserError: all give more.
        """
        if max_visual < self.least_visual:
            raise UserError(
                f"max_visual {max_visual} is too small: a picture gives this model at least {self.least_visual} visual "
                "tokens"
            )
        fitting = tuple(shape for shape in self.shapes if self.visual(*shape) <= max_visual)
        return self.model_copy(update={"shapes": fitting})


Preprocessing = Annotated[PatchPreprocessing | FixedPreprocessing | ViewPreprocessing, Field(discriminator="kind")]
