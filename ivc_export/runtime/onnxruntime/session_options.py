"""Providers of onnxruntime, and options of its sessions on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ivc_export.errors import UserError
from ivc_export.runtime.failures import told
from ivc_export.runtime.onnxruntime.loading import load_onnxruntime

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

Provider = Literal["cuda", "cpu"]
PROVIDERS: Mapping[Provider, str] = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

NO_ROOM = "close other programs that use the GPU, or use --backend onnxruntime-cpu"
CHECK_GPU = "check that the GPU and its driver work, or use --backend onnxruntime-cpu"


@dataclass(frozen=True)
class GraphOptions:
    """How graphs are opened.

    provider: "cuda", or "cpu" to check the same graphs and hand-over without a GPU.
    cuda_graph: whether to capture and replay the decode step; with op_library also vision on small pictures and short
        prefills. FusedGraphs.cuda_graph is false if onnxruntime does not capture the decode step.
    op_library: our library of custom operators (graphs/plugin/onnxruntime). It then selects, compacts, multiplies with
        the operators around products, splits and rotates heads, and attends if that is faster.
    """

    provider: Provider
    cuda_graph: bool
    op_library: Path | None


def cuda_options(version: str, cuda_graph: bool, exact: bool = False) -> dict[str, str]:
    """Options of onnxruntime's CUDA provider, for a version of onnxruntime.

    Before 1.27, norms of sums squared float16 in float16. They then gave zeros for rows with values beyond about
    10,000, which some models have. The strict mode does not (github.com/microsoft/onnxruntime/issues/29034).

    exact: whether a session's own arena grows by the requested amount. By powers of two, up to half of it would be
        unused. One run without our operators, with many small allocations, then took a tenth longer.
    """
    chosen = {"arena_extend_strategy": "kSameAsRequested"} if exact else {}
    if cuda_graph:
        chosen["enable_cuda_graph"] = "1"
    if tuple(int(part) for part in version.split(".")[:2]) < (1, 27):
        chosen["enable_skip_layer_norm_strict_mode"] = "1"
    return chosen


def replays_alone(version: str) -> bool:
    """Whether this onnxruntime can replay a CUDA graph without waiting for its end. 1.31.1 does. Once it always waited
    (github.com/microsoft/onnxruntime/pull/28686).
    """
    return tuple(int(part) for part in version.split(".")[:2]) >= (1, 31)


def register(library: Path, options: SessionOptions) -> None:
    """Add a library of custom operators to a session before it is opened.

    Raises:
        UserError: there is no such file, or onnxruntime cannot load it.
    """
    if not library.is_file():
        raise UserError(f"there is no {library}: build it (docs/tensorrt.md says how), or leave out --op-library")
    version = load_onnxruntime().__version__
    build = f"build it on this machine, with headers of onnxruntime {version} or older"
    with told(f"{library} does not load as custom operators", NO_ROOM, build):
        options.register_custom_ops_library(str(library.resolve()))
