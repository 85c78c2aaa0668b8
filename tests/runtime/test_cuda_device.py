"""CudaDevice over a stand-in for CUDA that does nothing before it must."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ivc_export.runtime.tensorrt import device
from ivc_export.runtime.tensorrt.device import PIECE_BYTES, STAGED_BYTES, CudaDevice


class LateCuda:
    """CUDA's runtime API as far as copies go. What is on the stream runs when somebody waits for it."""

    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="within"
    )

    def __init__(self) -> None:
        self.memory: list[Any] = []
        self.pinned: list[range] = []
        self.waiting: list[Callable[[], object]] = []
        self.waits = self.streams = 0

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        self.streams += 1
        return 0, 7

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        self.memory.append(ctypes.create_string_buffer(b"x" * size, size))
        return 0, ctypes.addressof(self.memory[-1])

    def cudaMallocHost(self, size: int) -> tuple[int, int]:  # noqa: N802
        _, address = self.cudaMalloc(size)
        self.pinned.append(range(address, address + size))
        return 0, address

    def cudaFreeHost(self, address: int) -> tuple[int]:  # noqa: N802
        assert not self.waiting
        (held,) = (one for one in self.pinned if one.start == address)
        self.pinned.remove(held)
        return (0,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == 7 and not self.waiting
        self.streams -= 1
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[int]:  # noqa: N802
        self.waiting.append(lambda: ctypes.memset(address, value, size))
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:  # noqa: N802
        assert kind != "up" or any(source in one and source + size - 1 in one for one in self.pinned)
        self.waiting.append(lambda: ctypes.memmove(target, source, size))
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        for work in self.waiting:
            work()
        self.waiting, self.waits = [], self.waits + 1
        return (0,)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> LateCuda:
    found = LateCuda()
    monkeypatch.setitem(sys.modules, device.MODULE, found)
    return found


def test_an_array_may_change_once_it_is_uploaded(cuda: LateCuda) -> None:
    sizes = (1, 4, PIECE_BYTES, PIECE_BYTES + 1, STAGED_BYTES - 3, STAGED_BYTES, 3 * STAGED_BYTES + 7)
    one, generator = CudaDevice(), np.random.default_rng(0)
    arrays = [generator.integers(0, 256, size, np.uint8) for size in (0, *sizes)]
    places = [one.allocate(array.nbytes + 1) for array in arrays]
    for place, array in zip(places, arrays, strict=True):
        given = array.copy()
        one.upload(place, given)
        given[:] = 0
    for place, array in zip(places, arrays, strict=True):
        found = np.empty(array.nbytes + 1, np.uint8)
        one.download(place, found)
        assert np.array_equal(found, [*array, 0])
    assert len(cuda.pinned) == 1


def test_small_arrays_go_up_without_a_wait(cuda: LateCuda) -> None:
    one = CudaDevice()
    place, before = one.allocate(64), cuda.waits
    for number in range(100):
        one.upload(place, np.full(16, number, np.int32))
    assert cuda.waits == before


def test_what_is_written_may_change_once_it_went_up(cuda: LateCuda) -> None:
    sizes = (0, 1, 5000, 4999, STAGED_BYTES + 3)
    one, generator = CudaDevice(), np.random.default_rng(0)
    arrays = [generator.integers(0, 256, size, np.uint8) for size in sizes]
    places = [one.allocate(array.nbytes + 1) for array in arrays]
    for place, array in zip(places, arrays, strict=True):
        one.write(place, array.nbytes, lambda target, array=array: np.copyto(target, array))  # type: ignore[misc]
    for place, array in zip(places, arrays, strict=True):
        found = np.empty(array.nbytes + 1, np.uint8)
        one.download(place, found)
        assert np.array_equal(found, [*array, 0])


def test_what_is_looked_at_is_what_lies_there(cuda: LateCuda) -> None:
    one = CudaDevice()
    for size in (3, 5000, 40):
        place, values = one.allocate(size), np.arange(size, dtype=np.uint8)
        one.upload(place, values)
        assert np.array_equal(one.look(place, size), values)


def test_pinned_memory_and_the_stream_are_given_back(cuda: LateCuda) -> None:
    one = CudaDevice()
    one.upload(one.allocate(8), np.ones(8, np.uint8))
    one.write(one.allocate(8), 8, lambda target: target.fill(1))
    one.look(one.allocate(8), 8)
    assert len(cuda.pinned) == 3 and cuda.streams == 1
    del one
    assert not cuda.pinned and not cuda.streams
