"""Measures from outside how much memory a side takes, on the host and on the GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path

CUDA_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
EVERY = 0.003
"""Seconds between two measurements."""


def host_bytes() -> int:
    """Memory of this process that is not backed by a file (RssAnon). Mapped weights do not count. 0 if Linux does not
    tell."""
    return status_bytes("RssAnon")


def host_peak_bytes() -> int:
    """The largest memory that this process has had, with mapped files (VmHWM)."""
    return status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return 0
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines() if ":" in line)
    return 1024 * int(lines.get(field, "0").split()[0])


def device_counter() -> Callable[[], int] | None:
    """A function that gives the bytes in use on the GPU, by all processes. None if neither torch nor a CUDA runtime can
    tell."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():

            def in_use() -> int:
                free, total = torch.cuda.mem_get_info()
                return total - free

            return in_use
    for name in CUDA_RUNTIMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if memory_of(library) is not None:
            return lambda library=library: memory_of(library) or 0  # type: ignore[misc]
    return None


def memory_of(library: ctypes.CDLL) -> int | None:
    """Bytes in use on the GPU, from a CUDA runtime. None if it cannot tell."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) != 0:
        return None
    return total.value - free.value


class Growth:
    """The memory that one side holds, and the most that it has held: growth while it opens and runs and all others are
    idle.

    Allocators keep the memory they have had, so the most is over all runs so far.

    watched: whether to measure also in between, every few milliseconds in a thread of its own. This is not possible on
    a GPU: while a CUDA graph is captured, other threads must not make some calls. Allocators there keep their memory
    anyway.
    """

    def __init__(self, counter: Callable[[], int], watched: bool = True) -> None:
        self._counter, self._watched = counter, watched
        self.held = self.most = 0

    @contextmanager
    def grow(self) -> Iterator[None]:
        """Count the growth of memory within the block."""
        before = top = self._counter()
        done = threading.Event()

        def watch() -> None:
            nonlocal top
            while not done.wait(EVERY):
                top = max(top, self._counter())

        watcher = threading.Thread(target=watch, daemon=True)
        if self._watched:
            watcher.start()
        try:
            yield
        finally:
            done.set()
            if self._watched:
                watcher.join()
            after = self._counter()
            self.most = max(self.most, self.held + max(top, after) - before)
            self.held += after - before


class Footprints:
    """One side's memory on the host, and on the GPU if it can be counted there."""

    def __init__(self, device: Callable[[], int] | None) -> None:
        self.host = Growth(host_bytes)
        self.device = Growth(device, watched=False) if device is not None else None

    @contextmanager
    def grow(self) -> Iterator[None]:
        """Count both, as Growth.grow does."""
        with ExitStack() as stack:
            stack.enter_context(self.host.grow())
            if self.device is not None:
                stack.enter_context(self.device.grow())
            yield

    def copy(self) -> Footprints:
        """The footprints of another side that starts with the same memory."""
        found = copy(self)
        found.host, found.device = copy(self.host), copy(self.device)
        return found
