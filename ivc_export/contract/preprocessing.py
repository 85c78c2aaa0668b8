"""How pictures are prepared for an encoder, as manifests describe it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ivc_export.contract.records import Count, Factor, Frozen, Level, SideLength, Tiles, TokenId
from ivc_export.errors import UserError

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


class Scaling(Frozen):
    """How pixels are scaled: (value * rescale_factor - mean) / std, with a mean and a std for each RGB channel.

    If a processor leaves one of these steps out, the factor is 1, or the means are 0 and the deviations 1.
    """

    rescale_factor: Factor
    """Factor of the 8-bit values."""
    mean: tuple[Level, Level, Level]
    """Subtracted, for each RGB channel."""
    std: tuple[Factor, Factor, Factor]
    """Divided by, for each RGB channel."""
    resample: Resample = "bicubic"
    """Pillow's filter."""


class PatchPreprocessing(Scaling):
    """How a picture of any size becomes patches. Pixel counts are those of the resized picture."""

    kind: Literal["patches"] = "patches"
    """Patches of a picture of any size."""
    patch_size: int = Field(gt=0, le=256)
    """Pixels along one side of a patch."""
    merge_size: int = Field(gt=0, le=64)
    """Patches along one side of a visual token."""
    temporal_patch_size: int = Field(gt=0, le=64)
    """Frames of a patch. A still picture is repeated."""
    min_pixels: Count
    """The fewest pixels of the resized picture."""
    max_pixels: Count
    """The most pixels of the resized picture."""

    @property
    def patch_dim(self) -> int:
        """Number of values of one patch: channels x frames x height x width."""
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
        """A copy whose max_pixels gives a picture at most `max_visual` tokens."""
        most = min(self.max_pixels, max_visual * self.token_side**2)
        return self.model_copy(update={"max_pixels": most, "min_pixels": min(self.min_pixels, most)})


class VideoPreprocessing(Scaling):
    """How frames of a video are chosen, scaled and placed. They become patches in the same way as pictures."""

    token: TokenId
    """Stands for one visual token of a video."""
    fps: float = Field(gt=0, le=1000)
    """Frames taken for each second, if the user names no number."""
    min_frames: Count
    """The fewest frames to take."""
    max_frames: Count
    """The most frames to take."""
    choice: Literal["steps", "ends"]
    """With "steps", frames are taken at equal steps from the first one on, as many as fill whole temporal patches. With
    "ends", they are spread evenly from the first to the last."""
    min_pixels: Count
    """The fewest pixels after resizing; see `pixels_of`."""
    max_pixels: Count
    """The most pixels after resizing; see `pixels_of`."""
    pixels_of: Literal["frame", "video"]
    """What min_pixels and max_pixels count: the pixels of each resized frame, or of all frames together."""
    positions_per_second: float | None = Field(gt=0, le=1e6)
    """Rotary positions of time for each second. None if each temporal patch is one position."""
    timestamps: bool
    """Whether the time of each temporal patch is written before its tokens. Each patch then counts as one picture."""


class FixedPreprocessing(Scaling):
    """How a picture is prepared for an encoder of fixed size: as one tile, or as several tiles and a thumbnail.

    Shapes of min_tiles to max_tiles tiles are tried, fewest first. The shape whose aspect ratio (width / height) has
    the smallest absolute difference from the picture's is taken. A later shape with the same difference replaces it if
    the picture has more than half as many pixels as the later shape.
    """

    kind: Literal["tiles"] = "tiles"
    """Tiles of a fixed size."""
    tile_pixels: SideLength
    """Pixels along one side of a tile."""
    tile_side: int = Field(gt=0, le=1024)
    """Visual tokens along one side of a tile."""
    min_tiles: Tiles
    """The fewest tiles, without the thumbnail."""
    max_tiles: Tiles
    """Does not count the thumbnail, which follows the tiles if there are several."""
    fit: Literal["crop", "stretch"]
    """With "crop", the middle of the picture is cut out. With "stretch", all of it is stretched to the tiles."""

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
        """A copy whose max_tiles gives a picture at most `max_visual` tokens.

        Raises:
            UserError: a single tile has more.
        """
        tile = self.tile_side**2
        if max_visual < tile:
            raise UserError(
                f"max_visual {max_visual} is too small: a picture gives this model at least {tile} visual tokens"
            )
        most = max(1, min(self.max_tiles, max_visual // tile - 1))  # a single tile has no thumbnail
        return self.model_copy(update={"max_tiles": most, "min_tiles": min(self.min_tiles, most)})


class ViewPreprocessing(Scaling):
    """How a picture becomes two views: one tile that shows all of it, and several tiles that show it larger.

    Each view keeps the picture's aspect ratio and is filled up on both sides. The shape in which the picture has most
    pixels is taken, where more than its own pixels do not count. Of equal shapes, the one with the least filling is
    taken, then the first.
    """

    kind: Literal["views"] = "views"
    """Two views of a picture."""
    tile_pixels: SideLength
    """Pixels along one side of a tile."""
    tile_side: int = Field(gt=0, le=1024)
    """Visual tokens along one side of a tile."""
    token_side: SideLength
    """Pixels along one side of a visual token. The last token of a row or column may reach beyond its tile."""
    shapes: tuple[tuple[Tiles, Tiles], ...] = Field(min_length=1, max_length=256)
    """The (columns, rows) of tiles that the second view may have."""
    fill: int = Field(ge=0, le=255)
    """Level of the filling, before pixels are scaled."""

    def visual(self, columns: int, rows: int) -> int:
        """Visual tokens of a picture whose second view has so many tiles.

        Both views have a separator behind each row, and one separator is between the views.
        """
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
        """A copy with only the shapes that give at most `max_visual` tokens.

        Raises:
            UserError: every shape gives more.
        """
        if max_visual < self.least_visual:
            raise UserError(
                f"max_visual {max_visual} is too small: a picture gives this model at least {self.least_visual} visual "
                "tokens"
            )
        fitting = tuple(shape for shape in self.shapes if self.visual(*shape) <= max_visual)
        return self.model_copy(update={"shapes": fitting})


Preprocessing = Annotated[PatchPreprocessing | FixedPreprocessing | ViewPreprocessing, Field(discriminator="kind")]
