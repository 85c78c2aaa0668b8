"""Host memory through which a run's arrays reach the device and come back, while the host goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ivc_export.runtime.failures import SMALLER, told
from ivc_export.runtime.onnxruntime.loading import load_onnxruntime
from ivc_export.runtime.onnxruntime.shared_memory import shared_array
from ivc_export.runtime.onnxruntime.stream import Place, Stream, place_of
from ivc_export.runtime.onnxruntime.weights_memory import room

if TYPE_CHECKING:
    from onnxruntime import OrtValue

LEAST, MOST = 1 << 16, 1 << 26
"""Bytes of the smallest block, and those from which on arrays should go another way."""


class Block:
    """Equally many bytes in host memory that the device also reads, and on the device."""

    def __init__(self, host: npt.NDArray[np.uint8], device: OrtValue) -> None:
        self.host, self.device, self.used = host, device, 0
        self.from_host, self.on_device = host.ctypes.data, int(device.data_ptr())

    def take(self, size: int) -> int:
        """The first of `size` bytes that nobody uses, or -1."""
        start = self.used
        if start + size > len(self.host):
            return -1
        self.used = room(start + size)
        return start

    def array(self, start: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The array on the host from byte `start`."""
        return np.ndarray(shape, dtype, self.host.data, start)


class Staging:
    """Copies arrays to the device and back in the order of a stream.

    Its memory is used again after `reuse`, which the caller calls when the device has done all that the stream was
    given. device: "cuda", or "cpu" over kernels that are emulated.
    """

    def __init__(self, stream: Stream, device: str) -> None:
        self._stream, self._device = stream, device
        self._blocks = list[Block]()

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(block.used for block in self._blocks)

    def takes(self, arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Whether there is room for arrays: host memory that the device reads is scarce."""
        return self.used + sum(array.nbytes for array in arrays.values()) <= MOST

    def put(self, arrays: Mapping[str, npt.NDArray[Any]], to: int | None = None) -> dict[str, Place]:
        """Copy arrays to the device, in one copy. Runs that the stream is given later find them there.

        to: an address of the caller's from which on they lie, as `places_from` says. Otherwise they are there until
            `reuse`.
        """
        block, start = self._room(sum(room(array.nbytes) for array in arrays.values()))
        first = block.on_device + start if to is None else to
        found, at = dict[str, Place](), 0
        for name, array in arrays.items():
            block.array(start + at, array.shape, array.dtype)[...] = array
            found[name] = Place(first + at, array.shape, array.dtype)
            at += room(array.nbytes)
        if at:
            self._stream.copy(first, block.from_host + start, at)
        return found

    def write(self, array: npt.NDArray[Any], to: int) -> None:
        """Copy an array to an address on the device."""
        block, start = self._room(array.nbytes)
        block.array(start, array.shape, array.dtype)[...] = array
        self._stream.copy(to, block.from_host + start, array.nbytes)

    def take_rows(self, table: OrtValue, index: npt.NDArray[np.int32], to: OrtValue) -> None:
        """Write rows `index` of a table [rows, width] to another tensor, [.., width]."""
        self._stream.take_rows(table, self.put({"index": index})["index"], to)

    def get(self, values: Mapping[str, OrtValue | Place]) -> dict[str, npt.NDArray[Any]]:
        """Copy values from the device. They are there when the device has done all that the stream was given, until
        `reuse`."""
        found = {}
        for name, value in values.items():
            place = place_of(value)
            block, start = self._room(place.nbytes)
            found[name] = block.array(start, place.shape, place.dtype)
            if place.nbytes:
                self._stream.copy(block.from_host + start, place.address, place.nbytes)
        return found

    def reuse(self) -> None:
        """Use the memory again from its start, and keep only the largest block."""
        del self._blocks[:-1]
        for block in self._blocks:
            block.used = 0

    def _room(self, size: int) -> tuple[Block, int]:
        start = self._blocks[-1].take(size) if self._blocks else -1
        if start < 0:
            whole = max(LEAST, self.used + size)  # so that next time one block has room for everything
            with told("GPU memory cannot be allocated", SMALLER, "check that the GPU and its driver work"):
                made = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type((whole,), np.uint8, self._device, 0)
            self._blocks.append(Block(shared_array(self._stream.op_library, (whole,), np.uint8), made))
            start = self._blocks[-1].take(size)
        return self._blocks[-1], start
