"""What selection and compaction take by themselves: their nodes alone, as a backend lowers them, on random values."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.bench.engines import open_engine
from ivc_export.contract.manifest import Manifest
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering import lower
from ivc_export.lowering.precision.widen_floats import WidenFloatsPass
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.fused_graphs import PROVIDERS, Provider, register
from ivc_export.runtime.onnxruntime.library import SILENT, load_onnxruntime
from ivc_export.runtime.plan import Run, plan_run
from ivc_export.runtime.tensorrt.device import Buffers, median_seconds
from ivc_export.runtime.tensorrt.engine import Engine, Tensor
from ivc_export.runtime.tensorrt.session import TensorrtSession
from ivc_export.selection.operators import SELECTIONS
from ivc_export.tensorrt.graphs import typed
from ivc_export.tensorrt.profiles import profiles

REPEATS, WARMUPS = 9, 3
RUNS = 20
"""Of an engine, one behind the other, for a single time."""


@dataclass(frozen=True)
class SelectionTimes:
    """Seconds of the selection and of the compaction in a prefill, and of both in a decode step."""

    select: float
    compact: float
    decode: float


def portable_times(session: Session, plan: Run, rows: int) -> SelectionTimes:
    """On onnxruntime's CPU provider, as OnnxSession lowers graphs; a decode step runs both nodes on one row."""
    m = session.bundle.manifest
    models = {}
    for name in ("prefix", "decoder"):
        model = session.bundle.graph(name)
        models[name] = WidenFloatsPass()(model).model if m.dtype != session.dtype else model
    select, compact = Timed(selection_part(models["prefix"])), Timed(compaction_part(models["decoder"]))
    one = plan_run(m, np.zeros(1, np.int32), (), 0, 1.0)

    def both(run: Run) -> tuple[float, float]:
        sizes = extents(m, run, 0)
        return select.seconds(selection_feeds(run), sizes), compact.seconds(compaction_feeds(run, 0), sizes)

    seconds = both(plan)
    return SelectionTimes(*seconds, decode=sum(both(one)))


def fused_times(session: Session, plan: Run, rows: int, provider: Provider = "cuda") -> SelectionTimes:
    """On the provider of a FusedSession, over caches of `rows` rows; its decode steps choose nothing."""
    assert isinstance(session, FusedSession)
    library, lowering = session.op_library, session.lowering
    prefix, decoder = session.lowered("prefix", lowering), session.lowered("decoder", lowering)
    sizes = extents(session.bundle.manifest, plan, rows)
    feeds = selection_feeds(plan) | {"seqlens_k": np.array([plan.rows - 1], np.int32)}
    select = Timed(selection_part(prefix), provider, library).seconds(feeds, sizes)
    compact = Timed(compaction_part(decoder), provider, library).seconds(compaction_feeds(plan, rows), sizes)
    return SelectionTimes(select, compact, 0.0)


class EngineParts:
    """Selection and compaction as engines, built as a session's own were.

    Raises:
        UserError: TensorRT refuses one of them.
    """

    def __init__(self, session: TensorrtSession) -> None:
        bundle, recipe, m = session.bundle, session.recipe, session.bundle.manifest
        models = {
            "select": selection_part(typed(bundle, "prefix", session.dtype)),
            "compact": compaction_part(typed(bundle, "decoder", session.dtype)),
        }
        fix_values(models["select"], m)
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
        """Of one run on `feeds`, and on random values for inputs that these lack, in the profile `stage`."""
        engine, generator = self.engines[name], np.random.default_rng(0)
        inputs = {}
        for tensor, shape in engine.inputs().items():
            array = feeds.get(tensor)
            if array is None:
                array = generator.standard_normal([sizes["S"] if axis < 0 else axis for axis in shape], np.float32)
            array = np.ascontiguousarray(array, engine.dtypes[tensor])
            if tensor == "keep_count":  # a shape input: in host memory, which `feeds` hold
                inputs[tensor] = Tensor(array.ctypes.data, array.shape, array.dtype)
                continue
            address = self.buffers.get(f"{name}/{tensor}", array.nbytes)
            engine.device.upload(address, array)
            inputs[tensor] = Tensor(address, array.shape, array.dtype)
        engine.run(stage, inputs, self.buffers, f"{name}/{stage}")
        context, device = engine.contexts[stage], engine.device
        return median_seconds(device, lambda: context.execute_async_v3(device.stream), REPEATS, RUNS)


PARTS: WeakKeyDictionary[Session, EngineParts] = WeakKeyDictionary()
"""Built once for a session."""


def engine_times(session: Session, plan: Run, rows: int) -> SelectionTimes:
    """On TensorRT, by events; a decode step runs both engines' nodes on one row. Caches take no part in that."""
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


TIMES: Mapping[str, Callable[[Session, Run, int], SelectionTimes]] = {
    "onnxruntime-cpu": portable_times,
    "onnxruntime-cuda": fused_times,
    "tensorrt": engine_times,
}
"""By backend; a session, the prefill's plan and the rows of the caches."""


def selection_times(session: Session, plan: Run, rows: int) -> SelectionTimes | None:
    """Time selection and compaction by themselves, or None for a backend where nothing knows how."""
    found = TIMES.get(session.backend)
    return found(session, plan, rows) if found else None


def selection_part(prefix: ir.Model) -> ir.Model:
    """The selection's node of a prefix graph, and what makes cache_index of its choice. Uses the graph up."""
    graph = prefix.graph
    (select,) = [node for node in graph if node.domain == IVC_DOMAIN and node.op_type in SELECTIONS]
    values = select.inputs[0]
    assert values is not None
    given = ir.val("values", type=values.type or ir.TensorType(graph_dtype(prefix)), shape=ir.Shape(VALUES))
    select.replace_input_with(0, given)
    return only(prefix, [v for v in graph.outputs if v in select.outputs or v.name == "cache_index"], [given])


VALUES = (1, "kv_heads", "S", "head_dim")


def fix_values(part: ir.Model, m: Manifest) -> None:
    """Give the selection's values the numbers of heads and of a head's size, as TensorRT's profiles want them."""
    (values,) = [value for value in part.graph.inputs if value.name == "values"]
    values.shape = ir.Shape([1, m.decoder.kv_heads, "S", m.decoder.head_dim])


def graph_dtype(prefix: ir.Model) -> ir.DataType:
    """The dtype that a prefix graph computes in."""
    (embeds,) = [value for value in prefix.graph.inputs if value.name == "inputs_embeds"]
    assert embeds.dtype is not None
    return embeds.dtype


def compaction_part(decoder: ir.Model) -> ir.Model:
    """The nodes of a decoder graph that gather kept rows. Uses the graph up."""
    graph = decoder.graph
    indices = [value for value in graph.inputs if value.name in ("keep_index", "cache_index")]
    gathers = [node for node in graph if any(value in indices for value in node.inputs)]
    for node in gathers:
        for value in node.outputs:
            value.type = value.type or (node.inputs[0].type if node.inputs[0] is not None else None)
            value.shape = None
    return only(decoder, [value for node in gathers for value in node.outputs], [])


def only(model: ir.Model, outputs: Sequence[ir.Value], inputs: Sequence[ir.Value]) -> ir.Model:
    """What of a graph its `outputs` need. inputs: that are new."""
    graph = model.graph
    graph.outputs[:] = outputs
    RemoveUnusedNodesPass()(model)
    graph.inputs[:] = [value for value in (*graph.inputs, *inputs) if value.uses()]
    return model


def extents(m: Manifest, plan: Run, rows: int) -> dict[str, int]:
    """Of symbolic axes, in a prefill over caches of `rows` rows."""
    return {"S": plan.rows, "P": rows, "W": rows, "kv_heads": m.decoder.kv_heads, "head_dim": m.decoder.head_dim}


def selection_feeds(plan: Run) -> dict[str, npt.NDArray[Any]]:
    """The selection's inputs that a plan gives."""
    counted = {"position_ids": plan.position_ids, "keep_count": np.array([plan.keep_count], np.int32)}
    return plan.selection_inputs | counted


def compaction_feeds(plan: Run, rows: int) -> dict[str, npt.NDArray[Any]]:
    """The compaction's inputs but the tensors to gather from: every so many-th visual token is kept."""
    every = np.linspace(0, len(plan.visual_index) - 1, plan.keep_count).astype(np.int32)
    keep = np.sort(np.concatenate([plan.text_index, plan.visual_index[every]])).astype(np.int32)
    cache = np.arange(rows, dtype=np.int32)
    cache[: len(keep)] = keep[:rows]
    return {"keep_index": keep, "cache_index": cache, "position_ids": plan.position_ids}


class Timed:
    """A small graph in onnxruntime, its inputs and outputs on the device."""

    def __init__(self, model: ir.Model, provider: Provider = "cpu", library: Path | None = None) -> None:
        onnxruntime = load_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        if library:
            register(library, options)
        content = ir.to_proto(model).SerializeToString()
        self.device = provider
        self.session: Any = onnxruntime.InferenceSession(content, options, providers=[PROVIDERS[provider]])

    def seconds(self, feeds: Mapping[str, npt.NDArray[Any]], sizes: Mapping[str, int]) -> float:
        """Median of some runs on `feeds`, and on random values for inputs that these lack."""
        generator = np.random.default_rng(0)
        binding, held = self.session.io_binding(), []  # a binding does not keep arrays alive
        for tensor in self.session.get_inputs():
            array = feeds.get(tensor.name)
            if array is None:
                shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
                array = generator.standard_normal(shape, np.float32)
                array = array.astype(np.float16 if "float16" in tensor.type else np.float32)
            place = "cpu" if tensor.name == "keep_count" else self.device  # as FusedConversation has it
            value = load_onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), place, 0)
            held.append(value)
            binding.bind_ortvalue_input(tensor.name, value)
        for tensor in self.session.get_outputs():
            binding.bind_output(tensor.name, self.device)
        found = []
        for number in range(WARMUPS + REPEATS):
            start = time.perf_counter()
            self.session.run_with_iobinding(binding)
            if number >= WARMUPS:
                found.append(time.perf_counter() - start)
        return statistics.median(found)
