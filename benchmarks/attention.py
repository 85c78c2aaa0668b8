"""The attention kernels beside PyTorch's scaled_dot_product_attention, in one run on one GPU; microseconds a call.

    cmake -S graphs/plugin -B build && cmake --build build --target ivc_kernels
    python -m benchmarks.attention build/libivc_kernels.so [--output FILE]

Decoder layers of Qwen2-VL-2B's size (12 heads, 2 of keys and values, head size 128): prefill over fresh rows, some rows
over a cache, and a decode step, which appends. Encoder layers of 16 heads of size 80. All in float16, on random
numbers. Each time is the median of 50 runs of a CUDA graph of ten calls, by events; caches are warm for either side.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.native.attention import IvcAttention, IvcEncoder, IvcStrides

HEADS, KV_HEADS, SIZE, CAPACITY = 12, 2, 128, 4480
PREFILLS = (256, 600, 1088, 2176, 4160)
FOLLOWING = ((64, 2048), (200, 2048))
CACHED = (1088, 2176, 4224)
ENCODER_HEADS, ENCODER_SIZE = 16, 80
PATCHES = (1024, 4096, 16384)
CALLS, RUNS, WARM = 10, 50, 5
FLOAT16 = 1

Call = Callable[[], object]
B = TypeVar("B", bound="Bench")


class Bench:
    """torch, imported by name since types need none of it, and the library of kernels."""

    def __init__(self, kernels: Path) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.sdpa: Any = importlib.import_module("torch.nn.functional").scaled_dot_product_attention
        self.kernels = ctypes.CDLL(str(kernels.absolute()))
        self.kernels.ivcAttendWorkspace.restype = ctypes.c_size_t
        self.torch.manual_seed(0)

    def random(self, *shape: int) -> Any:
        """A float16 tensor on the GPU."""
        return self.torch.randn(*shape, device="cuda", dtype=self.torch.float16)

    def call(self, name: str, structs: tuple[ctypes.Structure, ...], *tensors: Any) -> Call:
        """A call on torch's current stream."""
        given = [ctypes.byref(struct) for struct in structs]

        def run() -> None:
            stream = self.torch.cuda.current_stream().cuda_stream
            pointers = [ctypes.c_void_p(x.data_ptr() if x is not None else 0) for x in tensors]
            status = getattr(self.kernels, name)(*given, *pointers, ctypes.c_void_p(stream))
            assert status == 0, f"{name} returned {status}"

        return run

    def microseconds(self, call: Call) -> float:
        """Of one call, on a stream of its own."""
        return self.of_one([call] * CALLS)

    def of_one(self, calls: list[Call]) -> float:
        """Microseconds of one of several calls, one behind the other."""
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

    def decoder(self, rows: int, past: int) -> dict[str, float]:
        """`rows` fresh rows over `past` cached ones, and appended."""
        torch = self.torch
        q, k, v = self.random(HEADS, rows, SIZE), self.random(KV_HEADS, rows, SIZE), self.random(KV_HEADS, rows, SIZE)
        caches = self.random(KV_HEADS, CAPACITY, SIZE), self.random(KV_HEADS, CAPACITY, SIZE)
        length = torch.tensor([past], device="cuda", dtype=torch.int32)
        strides = IvcStrides(0, rows * SIZE, SIZE)
        extents = (rows, CAPACITY, HEADS, KV_HEADS, SIZE)
        struct = IvcAttention(*extents, SIZE**-0.5, FLOAT16, 1, strides, strides, strides)
        workspace = torch.empty(self.kernels.ivcAttendWorkspace(ctypes.byref(struct)), device="cuda", dtype=torch.uint8)
        y = torch.empty(rows, HEADS * SIZE, device="cuda", dtype=torch.float16)
        ours = self.call("ivcAttendInPlace", (struct,), q, k, v, *caches, length, y, workspace)
        keys, values = (torch.cat([cache[:, :past], x], 1)[None] for cache, x in zip(caches, (k, v), strict=True))
        mask = torch.ones(rows, past + rows, dtype=torch.bool, device="cuda").tril(past)
        form = {"is_causal": True} if past == 0 else {} if rows == 1 else {"attn_mask": mask}

        def theirs() -> Any:
            return self.sdpa(q[None], keys, values, enable_gqa=True, **form)

        return self.compare(ours, theirs, y)

    def encoder(self, rows: int) -> dict[str, float]:
        """One picture of `rows` patches."""
        q, k, v = (self.random(1, ENCODER_HEADS, rows, ENCODER_SIZE) for _ in range(3))
        strides = IvcStrides(ENCODER_HEADS * rows * ENCODER_SIZE, rows * ENCODER_SIZE, ENCODER_SIZE)
        extents = (1, ENCODER_HEADS, rows, ENCODER_SIZE)
        struct = IvcEncoder(*extents, ENCODER_SIZE**-0.5, FLOAT16, 0, strides, strides, strides)
        y = self.torch.empty(rows, ENCODER_HEADS * ENCODER_SIZE, device="cuda", dtype=self.torch.float16)
        ours = self.call("ivcEncodeAttend", (struct,), q, k, v, None, y)
        return self.compare(ours, lambda: self.sdpa(q, k, v), y)

    def compare(self, ours: Call, theirs: Callable[[], Any], y: Any) -> dict[str, float]:
        """Microseconds of both, and how far their answers are apart."""
        y.fill_(float("nan"))
        ours()
        apart = float((theirs()[0].permute(1, 0, 2).reshape(y.shape) - y).abs().max())
        assert apart < 5e-3, f"answers are {apart} apart"
        found = {"ours": self.microseconds(ours), "sdpa": self.microseconds(theirs)}
        return found | {"times": round(found["ours"] / found["sdpa"], 2), "apart": round(apart, 5)}


def run(description: str | None, make: Callable[[Path], B], measure: Callable[[B], dict[str, Any]]) -> None:
    """Measure the kernels of the library that the command names, print what was found, and write it where asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    bench = make(options.kernels)
    found: dict[str, Any] = {
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} build/libivc_kernels.so",
        "gpu": bench.torch.cuda.get_device_name(),
        "versions": {"torch": bench.torch.__version__, "cuda": bench.torch.version.cuda},
        "unit": "microseconds",
        **measure(bench),
    }
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def measure(bench: Bench) -> dict[str, Any]:
    """All sizes."""
    return {
        "prefill, rows": {str(rows): bench.decoder(rows, 0) for rows in PREFILLS},
        "rows over a cache": {f"{rows} + {past}": bench.decoder(rows, past) for rows, past in FOLLOWING},
        "decode, cached rows": {str(past): bench.decoder(1, past) for past in CACHED},
        "encoder, patches": {str(rows): bench.encoder(rows) for rows in PATCHES},
    }


if __name__ == "__main__":
    run(__doc__, Bench, measure)
