"""The records of two runtimes: onnxruntime's CPU provider, and its CUDA provider with graphs of its own."""

from __future__ import annotations

from typing import Any

from ivc_export.bundle.bundle import Bundle
from ivc_export.runtime.backend import Backend
from ivc_export.runtime.interface import Session
from ivc_export.runtime.plan import Run
from ivc_export.runtime.probes import SelectionTimes
from ivc_export.runtime.tolerances import CUDA_FLOAT16, FLOAT16, FLOAT32

FAST = 4
"""Accuracy level of packed weights on the CPU: it costs Spatial-VL 0.05 points (benchmarks/results)."""
NO_CUDA_GRAPH = "decode steps run without a CUDA graph, which is slower: a newer onnxruntime may be able to capture one"


def open_cpu(bundle: Bundle, **options: Any) -> Session:
    """Open an OnnxSession. Unless the caller names a level, packed weights are multiplied at the faster level."""
    from ivc_export.runtime.onnxruntime.cpu import OnnxSession

    return OnnxSession(bundle, **({"accuracy_level": FAST} | options))


def check_cpu(bundle: Bundle, **options: Any) -> None:
    """See cpu.check_dtype."""
    from ivc_export.runtime.onnxruntime.cpu import check_dtype

    check_dtype(bundle, options.get("dtype", "float32"), options.get("accuracy_level", 0))


def before_cpu(bundle: Bundle) -> str | None:
    """See cpu.widening_note."""
    from ivc_export.runtime.onnxruntime.cpu import widening_note

    return widening_note(bundle)


def after_cpu(session: Session) -> str | None:
    """See cpu.level_note."""
    from ivc_export.runtime.onnxruntime.cpu import level_note

    return level_note(session)


def open_cuda(bundle: Bundle, **options: Any) -> Session:
    """See FusedSession."""
    from ivc_export.runtime.onnxruntime.cuda import FusedSession

    return FusedSession(bundle, **options)


def open_cuda_shown(bundle: Bundle, **options: Any) -> Session:
    """See ShownSession."""
    from ivc_export.runtime.onnxruntime.shown import ShownSession

    return ShownSession(bundle, **options)


def after_cuda(session: Session) -> str | None:
    """A remark on whether decode steps are captured."""
    return None if getattr(session, "cuda_graph", True) else NO_CUDA_GRAPH


def time_portable(session: Session, plan: Run, rows: int) -> SelectionTimes:
    """See probes.portable_times."""
    from ivc_export.runtime.onnxruntime.probes import portable_times

    return portable_times(session, plan)


def time_fused(session: Session, plan: Run, rows: int) -> SelectionTimes:
    """See probes.fused_times."""
    from ivc_export.runtime.onnxruntime.probes import fused_times

    return fused_times(session, plan, rows)


ONNXRUNTIME_CPU = Backend(
    name="onnxruntime-cpu",
    open=open_cpu,
    device="cpu",
    tolerances={"float32": FLOAT32, "float16": FLOAT16},
    options=frozenset(("threads", "prepacking", "dtype", "accuracy_level")),
    exact={"accuracy_level": 0},
    check=check_cpu,
    before=before_cpu,
    after=after_cpu,
    time_selection=time_portable,
)
ONNXRUNTIME_CUDA = Backend(
    name="onnxruntime-cuda",
    open=open_cuda,
    device="cuda",
    tolerances={"float16": CUDA_FLOAT16},
    libraries={"op_library": "library of our custom operators"},
    options=frozenset(("cuda_graph",)),
    open_shown=open_cuda_shown,
    after=after_cuda,
    needs_capacity=True,
    time_selection=time_fused,
)
