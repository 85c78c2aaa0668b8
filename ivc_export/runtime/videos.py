"""Reads videos, as files or folders of frames, into RGB frames. Videos that cannot be read exactly are refused."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import PIL.Image

from ivc_export.errors import UserError
from ivc_export.runtime.pictures import PIXELS, open_picture

FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf,m4v,gif,apng,h264,hevc,obu"
"""Names of video formats in FFmpeg. Others are refused: they are not videos, such as text, or name further files to
read."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Name endings of a folder's frames."""
MOST_FRAMES = 1_000_000
"""The most frames that are ever taken from a video. It stands for all of them."""
UNSTATED_RATE = 24.0
"""Frames a second of a file that does not say, as in transformers."""


class Footage(Protocol):
    """A video that has been opened.

    size: width and height of its frames. total: how many there are. native: how many there are for each second; None if
    that is not known.
    """

    @property
    def size(self) -> tuple[int, int]:
        """See above."""
        ...

    @property
    def total(self) -> int:
        """See above."""
        ...

    @property
    def native(self) -> float | None:
        """See above."""
        ...

    def frames(self, indices: Sequence[int]) -> Iterator[PIL.Image.Image]:
        """These frames, in their order, RGB.

        Raises:
            UserError: one cannot be read.
        """
        ...


@dataclass(frozen=True)
class Video:
    """A video to ask about.

    Attributes:
        path: a video file (PyAV reads it), or a folder of pictures, which are the frames in the order of their names.
        fps: frames to take for each second of a file, or the frames for each second that a folder has. None takes the
            model's setting.
        max_frames: the most frames to take. None takes the model's setting.

    Raises:
        UserError: `fps` or `max_frames` is out of range.
    """

    path: Path
    fps: float | None = None
    max_frames: int | None = None
    kind: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        if self.fps is not None and not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise UserError(f"{self.fps:g} frames per second are out of range: give a number above 0, up to 1000")
        if self.max_frames is not None and self.max_frames < 1:
            raise UserError(f"a limit of {self.max_frames} frames is out of range: give 1 or more")

    @property
    def is_folder(self) -> bool:
        """Whether the video is a folder of frames."""
        return Path(self.path).is_dir()

    def open(self) -> Footage:
        """Read the first frame, and count the frames.

        Raises:
            UserError: the video is missing, damaged or too large, is not a video, or has no frames; or PyAV is not
                installed.
        """
        path = Path(self.path)
        if self.is_folder:
            return FrameFolder.of(path, self.fps)
        if not path.is_file():
            raise UserError(f"there is no video at {path}: check the path")
        return VideoFile.of(path)


@dataclass(frozen=True)
class FrameFolder:
    """Frames in files."""

    files: tuple[Path, ...]
    size: tuple[int, int]
    native: float | None

    @staticmethod
    def of(folder: Path, fps: float | None) -> FrameFolder:
        """The pictures of a folder, sorted by their names.

        Raises:
            UserError: there are none.
        """
        found = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")]
        if not found:
            raise UserError(f"{folder} has no video frames: give a folder of PNG or JPEG files, or a video file")
        files = tuple(sorted(found, key=lambda file: file.name))
        return FrameFolder(files, open_picture(files[0]).size, fps)

    @property
    def total(self) -> int:
        """Number of frames."""
        return len(self.files)

    def frames(self, indices: Sequence[int]) -> Iterator[PIL.Image.Image]:
        """These frames, RGB, all of one size.

        Raises:
            UserError: one is not a picture, or has another size.
        """
        for index in indices:
            frame = open_picture(self.files[index])
            if frame.size != self.size:
                raise UserError(
                    f"{self.files[index]} is {frame.width} x {frame.height}, but the first frame of the video is "
                    f"{self.size[0]} x {self.size[1]}: give frames of one size"
                )
            yield frame


@dataclass(frozen=True)
class VideoFile:
    """A video in a file."""

    path: Path
    size: tuple[int, int]
    total: int
    native: float

    @staticmethod
    def of(path: Path) -> VideoFile:
        """A file's first video stream, with the frames that it shows. Packets marked as discarded do not count.

        Raises:
            UserError: see Video.open.
        """
        with opened(path) as stream:
            first = next(decoded(stream), None)
            native = float(stream.average_rate or 0)
        with opened(path) as stream:
            total = sum(packet.size > 0 and not packet.is_discard for packet in stream.container.demux(stream))
        if first is None or not total:
            raise UserError(f"{path} has no frames: give another video, or a folder of frames")
        return VideoFile(path, rgb_frame(first).size, total, native or UNSTATED_RATE)

    def frames(self, indices: Sequence[int]) -> Iterator[PIL.Image.Image]:
        """These frames, by ascending numbers, RGB. If decoding ends up to a second early, the last frame is repeated.

        Raises:
            UserError: the file is damaged, or ends earlier.
        """
        wanted = iter(indices)
        number: int | None = next(wanted, None)
        place, last = -1, None
        with opened(self.path) as stream:
            for place, frame in enumerate(decoded(stream)):
                while place == number:
                    yield rgb_frame(frame)
                    number = next(wanted, None)
                if number is None:
                    return
                last = frame
        while number is not None and last is not None and number <= place + self.native:
            yield rgb_frame(last)
            number = next(wanted, None)
        if number is not None:
            raise UserError(f"{self.path} is damaged (frame {number} of {self.total} is missing): give a whole video")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file's first video stream.

    Raises:
        UserError: it is not a video, is damaged, or has too large frames; or PyAV is missing.
    """
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise UserError(
            "reading a video file needs PyAV: install ivc-export[video], or give a folder of frames"
        ) from error
    try:
        with av.open(str(path.absolute()), options={"format_whitelist": FORMATS, "protocol_whitelist": "file"}) as file:
            if not file.streams.video:
                raise UserError(f"{path} has no video in it: give a video file, or a folder of frames")
            stream = file.streams.video[0]
            if stream.width * stream.height > PIXELS:
                raise UserError(
                    f"{path} has frames of {stream.width} x {stream.height}, but the limit is {PIXELS / 1e6:.0f} "
                    "megapixels: scale it down"
                )
            yield stream
    except (av.FFmpegError, ValueError) as error:  # a damaged file makes PyAV raise either
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as a video ({why}): give a whole video, such as an MP4 file") from error


def decoded(stream: Any) -> Iterator[Any]:
    """The frames of a stream, as PyAV has them."""
    yield from stream.container.decode(stream)


def rgb_frame(frame: Any) -> PIL.Image.Image:
    """A frame of PyAV in RGB, rotated as the file says."""
    image = PIL.Image.fromarray(frame.to_ndarray(format="rgb24"))
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image
