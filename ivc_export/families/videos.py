"""A video prepared for a family: which of its frames are taken, and their times."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import PIL.Image

from ivc_export.contract.preprocessing import VideoPreprocessing


@dataclass(frozen=True)
class Clip:
    """Frames of a video, as many as are taken.

    name: of the video, for sentences. size: width and height of its frames. indices: numbers of the taken frames among
    all, ascending. total: how many there are. native: how many there are a second. frames: the taken ones, RGB.
    """

    name: str
    size: tuple[int, int]
    indices: tuple[int, ...]
    total: int
    native: float
    frames: Iterable[PIL.Image.Image]

    @property
    def rate(self) -> float:
        """Taken frames a second."""
        return len(self.indices) / self.total * self.native

    @property
    def seconds(self) -> list[float]:
        """When each taken frame was."""
        return [index / self.native for index in self.indices]


def taken_frames(
    settings: VideoPreprocessing, deep: int, total: int, native: float, fps: float | None, most: int | None
) -> tuple[int, ...]:
    """Numbers of the frames to take of a video of `total` frames, `native` of them a second.

    deep: frames of a temporal patch. fps, most: frames to take a second, and at most; None for the settings' own. At
    least one is taken, and as many as the settings ask for at least, where there are.
    Source: sample_frames of Qwen2VLVideoProcessor and Qwen3VLVideoProcessor in transformers.
    """
    fps, most = settings.fps if fps is None else fps, settings.max_frames if most is None else most
    wanted = total / native * fps
    if settings.choice == "ends":
        count = max(1, min(max(int(wanted), settings.min_frames), most, total))
        return tuple(np.linspace(0, total - 1, count).round().astype(int).tolist())
    whole = math.floor(min(most, total) / deep) * deep
    count = math.floor(min(max(wanted, settings.min_frames), whole, total) / deep) * deep
    if count == 0:
        return tuple(range(min(most, total)))
    step = total / count
    places = np.arange(math.ceil(total / step)) * step
    return tuple(places.astype(np.float32).astype(int).tolist())  # in float32, as torch counts there
