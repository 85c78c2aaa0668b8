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
    """The taken frames of a video.

    name: of the video, for sentences. size: width and height of its frames. indices: numbers of the taken frames among
    all, ascending. total: number of all frames. native: frames for each second. frames: the taken ones, RGB.
    """

    name: str
    size: tuple[int, int]
    indices: tuple[int, ...]
    total: int
    native: float
    frames: Iterable[PIL.Image.Image]

    @property
    def rate(self) -> float:
        """How many frames were taken for each second."""
        return len(self.indices) / self.total * self.native

    @property
    def seconds(self) -> list[float]:
        """The time of each taken frame."""
        return [index / self.native for index in self.indices]


def taken_frames(
    settings: VideoPreprocessing, deep: int, total: int, native: float, fps: float | None, most: int | None
) -> tuple[int, ...]:
    """Numbers of the frames to take from a video of `total` frames, with `native` frames for each second.

    deep: frames of a temporal patch. fps, most: frames to take for each second, and at most; None takes the settings.
    At least one is taken, and at least as many as the settings want, if the video has them. Source: sample_frames of
    Qwen2VLVideoProcessor and Qwen3VLVideoProcessor in transformers.
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
