"""What a device could do at best: its ceilings, measured, and the times that follow from them.

A stage takes at least the larger of its FLOPs by the matmul ceiling and its bytes by the copy bandwidth (Williams et
al. 2009, "Roofline"). FLOPs are counted on the bundle's graphs, two for each multiply-add of a product, attention in
full although half of it is masked. Bytes are the weights that a graph reads once, and in a decode step the valid rows
of the caches.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnx_ir as ir

from ivc_export.bench.engines import open_engine
from ivc_export.bench.prompts import Prompt
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, IR_VERSION, OPSET, GraphName
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.exporter.estimate import COUNTED, empty_caches
from ivc_export.graph.counting import count
from ivc_export.runtime.onnxruntime.fused_graphs import PROVIDERS, Provider
from ivc_export.runtime.onnxruntime.library import load_onnxruntime
from ivc_export.runtime.tensorrt.device import Buffers, median_seconds
from ivc_export.runtime.tensorrt.engine import Engine, Tensor
from ivc_export.runtime.tensorrt.session import TensorrtSession

SIZES: Mapping[str, tuple[int, int]] = {"cuda": (8192, 2**30), "cpu": (1024, 2**27)}
"""Side of the matmul's matrices, and bytes of the copy, by device."""
REPEATS, WARMUPS = 10, 3


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second, read and written, of a large copy, and FLOPs a second of a large matmul.

    source: what ran them.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: FloatName
    source: str

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        copied = max(self.bytes_per_second, other.bytes_per_second)
        return replace(
            self, bytes_per_second=copied, flops_per_second=max(self.flops_per_second, other.flops_per_second)
        )

    def seconds(self, flops: float, size: float) -> float:
        """The least time for so many FLOPs and bytes."""
        return max(flops / self.flops_per_second, size / self.bytes_per_second)


def measure_ceilings(device: str, dtype: FloatName, session: TensorrtSession | None = None) -> Ceilings:
    """Measure on the GPU by torch where that can use it, else by the TensorRT of a session, or by onnxruntime; on the
    CPU by onnxruntime.
    """
    if device == "cuda" and importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return torch_ceilings(dtype)
    if session is not None:
        return tensorrt_ceilings(session)
    return onnxruntime_ceilings("cuda" if device == "cuda" else "cpu", dtype)


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs: a ceiling is what can be reached."""
    found = []
    for number in range(WARMUPS + REPEATS):
        start = time.perf_counter()
        call()
        if number >= WARMUPS:
            found.append(time.perf_counter() - start)
    return min(found)


def torch_ceilings(dtype: FloatName) -> Ceilings:
    """On the GPU by torch."""
    import torch

    side, size = SIZES["cuda"]

    def timed(call: Callable[[], object]) -> float:
        def run() -> None:
            for _ in range(REPEATS):
                call()
            torch.cuda.synchronize()

        return best(run) / REPEATS

    def copied() -> float:
        source = torch.empty(size, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * size / timed(lambda: target.copy_(source))

    def multiplied() -> float:
        matrix = torch.randn(side, side, device="cuda").to(getattr(torch, dtype))
        product = torch.empty_like(matrix)
        return 2 * side**3 / timed(lambda: torch.mm(matrix, matrix, out=product))

    found = Ceilings(copied(), multiplied(), dtype, f"torch {torch.__version__}")
    torch.cuda.empty_cache()
    return found


PRODUCTS: WeakKeyDictionary[TensorrtSession, Engine] = WeakKeyDictionary()
"""Engines of one MatMul, built once for a session."""


def tensorrt_ceilings(session: TensorrtSession) -> Ceilings:
    """By a copy within the device, and by an engine of one MatMul in the dtype of the session's engines."""
    (side, size), device = SIZES["cuda"], session.device

    def timed(start: Callable[[], object]) -> float:
        return min(median_seconds(device, start, 1, REPEATS) for _ in range(WARMUPS + REPEATS))

    def copied() -> float:
        buffers = Buffers(device)
        target, source = buffers.get("target", size), buffers.get("source", size)
        return 2 * size / timed(lambda: device.copy(target, source, size))

    def multiplied() -> float:
        buffers, shape = Buffers(device), (side, side)
        if session not in PRODUCTS:
            PRODUCTS[session] = open_engine(session, one_node("MatMul", shape, 2, session.dtype), {"prefill": {}})
        engine = PRODUCTS[session]
        values = np.random.default_rng(0).standard_normal(shape, np.float32).astype(engine.dtypes["x"])
        x = Tensor(buffers.get("x", values.nbytes), shape, values.dtype)
        device.upload(x.address, values)
        engine.use_scratch(buffers.get("scratch", engine.scratch))
        return 2 * side**3 / timed(lambda: engine.run("prefill", {"x": x}, buffers, "product"))

    (version,) = session.versions.values()
    return Ceilings(copied(), multiplied(), session.dtype, f"{session.backend} {version}")


def onnxruntime_ceilings(device: Provider, dtype: FloatName) -> Ceilings:
    """By onnxruntime's operators Neg and MatMul."""
    onnxruntime, (side, size), element = load_onnxruntime(), SIZES[device], FLOATS[dtype].numpy

    def timed(op_type: str, shape: tuple[int, ...], inputs: int) -> float:
        content = ir.to_proto(one_node(op_type, shape, inputs, dtype)).SerializeToString()
        session: Any = onnxruntime.InferenceSession(content, providers=[PROVIDERS[device]])
        values = np.random.default_rng(0).standard_normal(shape, np.float32).astype(element)
        binding = session.io_binding()
        x, y = (onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0) for array in (values, values.copy()))
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)  # a binding keeps neither array alive
        return best(lambda: session.run_with_iobinding(binding))

    copied = 2 * size / timed("Neg", (size // element.itemsize,), 1)
    multiplied = 2 * side**3 / timed("MatMul", (side, side), 2)
    return Ceilings(copied, multiplied, dtype, f"onnxruntime {onnxruntime.__version__}")


def one_node(op_type: str, shape: tuple[int, ...], inputs: int, dtype: FloatName) -> ir.Model:
    """A graph that applies an operator to `x` as each of its inputs; `y` has the same shape."""
    element = FLOATS[dtype].onnx
    x = ir.val("x", dtype=element, shape=ir.Shape(shape))
    node = ir.node(op_type, [x] * inputs)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(element)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": OPSET}, name=op_type.lower())
    return ir.Model(graph, ir_version=IR_VERSION)


@dataclass(frozen=True)
class Work:
    """FLOPs of a prefill by graph; parameters that each graph reads, and values that a cache has a row, all layers."""

    flops: Mapping[GraphName, int]
    parameters: Mapping[GraphName, int]
    row: int

    def ideal(self, ceilings: Ceilings, cache_bytes: int, tokens: int) -> dict[str, float]:
        """Seconds at least: of vision, of prefill (prefix and decoder), and of the middle one of `tokens` decode steps.

        cache_bytes: of the caches' rows after the prefill.
        """
        size = FLOATS[ceilings.dtype].bytes
        graphs = {name: ceilings.seconds(self.flops[name], size * self.parameters[name]) for name in GRAPH_NAMES}
        read = size * (self.parameters["prefix"] + self.parameters["decoder"] + self.row * tokens / 2) + cache_bytes
        return {
            "vision": graphs["vision"],
            "prefill": graphs["prefix"] + graphs["decoder"],
            "decode": read / ceilings.bytes_per_second,
        }


class Workload:
    """Counts on a bundle's graphs."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        models = {name: bundle.graph(name) for name in GRAPH_NAMES}
        self.parameters = {name: parameters(model) for name, model in models.items()}
        self._graphs: dict[GraphName, onnx.ModelProto] = {
            name: ir.to_proto(COUNTED(model).model) for name, model in models.items()
        }

    def work(self, prompt: Prompt, kept: int) -> Work:
        """Of a prefill that keeps `kept` visual tokens."""
        m, text = self.bundle.manifest, len(prompt.tokens) - prompt.visual
        axes = {"S": len(prompt.tokens), "L": prompt.visual, "T": text, "Q": text, "R": 1, "M": text + kept}
        axes |= empty_caches(self._graphs.values()) | {"H": 1, "seeds": 1}  # no product depends on these two
        given = {"vision": prompt.picture.inputs}
        found = {name: count(graph, axes, given.get(name)).flops for name, graph in self._graphs.items()}
        row = 2 * m.decoder.layers * m.decoder.kv_heads * m.decoder.head_dim
        return Work(found, self.parameters, row)


def parameters(model: ir.Model) -> int:
    """Numbers in a graph's weights; constants are too few to count."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.size for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
