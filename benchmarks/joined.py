"""The kernels over joined rows on a GPU, microseconds a call.

    cmake -S graphs/plugin -B build && cmake --build build --target ivc_kernels
    python -m benchmarks.joined build/libivc_kernels.so [--output FILE]

A decode step's split, rotation, append and attention in one launch, beside PyTorch's attention alone over rows that are
turned and appended already; and the split and rotation of many rows. In float16, on random numbers. Each time is the
median of 50 runs of a CUDA graph of a call for each of 28 layers, which have caches of their own, as a model has.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from benchmarks.attention import FLOAT16, Bench, Call, run
from tests.native.joined import EPSILON, IvcJoined, IvcJoinedRows

LAYERS = 28
DECODERS = ((12, 2, 128, 4480), (32, 8, 128, 4480))
"""Heads, those of keys and values, their size, and the caches' rows."""
CACHED = (24, 340, 1112, 2176, 4224)
MANY = ((1024, 16, 16, 80), (4096, 16, 16, 80), (16384, 16, 16, 80), (1088, 12, 2, 128), (4160, 12, 2, 128))
"""Rows, heads, those of keys and values, and their size."""


class JoinedBench(Bench):
    """The same over joined rows."""

    def __init__(self, kernels: Path) -> None:
        super().__init__(kernels)
        self.kernels.ivcAttendJoinedWorkspace.restype = ctypes.c_size_t

    def rows(self, joined: IvcJoined, x: Any) -> IvcJoinedRows:
        """With angles at random; all of them stay until the next ones are made."""
        tables = (self.torch.rand(joined.angle_rows, joined.head_dim // 2, device="cuda") for _ in range(2))
        self.held = [x, *tables]
        return IvcJoinedRows(*(tensor.data_ptr() for tensor in self.held), None, None)

    def step(self, heads: int, kv_heads: int, size: int, capacity: int, past: int) -> dict[str, float]:
        """A decode step."""
        torch = self.torch
        struct = IvcJoined(1, 1, heads, kv_heads, size, 0, FLOAT16, EPSILON, capacity, size**-0.5)
        x, y = self.random(1, (heads + 2 * kv_heads) * size), self.random(1, heads * size)
        rows = self.rows(struct, x)
        caches = [[self.random(kv_heads, capacity, size) for _ in range(2)] for _ in range(LAYERS)]
        length = torch.tensor([past], device="cuda", dtype=torch.int32)
        counters = torch.zeros(kv_heads, device="cuda", dtype=torch.int32)
        bytes_needed = self.kernels.ivcAttendJoinedWorkspace(ctypes.byref(struct))
        workspace = torch.empty(bytes_needed, device="cuda", dtype=torch.uint8)

        def ours(layer: int) -> Call:
            return self.call("ivcAttendJoined", (struct, rows), *caches[layer], length, y, workspace, counters)

        q = self.random(1, heads, 1, size)
        seen = [[cache[None, :, : past + 1].contiguous() for cache in pair] for pair in caches]

        def theirs(layer: int) -> Call:
            return lambda: self.sdpa(q, *seen[layer], enable_gqa=True)

        return {
            "ours": self.of_one([ours(i) for i in range(LAYERS)]),
            "sdpa alone": self.of_one([theirs(i) for i in range(LAYERS)]),
        }

    def turn(self, rows: int, heads: int, kv_heads: int, size: int) -> float:
        """The split and rotation of many rows."""
        struct = IvcJoined(rows, rows, heads, kv_heads, size, 0, FLOAT16, EPSILON, 0, 1.0)
        given = self.rows(struct, self.random(rows, (heads + 2 * kv_heads) * size))
        parts = [self.random(rows, count * size) for count in (heads, kv_heads, kv_heads)]
        return self.microseconds(self.call("ivcTurnHeads", (struct, given), *parts))


def measure(bench: JoinedBench) -> dict[str, Any]:
    """All sizes."""
    found: dict[str, Any] = {}
    for heads, kv_heads, size, capacity in DECODERS:
        name = f"decode step, {heads} heads, {kv_heads} of keys, size {size}, caches of {capacity}; rows cached"
        found[name] = {str(past): bench.step(heads, kv_heads, size, capacity, past) for past in CACHED}
    found["split and rotation"] = {
        f"{rows} rows, {heads} heads, {kv_heads} of keys, size {size}": bench.turn(rows, heads, kv_heads, size)
        for rows, heads, kv_heads, size in MANY
    }
    return found


if __name__ == "__main__":
    run(__doc__, JoinedBench, measure)
