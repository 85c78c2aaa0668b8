"""Settings of patches that several families share, from config.json and the processors of pictures and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ivc_export.contract.preprocessing import PatchPreprocessing, VideoPreprocessing
from ivc_export.contract.records import Count
from ivc_export.families.patches import PatchPictures
from ivc_export.families.settings import (
    PROCESSOR,
    VIDEO_PROCESSOR,
    Backendless,
    PictureSettings,
    Settings,
    Square,
    edges,
    refuse,
)

VISION_THETA = 10000.0
VisionTheta = Annotated[float, Field(ge=VISION_THETA, le=VISION_THETA)]


class VisionRope(Settings):
    """Rotary positions of the encoder's patches."""

    rope_type: Literal["axial", "default"] = "axial"
    rope_theta: VisionTheta = VISION_THETA


class Patches(Settings):
    """How the vision encoder cuts pictures: keys that its config class has for every kind of block."""

    in_channels: Literal[3] = 3
    patch_size: Annotated[int, Field(gt=0, le=256), Square] = 14
    spatial_merge_size: Annotated[int, Field(gt=0, le=64)] = 2
    temporal_patch_size: Annotated[int, Field(gt=0, le=64), Square] = 2
    rope_parameters: VisionRope | None = None
    rope_theta: VisionTheta = VISION_THETA


class Pictures(PictureSettings):
    """Qwen2VLImageProcessor of transformers. Null sizes are those of config.json."""

    image_processor_type: Annotated[Literal["Qwen2VLImageProcessor"], Backendless] = "Qwen2VLImageProcessor"
    size: Any = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # noqa: RUF012
    """Fewest and most pixels of the resized picture. min_pixels and max_pixels take precedence."""
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    patch_size: int | None = None
    merge_size: int | None = None
    temporal_patch_size: int | None = None


class Videos(PictureSettings):
    """Qwen2VLVideoProcessor of transformers."""

    size: Any = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}  # noqa: RUF012
    """Pixels of a resized frame, fewest and most."""
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    fps: Annotated[float, Field(gt=0, le=1000)] = 2.0
    min_frames: Count = 4
    max_frames: Count = 768
    patch_size: int | None = None
    merge_size: int | None = None
    temporal_patch_size: int | None = None
    cap_pixels_per_frame: Literal[False] = False


def read_pictures(vision: Patches, processor: Mapping[str, Any] | None) -> PatchPictures:
    """The image processor's settings.

    Raises:
        UserError: see read_cut.
    """
    pictures = Pictures.read(processor, PROCESSOR)
    fewest, most = read_cut(vision, pictures, PROCESSOR)
    return PatchPictures(
        PatchPreprocessing(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            min_pixels=fewest,
            max_pixels=most,
            **pictures.scaling,
        )
    )


def read_cut(vision: Patches, found: Pictures | Videos, file: str) -> tuple[int, int]:
    """The fewest and the most pixels to which a processor scales.

    Raises:
        UserError: it does not cut pictures as config.json says, or names no fewest and most pixels.
    """
    for key, own, other, stored in (
        ("patch_size", "patch_size", found.patch_size, vision.patch_size),
        ("merge_size", "spatial_merge_size", found.merge_size, vision.spatial_merge_size),
        ("temporal_patch_size", "temporal_patch_size", found.temporal_patch_size, vision.temporal_patch_size),
    ):
        if other not in (None, stored):
            refuse(key, other, file, f"vision_config.{own} of config.json is {stored}, and both must be equal")
    size = edges(found.size, one_is_square=False)
    fewest = found.min_pixels or size.get("shortest_edge", size.get("min_pixels"))
    most = found.max_pixels or size.get("longest_edge", size.get("max_pixels"))
    if fewest is None or most is None:
        known = "give shortest_edge and longest_edge, the minimum and maximum pixels of the resized picture"
        refuse("size", found.size, file, known)
    if fewest > most:
        refuse("min_pixels", fewest, file, f"it must not be above max_pixels, which is {most}")
    return fewest, most


def read_videos(
    vision: Patches,
    found: Videos,
    token: int,
    choice: Literal["steps", "ends"] = "steps",
    pixels_of: Literal["frame", "video"] = "frame",
    positions_per_second: float | None = None,
    timestamps: bool = False,
) -> VideoPreprocessing:
    """Read a video processor's settings, with the settings in which families differ.

    Raises:
        UserError: see read_cut.
    """
    fewest, most = read_cut(vision, found, VIDEO_PROCESSOR)
    return VideoPreprocessing(
        token=token,
        fps=found.fps,
        min_frames=found.min_frames,
        max_frames=found.max_frames,
        choice=choice,
        min_pixels=fewest,
        max_pixels=most,
        pixels_of=pixels_of,
        positions_per_second=positions_per_second,
        timestamps=timestamps,
        **found.scaling,
    )
