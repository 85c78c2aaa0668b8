"""The runtimes by the names that commands have for them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.fused_graphs import PROVIDERS
from ivc_export.runtime.tensorrt.session import TensorrtSession

Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def open_session(
    bundle: Bundle,
    backend: Backend,
    provider: str | None = None,
    op_library: Path | None = None,
    cuda_graph: bool = True,
    plugin: Path | None = None,
) -> Session:
    """A bundle in a runtime.

    provider: onnxruntime's, "cpu" or "cuda"; op_library, cuda_graph: for the latter, as FusedSession's. plugin: for
    engines that call it, as TensorrtSession's.

    Raises:
        UserError: the runtime is missing, or cannot open the bundle; or there is none of this name.
    """
    if backend not in BACKENDS:
        raise UserError(f"there is no backend {backend}: give one of {', '.join(BACKENDS)}")
    if provider not in (None, *PROVIDERS):
        raise UserError(f"there is no provider {provider}: give one of {', '.join(sorted(PROVIDERS))}")
    if backend == "onnxruntime":
        if provider == "cuda":
            return FusedSession(bundle, cuda_graph=cuda_graph, op_library=op_library)
        return OnnxSession(bundle)
    return TensorrtSession(bundle, backend, plugin)
