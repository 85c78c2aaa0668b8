"""Graphs opened in a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from rich.filesize import decimal

from ivc_export.bundle import Bundle
from ivc_export.contract import GRAPH_NAMES, GraphName
from ivc_export.errors import UserError
from ivc_export.passes import WidenFloatsPass

Arrays = Mapping[str, npt.NDArray[Any]]


class Session(Protocol):
    """The three graphs of a bundle, ready to run."""

    bundle: Bundle

    def run(self, name: GraphName, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run graph `name`; inputs and outputs by the contract's names, floats in float32."""
        ...


class OnnxSession:
    """A bundle in onnxruntime's CPU provider, which computes in float32: other dtypes are widened when it opens.

    threads: intra-op threads; None takes onnxruntime's default, one a core.
    prepacking: whether onnxruntime may copy weights into the layout that its kernels like best; without, they stay in
        the memory map, where the system can share and drop them, and runs are slower.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, prepacking: bool = True) -> None:
        self.bundle = bundle
        self._threads, self._prepacking = threads, prepacking
        # side by side, unless weights are widened: that would hold several widened graphs' temporary copies at once
        with ThreadPoolExecutor(len(GRAPH_NAMES) if bundle.manifest.dtype == "float32" else 1) as pool:
            self._sessions = dict(zip(GRAPH_NAMES, pool.map(self._open, GRAPH_NAMES), strict=True))
        self._outputs = {name: [o.name for o in s.get_outputs()] for name, s in self._sessions.items()}

    def _open(self, name: GraphName) -> onnxruntime.InferenceSession:
        path = self.bundle.folder / self.bundle.manifest.graphs[name].file
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = self._threads or 0
        if not self._prepacking:
            options.add_session_config_entry("session.disable_prepacking", "1")
        source: str | bytes = str(path)
        try:
            if self.bundle.manifest.dtype != "float32":
                source = ir.to_proto(WidenFloatsPass()(ir.load(path)).model).SerializeToString()
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(path.parent)
                )
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # neither onnxruntime's exceptions nor protobuf's share a public base class
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} does not open in onnxruntime ({reason}): export the model again") from error

    def run(self, name: GraphName, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run graph `name` on arrays in host memory.

        Raises:
            UserError: onnxruntime cannot, most often for lack of memory.
        """
        try:
            outputs = self._sessions[name].run(None, dict(feeds))
        except Exception as error:  # as above
            reason = str(error).splitlines()[0]
            raise UserError(f"{name} cannot run ({reason}): if memory is short, use a smaller picture") from error
        return dict(zip(self._outputs[name], outputs, strict=True))


def widening_note(bundle: Bundle) -> str | None:
    """What opening an OnnxSession will cost beyond the weights' own size, or None if nothing."""
    if bundle.manifest.dtype == "float32":
        return None
    size = decimal(2 * sum(file.size for file in bundle.manifest.weights))
    return (
        f"onnxruntime's CPU provider computes in float32: {bundle.manifest.dtype} weights widen to about {size} "
        "whenever a session opens; a bundle exported with --dtype fp32 opens faster, and its weights stay on the disk"
    )
