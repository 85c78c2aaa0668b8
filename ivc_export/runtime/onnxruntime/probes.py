"""Times selection and compaction alone in onnxruntime, and measures the limits of a device by its operators."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.contract.caches import PLACED_ROWS
from ivc_export.contract.graphs import TensorName
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.lowering import LOWERINGS
from ivc_export.lowering.precision.widen_floats import WidenFloatsPass
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.loading import SILENT, load_onnxruntime
from ivc_export.runtime.onnxruntime.session_options import PROVIDERS, Provider, register
from ivc_export.runtime.plan import Run, plan_run
from ivc_export.runtime.probes import (
    SELECTION_RUNS,
    SIZES,
    WARMUPS,
    Ceilings,
    SelectionTimes,
    best,
    compaction_feeds,
    compaction_part,
    extents,
    one_node,
    selection_feeds,
    selection_part,
)
from ivc_export.selection.operators import SELECTIONS

ON_HOST = ("keep_count", "total_sequence_length")
"""Inputs that FusedConversation has in host memory."""


def portable_times(session: Session, plan: Run) -> SelectionTimes:
    """Times on onnxruntime's CPU provider beyond those of an empty run, with graphs lowered as in OnnxSession. A decode
    step runs both nodes on one row."""
    m = session.bundle.manifest
    models = {}
    for name in ("prefix", "decoder"):
        model = session.bundle.graph(name)
        models[name] = WidenFloatsPass()(model).model if m.dtype != session.dtype else model
    select, compact = Timed(selection_part(models["prefix"])), Timed(compaction_part(models["decoder"]))
    one, empty = plan_run(m, np.zeros(1, np.int32), (), 0, 1.0), empty_run()

    def both(run: Run) -> tuple[float, float]:
        sizes = extents(m, run, 0)
        times = select.seconds(selection_feeds(run), sizes), compact.seconds(compaction_feeds(run, 0), sizes)
        return beyond(times[0], empty), beyond(times[1], empty)

    seconds = both(plan)
    return SelectionTimes(*seconds, decode=sum(both(one)))


def fused_times(session: Session, plan: Run, rows: int) -> SelectionTimes:
    """Times on the provider of a FusedSession beyond those of an empty run, over caches of `rows` rows.

    Its decode steps select nothing.
    """
    assert isinstance(session, FusedSession)
    library, lowering, provider = session.op_library, session.lowering, session.device
    chooses = {node.op_type for node in session.bundle.graph("prefix").graph} & {*SELECTIONS}
    whole = chooses <= LOWERINGS[lowering].functions  # otherwise its nodes are among the others
    prefix, decoder = session.lowered("prefix", lowering if whole else "ort-cuda"), session.lowered("decoder", lowering)
    sizes = extents(session.bundle.manifest, plan, rows)
    feeds = selection_feeds(plan) | {"total_sequence_length": np.array(plan.rows, np.int32)}
    numbers = np.arange(rows, dtype=np.int32)
    feeds |= dict(zip(PLACED_ROWS, (numbers, numbers[: plan.kept], numbers[:1]), strict=True))
    select = Timed(selection_part(prefix), provider, library).seconds(feeds, sizes)
    compact = Timed(compaction_part(decoder), provider, library).seconds(compaction_feeds(plan, rows), sizes, True)
    empty = empty_run(provider)
    return SelectionTimes(beyond(select, empty), beyond(compact, empty), 0.0)


def empty_run(provider: Provider = "cpu") -> float:
    """Seconds that a run takes besides its nodes, which selection and compaction do not add to a prefill: those of a
    run that copies one number."""
    return Timed(one_node("Identity", (1,), 1, "float32"), provider).seconds({}, {})


def beyond(seconds: float, empty: float) -> float:
    """What a run takes beyond an empty one."""
    return max(0.0, seconds - empty)


def onnxruntime_ceilings(device: Provider, dtype: FloatName) -> Ceilings:
    """The limits by onnxruntime's operators Neg and MatMul."""
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

    def seconds(
        self, feeds: Mapping[str, npt.NDArray[Any]], sizes: Mapping[str, int], into_caches: bool = False
    ) -> float:
        """Median of some runs on `feeds`, with random values for missing inputs.

        into_caches: whether compacted caches are written to memory that is there, as FusedConversation has it.
        """
        generator = np.random.default_rng(0)
        binding, held = self.session.io_binding(), []  # a binding does not keep arrays alive
        for tensor in self.session.get_inputs():
            array = feeds.get(tensor.name)
            if array is None:
                shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
                array = generator.standard_normal(shape, np.float32)
                array = array.astype(np.float16 if "float16" in tensor.type else np.float32)
            place = "cpu" if tensor.name in ON_HOST else self.device
            value = load_onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), place, 0)
            held.append(value)
            binding.bind_ortvalue_input(tensor.name, value)
        for tensor in self.session.get_outputs():
            binding.bind_output(tensor.name, self.device)
        found = []
        for number in range(WARMUPS + SELECTION_RUNS):
            start = time.perf_counter()
            self.session.run_with_iobinding(binding)
            if number >= WARMUPS:
                found.append(time.perf_counter() - start)
            elif into_caches and not number:
                for tensor, value in zip(self.session.get_outputs(), binding.get_outputs(), strict=True):
                    if TensorName.of(tensor.name).role == "compact":
                        binding.bind_ortvalue_output(tensor.name, value)
        return statistics.median(found)
