"""The registry of runtimes. A new runtime is a record, listed in BACKENDS."""

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
"""Every runtime, by its name in commands and Python."""


def find_backend(name: str) -> Backend:
    """The runtime of this name.

    Raises:
        UserError: there is none.
    """
    if name not in BACKENDS:
        raise UserError(f"there is no backend {name}: give one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def open_session(bundle: Bundle, backend: str = DEFAULT, **options: Any) -> Session:
    """Load a bundle into a runtime.

    Args:
        bundle: the bundle.
        backend: "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt" or "tensorrt-rtx".
        options: options of the runtime; see below.

    Returns:
        A session, for `Chat`. It does one run at a time: runs in other threads wait for it.

    Options of onnxruntime-cpu:

    - `threads`: threads of one operator. By default onnxruntime takes one for each core.
    - `prepacking`: True lets onnxruntime copy weights into the layout that its kernels prefer. False leaves them in the
      memory map, where the system can share and drop them; runs are then slower.
    - `dtype`: "float32", or "float16" for a float16 bundle, to see the errors that float16 makes. This is slow.
    - `accuracy_level`: how packed weights are multiplied. 4, the default, rounds activations to int8, which is faster.
      0 multiplies in float32.

    Options of onnxruntime-cuda:

    - `op_library`: path of our library of custom operators.
    - `cuda_graph`: whether the decode step is captured as a CUDA graph, if onnxruntime can; with `op_library`
      also vision on small pictures whose size comes again. True by default.

    Options of tensorrt:

    - `plugin`: path of the library with which the engines were built.

    Raises:
        UserError: there is no such runtime or option, the runtime is not installed, or it cannot open the bundle.
    """
    record = find_backend(backend)
    record.check_options(options)
    return record.open(bundle, **options)
