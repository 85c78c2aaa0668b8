"""Memory of a CUDA device, by addresses and on one stream. It uses NVIDIA's cuda-bindings, imported late."""

from __future__ import annotations

import ctypes
import importlib
import statistics
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.filesize import decimal

from ivc_export.errors import UserError

MODULE = "cuda.bindings.runtime"
OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation, of CUDA's runtime API."""
STAGED_BYTES, PIECE_BYTES = 4 << 20, 512 << 10
"""Pinned memory that uploads pass through, and how much of it one copy takes."""


class Device(Protocol):
    """The operations that a session needs of a device. Copies and clearing are ordered on `stream`; addresses are
    integers."""

    stream: int

    def allocate(self, size: int) -> int:
        """`size` bytes, all zero."""
        ...

    def free(self, address: int) -> None:
        """Free memory of `allocate`, once the stream no longer uses it."""
        ...

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device. The array may be changed afterwards."""
        ...

    def write(self, address: int, size: int, fill: Callable[[npt.NDArray[np.uint8]], object]) -> None:
        """Copy `size` bytes to the device, which `fill` writes to an array of host memory."""
        ...

    def download(self, address: int, array: npt.NDArray[Any]) -> None:
        """Fill a contiguous array from the device, after everything before it on the stream."""
        ...

    def look(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes of the device, after everything before them on the stream. The array is valid until the next look."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes within the device."""
        ...

    def copy_blocks(self, target: int, target_step: int, source: int, source_step: int, size: int, count: int) -> None:
        """Copy `count` blocks of `size` bytes. They begin `target_step` and `source_step` bytes apart."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        ...

    def seconds(self, work: Callable[[], object]) -> float:
        """Device time of the work that `work` puts on the stream, from idle to idle."""
        ...

    def capture(self, work: Callable[[], object]) -> Callable[[], object] | None:
        """A function that puts all the work of `work` on the stream in one launch. None if it cannot be captured."""
        ...


class CudaDevice:
    """The current CUDA device.

    Raises:
        UserError: cuda-bindings is not installed, or there is no GPU.
    """

    def __init__(self) -> None:
        try:
            self._runtime: Any = importlib.import_module(MODULE)
        except ImportError as error:
            raise UserError(f"{MODULE} does not load ({error}): install ivc-export[tensorrt]") from error
        self.stream = int(self._call(self._runtime.cudaStreamCreate))
        kinds = self._runtime.cudaMemcpyKind
        self._up, self._down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._within = kinds.cudaMemcpyDeviceToDevice
        self._used = 0
        self._pinned: dict[str, tuple[int, int]] = {}
        """Addresses and sizes of pinned memory: "staged" for uploads, "written" for writes, "seen" for looks."""

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        status, *found = function(*arguments)
        self._check(status)
        return found[0] if found else None

    def _check(self, status: Any) -> None:
        if int(status):
            _, text = self._runtime.cudaGetErrorString(status)
            raise UserError(
                f"CUDA says: {text.decode()}; check that the GPU and its driver work, and that the GPU is free"
            )

    def allocate(self, size: int) -> int:
        """See Device.allocate.

        Raises:
            UserError: the device does not have so much memory left, or does not work.
        """
        status, address = self._runtime.cudaMalloc(size)
        if int(status) == OUT_OF_MEMORY:
            raise UserError(
                f"the GPU has no {decimal(size)} of memory left: close other programs, or build engines with "
                "smaller maxima"
            )
        self._check(status)
        self._call(self._runtime.cudaMemsetAsync, address, 0, size, self.stream)
        return int(address)

    def free(self, address: int) -> None:
        """As Device.free."""
        self.synchronize()
        self._call(self._runtime.cudaFree, address)

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """As Device.upload."""
        for start in range(0, array.nbytes, PIECE_BYTES):
            size = min(PIECE_BYTES, array.nbytes - start)
            staged = self._stage(size)
            ctypes.memmove(staged, array.ctypes.data + start, size)
            self._call(self._runtime.cudaMemcpyAsync, address + start, staged, size, self._up, self.stream)

    def _stage(self, size: int) -> int:
        """Pinned memory for one copy on the stream. A copy from other memory may read it after the call returned."""
        staged = self._pin("staged", STAGED_BYTES)
        if self._used + size > STAGED_BYTES:
            self.synchronize()
        self._used += size
        return staged + self._used - size

    def _pin(self, name: str, size: int) -> int:
        """Pinned memory of at least `size` bytes. It is kept for the next time."""
        address, held = self._pinned.get(name, (0, 0))
        if held < size:
            if address:
                self.synchronize()  # copies may still use it
                self._call(self._runtime.cudaFreeHost, address)
            address = int(self._call(self._runtime.cudaMallocHost, size))
            self._pinned[name] = (address, size)
        return address

    def write(self, address: int, size: int, fill: Callable[[npt.NDArray[np.uint8]], object]) -> None:
        """As Device.write."""
        if not size:
            return
        self.synchronize()  # the write before may still be under way
        pinned = self._pin("written", size)
        fill(memory(pinned, size))
        self._call(self._runtime.cudaMemcpyAsync, address, pinned, size, self._up, self.stream)

    def __del__(self) -> None:
        """Give back pinned memory and the stream."""
        if not hasattr(self, "_pinned"):  # there is no GPU
            return
        self._runtime.cudaStreamSynchronize(self.stream)
        for address, _ in self._pinned.values():
            self._runtime.cudaFreeHost(address)
        self._runtime.cudaStreamDestroy(self.stream)

    def download(self, address: int, array: npt.NDArray[Any]) -> None:
        """As Device.download."""
        self._call(self._runtime.cudaMemcpyAsync, array.ctypes.data, address, array.nbytes, self._down, self.stream)
        self.synchronize()

    def look(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        """As Device.look."""
        pinned = self._pin("seen", size)
        self._call(self._runtime.cudaMemcpyAsync, pinned, address, size, self._down, self.stream)
        self.synchronize()
        return memory(pinned, size)

    def copy(self, target: int, source: int, size: int) -> None:
        """As Device.copy."""
        self._call(self._runtime.cudaMemcpyAsync, target, source, size, self._within, self.stream)

    def copy_blocks(self, target: int, target_step: int, source: int, source_step: int, size: int, count: int) -> None:
        """As Device.copy_blocks."""
        call = self._runtime.cudaMemcpy2DAsync
        self._call(call, target, target_step, source, source_step, size, count, self._within, self.stream)

    def synchronize(self) -> None:
        """As Device.synchronize."""
        self._call(self._runtime.cudaStreamSynchronize, self.stream)
        self._used = 0

    def seconds(self, work: Callable[[], object]) -> float:
        """As Device.seconds, by events."""
        start, end = (self._call(self._runtime.cudaEventCreate) for _ in range(2))
        self.synchronize()
        self._call(self._runtime.cudaEventRecord, start, self.stream)
        work()
        self._call(self._runtime.cudaEventRecord, end, self.stream)
        self.synchronize()
        milliseconds = self._call(self._runtime.cudaEventElapsedTime, start, end)
        for event in (start, end):
            self._call(self._runtime.cudaEventDestroy, event)
        return float(milliseconds) / 1000

    def capture(self, work: Callable[[], object]) -> CudaGraph | None:
        """As Device.capture."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._runtime.cudaStreamBeginCapture, self.stream, mode)
        try:
            work()
        except UserError:  # it cannot be captured, but the capture must still be ended
            self._runtime.cudaStreamEndCapture(self.stream)
            return None
        status, graph = self._runtime.cudaStreamEndCapture(self.stream)
        if int(status):
            return None
        status, runnable = self._runtime.cudaGraphInstantiate(graph, 0)
        self._call(self._runtime.cudaGraphDestroy, graph)
        return None if int(status) else CudaGraph(self._runtime, runnable, self.stream)


def memory(address: int, size: int) -> npt.NDArray[np.uint8]:
    """Bytes of the host's memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class CudaGraph:
    """A captured graph. It is freed with this object."""

    def __init__(self, runtime: Any, runnable: Any, stream: int) -> None:
        self._runtime, self._runnable, self._stream = runtime, runnable, stream

    def __call__(self) -> None:
        """Put it on the stream.

        Raises:
            UserError: the device does not work.
        """
        (status,) = self._runtime.cudaGraphLaunch(self._runnable, self._stream)
        if int(status):
            raise UserError(f"CUDA cannot launch a decode step ({status}): check that the GPU and its driver work")

    def __del__(self) -> None:
        self._runtime.cudaGraphExecDestroy(self._runnable)


def median_seconds(device: Device, start: Callable[[], object], rounds: int, runs: int) -> float:
    """Device seconds of one run that `start` puts on its stream: the median of rounds of `runs` runs."""

    def row() -> None:
        for _ in range(runs):
            start()

    return statistics.median(device.seconds(row) / runs for _ in range(rounds))


class Buffers:
    """Named memory on a device. It grows as needed, and is freed with this object."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._held: dict[str, tuple[int, int]] = {}

    def get(self, name: str, size: int) -> int:
        """The address of at least `size` bytes. A buffer that grew is zero, and at another address."""
        address, held = self._held.get(name, (0, 0))
        if address == 0 or held < size:
            if address:
                del self._held[name]
                self._device.free(address)
            held = max(size, 1)  # an empty tensor needs an address too
            address = self._device.allocate(held)
            self._held[name] = (address, held)
        return address

    @property
    def nbytes(self) -> int:
        """Size of all memory held, in bytes."""
        return sum(held for _, held in self._held.values())

    def __del__(self) -> None:
        for address, _ in self._held.values():
            self._device.free(address)
