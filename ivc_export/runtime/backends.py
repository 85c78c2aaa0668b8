"""The registry of runtimes. A new one is a record, and its name in BACKENDS."""

from __future__ import annotations

from typing import Any

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.runtime.backend import Backend
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.records import ONNXRUNTIME_CPU, ONNXRUNTIME_CUDA
from ivc_export.runtime.tensorrt.records import TENSORRT, TENSORRT_RTX

DEFAULT = "onnxruntime-cpu"
BACKENDS: dict[str, Backend] = {
    record.name: record for record in (ONNXRUNTIME_CPU, ONNXRUNTIME_CUDA, TENSORRT, TENSORRT_RTX)
}
"""Every runtime, by the name that commands and Python have for it."""


def find_backend(name: str) -> Backend:
    """The runtime of this name.

    Raises:
        UserError: there is none.
    """
    if name not in BACKENDS:
        raise UserError(f"there is no backend {name}: give one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def open_session(bundle: Bundle, backend: str = DEFAULT, **options: Any) -> Session:
    """A bundle in a runtime.

    backend: "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt" or "tensorrt-rtx".
    options: the runtime's own. onnxruntime-cpu: `threads`, `prepacking`, `dtype`, `accuracy_level`, as OnnxSession's,
        but that packed weights are multiplied at level 4, which is faster, unless it says otherwise; onnxruntime-cuda:
        `op_library`, `cuda_graph`, as FusedSession's; tensorrt: `plugin`, as TensorrtSession's.

    Raises:
        UserError: there is no such runtime, or it has no such option; or it is missing, or cannot open the bundle.
    """
    record = find_backend(backend)
    record.check_options(options)
    return record.open(bundle, **options)
