"""Clips for tests: folders of frames, and video files where PyAV is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image


def frame(number: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    """A square that wanders over seeded noise, uint8 [height, width, 3]."""
    pixels = np.random.default_rng(number).integers(0, 90, (height, width, 3), np.uint8)
    pixels[number % height :, : 8 + 5 * number % width] += np.uint8(120)
    return pixels


def frame_folder(folder: Path, count: int, width: int, height: int) -> Path:
    """A folder of so many frames."""
    folder.mkdir(parents=True)
    for number in range(count):
        PIL.Image.fromarray(frame(number, width, height)).save(folder / f"{number:05}.png")
    return folder


def video_file(av: Any, path: Path, count: int, width: int, height: int, rate: int = 10) -> Path:
    """A video file of so many frames; sides are even."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number, width, height), format="rgb24")))
        file.mux(stream.encode())
    return path
