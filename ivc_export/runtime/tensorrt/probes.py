"""Times selection and compaction alone as engines, and measures the limits of a device by TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.lowering import lower
from ivc_export.runtime.interface import Session
from ivc_export.runtime.plan import Run, plan_run
from ivc_export.runtime.probes import (
    CEILING_RUNS,
    SELECTION_RUNS,
    SIZES,
    WARMUPS,
    Ceilings,
    SelectionTimes,
    compaction_feeds,
    compaction_part,
    extents,
    fix_sizes,
    one_node,
    selection_feeds,
    selection_part,
)
from ivc_export.runtime.tensorrt.device import Buffers, median_seconds
from ivc_export.runtime.tensorrt.engine import Engine, Tensor
from ivc_export.runtime.tensorrt.session import TensorrtSession
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.graphs import typed
from ivc_export.tensorrt.profiles import Extents, profiles

RUNS = 20
"""How many runs of an engine, one after another, give a single time."""


def open_engine(session: TensorrtSession, model: ir.Model, profiles: Mapping[str, Extents]) -> Engine:
    """Build a graph in the same way as the session's engines, and open it. Nothing is written to the bundle.

    Raises:
        UserError: TensorRT refuses it.
    """
    # the options of the engines' own build, except its timing cache
    options = replace(session.recipe.options(session.capability, session.dtype), timing_cache=None)
    with TemporaryDirectory() as work:  # the bundle may be read-only
        plan = compile_graph(session.trt, model, profiles.values(), options, Path(work))
        path = Path(work) / f"{model.graph.name}.plan"
        path.write_bytes(plan)
        return Engine(session.trt, path, list(profiles), session.device, session.runtime)


class EngineParts:
    """Selection and compaction as engines, built in the same way as a session's.

    Raises:
        UserError: TensorRT refuses one of them.
    """

    def __init__(self, session: TensorrtSession) -> None:
        bundle, recipe, m = session.bundle, session.recipe, session.bundle.manifest
        models = {
            "select": selection_part(typed(bundle, "prefix", session.dtype)),
            "compact": compaction_part(typed(bundle, "decoder", session.dtype)),
        }
        fix_sizes(models["select"], m)
        extents = profiles(bundle, "prefix", recipe)  # the decoder has the same
        self.buffers = Buffers(session.device)
        self.engines: dict[str, Engine] = {}
        for name, model in models.items():
            model.graph.name = name
            part = lower(model, "plugin" if recipe.plugin is not None else "native")
            self.engines[name] = open_engine(session, part, extents)
        scratch = self.buffers.get("scratch", max(engine.scratch for engine in self.engines.values()))
        for engine in self.engines.values():
            engine.use_scratch(scratch)

    def seconds(self, name: str, stage: str, feeds: Mapping[str, npt.NDArray[Any]], sizes: Mapping[str, int]) -> float:
        """Seconds of one run on `feeds`, with random values for missing inputs, in the profile `stage`."""
        engine, generator = self.engines[name], np.random.default_rng(0)
        inputs = {}
        for tensor, shape in engine.inputs().items():
            array = feeds.get(tensor)
            if array is None:
                array = generator.standard_normal([sizes["S"] if axis < 0 else axis for axis in shape], np.float32)
            array = np.ascontiguousarray(array, engine.dtypes[tensor])
            if tensor == "keep_count":  # a shape input is in host memory, in `feeds`
                inputs[tensor] = Tensor(array.ctypes.data, array.shape, array.dtype)
                continue
            address = self.buffers.get(f"{name}/{tensor}", array.nbytes)
            engine.device.upload(address, array)
            inputs[tensor] = Tensor(address, array.shape, array.dtype)
        engine.run(stage, inputs, self.buffers, f"{name}/{stage}")
        context, device = engine.contexts[stage], engine.device
        return median_seconds(device, lambda: context.execute_async_v3(device.stream), SELECTION_RUNS, RUNS)


PARTS: WeakKeyDictionary[Session, EngineParts] = WeakKeyDictionary()
"""Built once for each session."""


def engine_times(session: Session, plan: Run) -> SelectionTimes:
    """Times on TensorRT, by events. A decode step runs both engines' nodes on one row, without caches."""
    assert isinstance(session, TensorrtSession)
    if session not in PARTS:
        PARTS[session] = EngineParts(session)
    parts, m = PARTS[session], session.bundle.manifest
    one = plan_run(m, np.zeros(1, np.int32), (), 0, 1.0)

    def both(run: Run, stage: str) -> tuple[float, float]:
        select, compact, sizes = selection_feeds(run), compaction_feeds(run, 0), extents(m, run, 0)
        return parts.seconds("select", stage, select, sizes), parts.seconds("compact", stage, compact, sizes)

    seconds = both(plan, "prefill")
    return SelectionTimes(*seconds, decode=sum(both(one, "decode")))


PRODUCTS: WeakKeyDictionary[TensorrtSession, Engine] = WeakKeyDictionary()
"""Engines of one MatMul, built once for each session."""


def tensorrt_ceilings(session: Session) -> Ceilings:
    """The limits by a copy within the device, and by an engine of one MatMul in the dtype of the session's engines."""
    assert isinstance(session, TensorrtSession)
    (side, size), device = SIZES["cuda"], session.device

    def timed(start: Callable[[], object]) -> float:
        return min(median_seconds(device, start, 1, CEILING_RUNS) for _ in range(WARMUPS + CEILING_RUNS))

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
