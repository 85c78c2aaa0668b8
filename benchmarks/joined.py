"""The kernels over joined rows on a GPU, microseconds a call.

    cmake -S graphs/plugin -B build && cmake --build build --target ivc_kernels
    python -m benchmarks.joined build/libivc_kernels.so [--output FILE]

A decode step's split, rotation, append and attention in one launch, beside PyTorch's attention alone over rows that are
turned and appended already; and the split and rotation of many rows. In float16, on random numbers. Each time is the
median of 50 runs of a CUDA graph of a call for each of 28 layers, which have caches of their own, as a model has.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path
from typing import Any

from benchmarks.attention import FLOAT16, RUNS, WARM, Bench, Call
from tests.native.joined import EPSILON, IvcJoined, IvcJoinedRows

LAYERS = 28
DECODERS = ((12, 2, 128, 4480), (32, 8, 128, 4480))
"""Heads, those of keys and values, their size, and the caches' rows."""
CACHED = (24, 340, 1112, 2176, 4224)
MANY = ((1024, 16, 16, 80), (4096, 16, 16, 80), (16384, 16, 16, 80), (1088, 12, 2, 128), (4160, 12, 2, 128))
"""Rows, heads, those of keys and values, and their size."""


class JoinedBench(Bench):
    """The same over joined rows."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        self.library.ivcAttendJoinedWorkspace.restype = ctypes.c_size_t

    def layers(self, calls: list[Call]) -> float:
        """Microseconds of one of several calls, each of another layer."""
        cuda = self.torch.cuda
        stream, graph = cuda.Stream(), cuda.CUDAGraph()
        with cuda.stream(stream):
            calls[0]()
        stream.synchronize()
        with cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times: list[float] = []
        with cuda.stream(stream):
            for i in range(WARM + RUNS):
                start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
                start.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                if i >= WARM:
                    times.append(start.elapsed_time(end) / len(calls) * 1000)
        return round(sorted(times)[RUNS // 2], 2)

    def rows(self, joined: IvcJoined, x: Any) -> IvcJoinedRows:
        """With angles at random."""
        self.angles = [self.torch.rand(joined.angle_rows, joined.head_dim // 2, device="cuda") for _ in range(2)]
        return IvcJoinedRows(x.data_ptr(), *(table.data_ptr() for table in self.angles), None, None)

    def step(self, heads: int, kv_heads: int, size: int, capacity: int, past: int) -> dict[str, float]:
        """A decode step."""
        torch = self.torch
        struct = IvcJoined(1, 1, heads, kv_heads, size, 0, FLOAT16, EPSILON, capacity, size**-0.5)
        x, y = self.random(1, (heads + 2 * kv_heads) * size), self.random(1, heads * size)
        rows = self.rows(struct, x)
        caches = [[self.random(kv_heads, capacity, size) for _ in range(2)] for _ in range(LAYERS)]
        length = torch.tensor([past], device="cuda", dtype=torch.int32)
        counters = torch.zeros(kv_heads, device="cuda", dtype=torch.int32)
        bytes_needed = self.library.ivcAttendJoinedWorkspace(ctypes.byref(struct))
        workspace = torch.empty(bytes_needed, device="cuda", dtype=torch.uint8)

        def ours(layer: int) -> Call:
            def run() -> None:
                tensors = (*caches[layer], length, y, workspace, counters)
                pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
                stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
                status = self.library.ivcAttendJoined(ctypes.byref(struct), ctypes.byref(rows), *pointers, stream)
                assert status == 0, f"ivcAttendJoined returned {status}"

            return run

        q = self.random(1, heads, 1, size)
        seen = [[cache[None, :, : past + 1].contiguous() for cache in pair] for pair in caches]

        def theirs(layer: int) -> Call:
            return lambda: self.sdpa(q, *seen[layer], enable_gqa=True)

        return {
            "ours": self.layers([ours(i) for i in range(LAYERS)]),
            "sdpa alone": self.layers([theirs(i) for i in range(LAYERS)]),
        }

    def turn(self, rows: int, heads: int, kv_heads: int, size: int) -> float:
        """The split and rotation of many rows."""
        struct = IvcJoined(rows, rows, heads, kv_heads, size, 0, FLOAT16, EPSILON, 0, 1.0)
        given = self.rows(struct, x := self.random(rows, (heads + 2 * kv_heads) * size))
        parts = [self.random(rows, count * size) for count in (heads, kv_heads, kv_heads)]

        def run() -> None:
            pointers = [ctypes.c_void_p(part.data_ptr()) for part in parts]
            stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
            status = self.library.ivcTurnHeads(ctypes.byref(struct), ctypes.byref(given), *pointers, stream)
            assert status == 0, f"ivcTurnHeads returned {status}"

        found = self.microseconds(run)
        del x
        return found


def main() -> None:
    """Run all, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    bench = JoinedBench(options.library)
    found: dict[str, Any] = {
        "command": "python -m benchmarks.joined build/libivc_kernels.so",
        "gpu": bench.torch.cuda.get_device_name(),
        "versions": {"torch": bench.torch.__version__, "cuda": bench.torch.version.cuda},
        "unit": "microseconds",
    }
    for heads, kv_heads, size, capacity in DECODERS:
        name = f"decode step, {heads} heads, {kv_heads} of keys, size {size}, caches of {capacity}; rows cached"
        found[name] = {str(past): bench.step(heads, kv_heads, size, capacity, past) for past in CACHED}
    found["split and rotation"] = {
        f"{rows} rows, {heads} heads, {kv_heads} of keys, size {size}": bench.turn(rows, heads, kv_heads, size)
        for rows, heads, kv_heads, size in MANY
    }
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
