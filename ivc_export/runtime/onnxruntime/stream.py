"""A CUDA stream of our library of custom operators, on which all sessions of a model run."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ivc_export.errors import UserError
from ivc_export.families.pictures import Levels
from ivc_export.runtime.interface import Timings
from ivc_export.runtime.onnxruntime.shared_memory import functions
from ivc_export.runtime.onnxruntime.weights_memory import room

if TYPE_CHECKING:
    from onnxruntime import OrtValue

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
"""NumPy's types by onnxruntime's names."""


Shapes = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]
"""Shapes and types of arrays, by name."""


@dataclass(frozen=True)
class Place:
    """An array in the device's memory, at an address. owner: what the memory is freed with, if this place keeps it."""

    address: int
    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    owner: object = None

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def places_from(address: int, shapes: Shapes) -> tuple[dict[str, Place], int]:
    """Arrays of these shapes and types, one behind the other from an address on, and the bytes that they take."""
    found, end = dict[str, Place](), address
    for name, (shape, dtype) in shapes.items():
        found[name] = Place(end, shape, dtype)
        end += room(found[name].nbytes)
    return found, end - address


def address_of(value: OrtValue | Place) -> int:
    """Where it is on the device."""
    return value.address if isinstance(value, Place) else int(value.data_ptr())


def place_of(value: OrtValue | Place) -> Place:
    """Where it is on the device, and its shape and type."""
    if isinstance(value, Place):
        return value
    return Place(int(value.data_ptr()), tuple(value.shape()), TYPES[value.data_type()])


class Stream:
    """A stream of work for the device. What is given to it runs in this order, and the host need not wait in between.

    Raises:
        UserError: the device has no stream.
    """

    def __init__(self, library: Path) -> None:
        self.op_library, self._functions = library, functions(library)
        self.address = self._functions.ivcStream()
        if not self.address:
            raise UserError("CUDA gives no stream: check that the GPU and its driver work")
        weakref.finalize(self, self._functions.ivcFreeStream, self.address).atexit = False

    def wait(self) -> bool:
        """Wait until the device has done all that the stream was given, and tell whether it could."""
        return bool(self._functions.ivcAwaitStream(self.address))

    def copy(self, to: int, start: int, size: int) -> None:
        """Copy `size` bytes from address `start` to address `to`. What is on the host is `shared_array`'s."""
        check_call(self._functions.ivcCopy(self.address, to, start, size))

    def take_rows(self, table: OrtValue, index: Place, to: OrtValue) -> None:
        """Write rows `index`, int32 [n], of a table [rows, width] to another tensor, [.., n, width]."""
        rows, width = table.shape()
        size, count = width * np.dtype(TYPES[table.data_type()]).itemsize, index.shape[0]
        given, taken, found = address_of(table), address_of(index), address_of(to)
        check_call(self._functions.ivcTakeRows(self.address, given, rows, size, taken, count, found))

    def make_pixels(self, levels: Levels, start: int, to: int) -> None:
        """Write the pixels of a picture, float32, to an address. start: the address of the levels' values."""
        outer, _, given, inner = levels.values.shape
        scaling = levels.scaling
        extents = Pixels(outer, given, levels.frames, inner, scaling.rescale_factor)
        extents.mean[:], extents.std[:] = scaling.mean, scaling.std
        check_call(self._functions.ivcMakePixels(self.address, ctypes.byref(extents), start, to))

    def mark(self) -> Mark:
        """A mark behind all that the stream was given so far."""
        return Mark(self._functions, self.address)


class Pixels(ctypes.Structure):
    """IvcPixels of graphs/plugin/kernels/ivc_types.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("outer", "given", "frames", "inner")),
        ("factor", ctypes.c_float),
        ("mean", ctypes.c_float * 3),
        ("std", ctypes.c_float * 3),
    )


def check_call(taken: int) -> None:
    """Check that CUDA has taken a call.

    Raises:
        UserError: it has not.
    """
    if not taken:
        raise UserError("CUDA refuses a copy or a kernel: check that the GPU and its driver work")


class Mark:
    """A place in a stream."""

    def __init__(self, found: ctypes.CDLL, stream: int) -> None:
        self._functions, self._stream, self._address = found, stream, found.ivcMark(stream)
        if self._address:
            weakref.finalize(self, found.ivcFreeMark, self._address).atexit = False

    def move(self) -> None:
        """Move it behind all that the stream was given so far."""
        check_call(self._functions.ivcMoveMark(self._address, self._stream))

    def wait(self) -> bool:
        """Wait until the device has done all that is before it, and tell whether it could."""
        return bool(self._functions.ivcAwaitMark(self._address))

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
