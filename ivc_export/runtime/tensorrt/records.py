"""The records of TensorRT and TensorRT-RTX, which run engines that ivc-build made."""

from __future__ import annotations

from typing import Any

from ivc_export.bundle.bundle import Bundle
from ivc_export.runtime.backend import Backend
from ivc_export.runtime.interface import Session
from ivc_export.runtime.plan import Run
from ivc_export.runtime.probes import Ceilings, SelectionTimes
from ivc_export.runtime.tolerances import FLOAT32, TENSORRT_BFLOAT16, TENSORRT_FLOAT16


def open_tensorrt(bundle: Bundle, **options: Any) -> Session:
    """See TensorrtSession."""
    from ivc_export.runtime.tensorrt.session import TensorrtSession

    return TensorrtSession(bundle, "tensorrt", **options)


def open_rtx(bundle: Bundle, **options: Any) -> Session:
    """See TensorrtSession; for TensorRT-RTX."""
    from ivc_export.runtime.tensorrt.session import TensorrtSession

    return TensorrtSession(bundle, "tensorrt-rtx", **options)


def time_engines(session: Session, plan: Run, rows: int) -> SelectionTimes:
    """See probes.engine_times."""
    from ivc_export.runtime.tensorrt.probes import engine_times

    return engine_times(session, plan)


def ceilings(session: Session) -> Ceilings:
    """See probes.tensorrt_ceilings."""
    from ivc_export.runtime.tensorrt.probes import tensorrt_ceilings

    return tensorrt_ceilings(session)


TENSORRT = Backend(
    name="tensorrt",
    open=open_tensorrt,
    device="cuda",
    tolerances={"float32": FLOAT32, "float16": TENSORRT_FLOAT16, "bfloat16": TENSORRT_BFLOAT16},
    libraries={"plugin": "libivc_plugin.so, if the engines were built with it"},
    time_selection=time_engines,
    ceilings=ceilings,
)
TENSORRT_RTX = Backend(name="tensorrt-rtx", open=open_rtx, device="cuda", ceilings=ceilings)
