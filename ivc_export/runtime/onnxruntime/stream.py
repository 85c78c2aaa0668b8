"""A CUDA stream of our library of custom operators, on which all sessions of a model run."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ivc_export.errors import UserError
from ivc_export.runtime.interface import Timings
from ivc_export.runtime.onnxruntime.shared_memory import functions


class Stream:
    """A stream of work for the device. What is given to it runs in this order, and the host need not wait in between.

    Raises:
        UserError: the device has no stream.
    """

    def __init__(self, library: Path) -> None:
        self._functions = functions(library)
        self.address = self._functions.ivcStream()
        if not self.address:
            raise UserError("CUDA gives no stream: check that the GPU and its driver work")
        weakref.finalize(self, self._functions.ivcFreeStream, self.address).atexit = False

    def wait(self) -> None:
        """Wait until the device has done all that the stream was given."""
        self._functions.ivcAwaitStream(self.address)

    def mark(self) -> Mark:
        """A mark behind all that the stream was given so far."""
        return Mark(self._functions, self.address)


class Mark:
    """A place in a stream."""

    def __init__(self, found: ctypes.CDLL, stream: int) -> None:
        self._functions, self._address = found, found.ivcMark(stream)
        if self._address:
            weakref.finalize(self, found.ivcFreeMark, self._address).atexit = False

    def seconds_since(self, other: Mark) -> float:
        """Seconds that the device took from another mark to this one, for which this waits; 0 if CUDA failed."""
        known = self._address and other._address
        return max(0.0, self._functions.ivcSeconds(other._address, self._address)) if known else 0.0


class StageTimes:
    """Times of stages for which the host does not wait. Without a stream it does, and its own clock tells them."""

    def __init__(self, stream: Stream | None, timings: Timings) -> None:
        self._stream, self._timings = stream, timings
        self._last = stream.mark() if stream else None
        self._stages: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What the block gives to the stream is of stage `name`."""
        if self._stream is None or self._last is None:
            with self._timings.stage(name):
                yield
            return
        yield
        mark = self._stream.mark()
        self._stages.append((name, self._last, mark))
        self._last = mark

    def finish(self) -> None:
        """Tell the times, after waiting until the device has done all stages."""
        for name, start, end in self._stages:
            self._timings.add(name, end.seconds_since(start))
        self._stages.clear()
