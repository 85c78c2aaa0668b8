"""Computes the best times that a device could reach, from its limits, which are measured.

A stage takes at least the larger of two times: its FLOPs at the measured speed of matrix products, and its bytes at the
measured copy bandwidth (Williams et al. 2009, "Roofline"). FLOPs are counted on the bundle's graphs: two for each
multiply-add of a product, and attention in full, although half of it is masked. Bytes are those of the weights that a
graph reads once; in a decode step also those of the valid rows of the caches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ivc_export.bench.prompts import Prompt
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.dtypes import FLOATS, ONNX_FLOATS, FloatName
from ivc_export.exporter.estimate import COUNTED, empty_caches
from ivc_export.graph.counting import count
from ivc_export.runtime.backends import find_backend
from ivc_export.runtime.interface import Session
from ivc_export.runtime.probes import CEILING_RUNS, SIZES, Ceilings, best


def measure_ceilings(device: str, dtype: FloatName, session: Session | None = None) -> Ceilings:
    """Measure the limits of the device. On the GPU torch measures, or else the session's backend or onnxruntime; on the
    CPU torch is not needed."""
    if device == "cuda" and importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return torch_ceilings(dtype)
    own = find_backend(session.backend).ceilings if session is not None else None
    if session is not None and own is not None:
        return own(session)
    from ivc_export.runtime.onnxruntime.probes import onnxruntime_ceilings

    return onnxruntime_ceilings("cuda" if device == "cuda" else "cpu", dtype)


def torch_ceilings(dtype: FloatName) -> Ceilings:
    """Measure the limits of the GPU by torch."""
    import torch

    side, size = SIZES["cuda"]

    def timed(call: Callable[[], object]) -> float:
        def run() -> None:
            for _ in range(CEILING_RUNS):
                call()
            torch.cuda.synchronize()

        return best(run) / CEILING_RUNS

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


@dataclass(frozen=True)
class Work:
    """FLOPs of a prefill by graph, what each graph reads, and how many values one row has in the caches of all layers.

    parameters: number of weights that are floats of the computing dtype. integer_bytes: bytes of other weights, as
    stored.
    """

    flops: Mapping[GraphName, int]
    parameters: Mapping[GraphName, int]
    integer_bytes: Mapping[GraphName, int]
    row: int

    def ideal(self, ceilings: Ceilings, cache_bytes: int, tokens: int) -> dict[str, float]:
        """The least seconds of vision, of the prefill (prefix and decoder), and of the middle one of `tokens` decode
        steps.

        cache_bytes: bytes of the caches' rows after the prefill.
        """
        size = FLOATS[ceilings.dtype].bytes
        weights = {name: size * self.parameters[name] + self.integer_bytes[name] for name in GRAPH_NAMES}
        graphs = {name: ceilings.seconds(self.flops[name], weights[name]) for name in GRAPH_NAMES}
        read = weights["prefix"] + weights["decoder"] + size * self.row * tokens / 2 + cache_bytes
        return {
            "vision": graphs["vision"],
            "prefill": graphs["prefix"] + graphs["decoder"],
            "decode": read / ceilings.bytes_per_second,
        }


class Workload:
    """Counts work on a bundle's graphs."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        models = {name: bundle.graph(name) for name in GRAPH_NAMES}
        self.parameters = {name: sum(t.size for t in weights_of(model, True)) for name, model in models.items()}
        self.integer_bytes = {name: sum(t.nbytes for t in weights_of(model, False)) for name, model in models.items()}
        self._graphs: dict[GraphName, onnx.ModelProto] = {
            name: ir.to_proto(COUNTED(model).model) for name, model in models.items()
        }

    def work(self, prompt: Prompt, kept: int) -> Work:
        """The work of a prefill that keeps `kept` visual tokens."""
        m, text = self.bundle.manifest, len(prompt.tokens) - prompt.visual
        axes = {"S": len(prompt.tokens), "L": prompt.visual, "T": text, "Q": text, "R": 1, "M": text + kept}
        axes |= empty_caches(self._graphs.values()) | {"H": 1, "seeds": 1}  # no product depends on these two
        given = {"vision": prompt.picture.inputs}
        found = {name: count(graph, axes, given.get(name)).flops for name, graph in self._graphs.items()}
        row = m.decoder.layers * m.decoder.row_values
        return Work(found, self.parameters, self.integer_bytes, row)


def weights_of(model: ir.Model, floats: bool) -> Iterator[ir.ExternalTensor]:
    """The weights of a graph that are floats, or those that are not. Constants are too few to count."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and (tensor.dtype in ONNX_FLOATS) == floats:
            yield tensor
