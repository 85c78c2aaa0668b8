"""A bundle on onnxruntime's CPU provider."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from rich.filesize import decimal

from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.folder import read_index
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.dtypes import FLOATS, FloatName, cast
from ivc_export.errors import UserError
from ivc_export.lowering.onnxruntime.accuracy import LEVELS, SetAccuracyPass
from ivc_export.lowering.onnxruntime.activations import FuseActivationsPass
from ivc_export.lowering.onnxruntime.attention import UseRotaryEmbeddingPass
from ivc_export.lowering.onnxruntime.norms import FuseNormsPass
from ivc_export.lowering.onnxruntime.rotate_together import RotateTogetherPass
from ivc_export.lowering.onnxruntime.split_bytes import SplitBytesPass
from ivc_export.lowering.precision.widen_floats import WidenFloatsPass
from ivc_export.runtime.failures import SMALLER, told
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.given import stand_in
from ivc_export.runtime.onnxruntime.loading import SILENT, load_onnxruntime
from ivc_export.selection.method import Method

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue, SessionOptions

Arrays = Mapping[str, npt.NDArray[Any]]

SPINNING = {
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "50",
    "session.force_spinning_stop": "1",
}
"""A thread that waits for work spins for so many microseconds, then sleeps: to wake it takes as long as a product of a
small model. It stops when the run ends, because each graph has threads of its own."""


class OnnxSession:
    """A bundle on onnxruntime's CPU provider. It computes in float32: other dtypes are widened when the bundle is
    opened.

    threads: threads of one operator; None takes onnxruntime's default, one for each core.
    prepacking: True lets onnxruntime copy weights into the layout that its kernels prefer. False leaves them in the
        memory map, where the system can share and drop them; runs are then slower.
    dtype: "float16" leaves a float16 bundle's graphs as they are, to see errors of float16. The provider then rounds
        less often than a GPU: between operators for which it has no kernel in float16, it keeps float32. It is slow.
    accuracy_level: how packed weights are multiplied: 0 in float32; 4 rounds activations to int8, which is faster.

    Conversations of several threads take turns, one run at a time; see Session.

    Raises:
        UserError: the graphs cannot be opened, or not in this dtype.
    """

    backend = "onnxruntime-cpu"

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        prepacking: bool = True,
        dtype: FloatName = "float32",
        accuracy_level: int = 0,
    ) -> None:
        check_dtype(bundle, dtype, accuracy_level)
        self.bundle, self.dtype, self.accuracy_level = bundle, dtype, accuracy_level
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self.versions: Mapping[str, str] = {"onnxruntime": load_onnxruntime().__version__}
        self._threads, self._prepacking = threads, prepacking
        self._given: list[OrtValue] = []
        """Weights that sessions read but do not own."""
        # in parallel, unless weights are widened or rearranged: all graphs' copies would exist at once
        as_stored = bundle.manifest.dtype == dtype and not bundle.manifest.weight_formats
        with ThreadPoolExecutor(len(GRAPH_NAMES) if as_stored else 1) as pool:
            self._sessions = dict(zip(GRAPH_NAMES, pool.map(self._open, GRAPH_NAMES), strict=True))
        return_freed()
        self._outputs = {name: [o.name for o in s.get_outputs()] for name, s in self._sessions.items()}

    def _open(self, name: GraphName) -> InferenceSession:
        onnxruntime, path = load_onnxruntime(), self.bundle.folder / self.bundle.manifest.graphs[name].file
        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        options.intra_op_num_threads = self._threads or 0
        options.enable_mem_pattern = False  # one would be kept for each length that a prompt or a cache ever had
        if not self._prepacking:
            options.add_session_config_entry("session.disable_prepacking", "1")
        for key, value in SPINNING.items():
            options.add_session_config_entry(key, value)
        options.add_session_config_entry(
            "session.use_device_allocator_for_initializers", "1"
        )  # just as large as they are
        source: str | bytes = str(path)
        passes: list[ir.passes.PassBase] = []
        formats = {stored.format for stored in self.bundle.manifest.weight_formats.values()}
        if "int8" in formats and not self.accuracy_level:
            passes.append(SplitBytesPass())
        if formats:  # with packed products, hundreds of small operators would take a third of a decode step
            passes += [RotateTogetherPass(), UseRotaryEmbeddingPass(), FuseNormsPass(), FuseActivationsPass()]
        if self.bundle.manifest.dtype != self.dtype:
            passes.append(WidenFloatsPass())
        if formats and self.accuracy_level:
            passes.append(SetAccuracyPass(self.accuracy_level))
        if passes:
            source = self._rewritten(name, passes, options)
            gc.collect()  # the graph, whose nodes and values refer to each other: the next one takes its memory
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        with told(f"{path} does not open in onnxruntime", "close other programs", "export the model again"):
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def _rewritten(self, name: GraphName, passes: list[ir.passes.PassBase], options: SessionOptions) -> bytes:
        """A graph after some passes, serialised."""
        model = self.bundle.graph(name)
        for one in passes:
            model = one(model).model
        self._give(model, options)
        content: bytes = ir.to_proto(model).SerializeToString()
        return content

    def _give(self, model: ir.Model, options: SessionOptions) -> None:
        """Pass weights that passes computed, and that no file has, in memory. Those in bfloat16, which are small and
        which NumPy does not have, stay in the graph."""
        onnxruntime = load_onnxruntime()
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.LazyTensor) and tensor.dtype != ir.DataType.BFLOAT16:
                value.const_value = stand_in(self.bundle, name, tensor)
                given = onnxruntime.OrtValue.ortvalue_from_numpy(mapped(tensor.numpy()))
                options.add_external_initializers([name], [given])
                self._given.append(given)

    def converse(
        self, ratio: float | None = None, capacity: int | None = None, method: str | Method | None = None
    ) -> HostConversation:
        """Begin a conversation; see HostConversation."""
        return HostConversation(self, ratio, capacity, method)

    def run(self, name: GraphName, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run graph `name` on arrays in host memory.

        Raises:
            UserError: onnxruntime cannot, for lack of memory or another reason; or values do not fit float16.
        """
        if self.dtype == "float16":
            narrow = {t.name for t in self.bundle.manifest.graphs[name].inputs if t.dtype == "float16"}
            feeds = {
                key: cast(array, self.dtype, key, "compute in float32") if key in narrow else array
                for key, array in feeds.items()
            }
        with told(f"{name} cannot run", SMALLER, "export the model again, or use another onnxruntime"):
            outputs = self._sessions[name].run(None, dict(feeds))
        outputs = [array.astype(np.float32) if array.dtype == np.float16 else array for array in outputs]
        return dict(zip(self._outputs[name], outputs, strict=True))


def mapped(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy in a file without a name, so that the system may drop its pages. onnxruntime reads it once, to rearrange
    it.

    Raises:
        UserError: the folder for temporary files has no room.
    """
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process when pages are written
                os.posix_fallocate(file.fileno(), 0, array.nbytes)
            place = np.memmap(file, array.dtype, "w+", shape=array.shape)
    except OSError as error:
        advice = "make room in the folder for temporary files, or set TMPDIR to another folder"
        what = f"a temporary file of {decimal(array.nbytes)} cannot be written ({error.strerror})"
        raise UserError(f"{what}: {advice}") from error
    place[...] = array
    return place


def return_freed() -> None:
    """Return memory to the system that was freed after opening. glibc keeps it, because memory behind it is in use."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library has no malloc_trim
            gc.collect()  # graphs, whose nodes and values refer to each other
            ctypes.CDLL(None).malloc_trim(0)


def check_dtype(bundle: Bundle, dtype: FloatName, accuracy_level: int = 0) -> None:
    """Check that onnxruntime has its CPU provider, and can compute this bundle in `dtype` at this level.

    Raises:
        UserError: it cannot.
    """
    load_onnxruntime()
    if dtype != "float32" and (dtype, dtype) != ("float16", bundle.manifest.dtype):
        raise UserError(
            f"onnxruntime's CPU provider cannot compute a {bundle.manifest.dtype} bundle in {dtype}: use float32, "
            "or float16 with a float16 bundle"
        )
    if accuracy_level not in LEVELS:
        raise UserError(f"accuracy level {accuracy_level} is unknown: give {' or '.join(map(str, LEVELS))}")


def float_bytes(bundle: Bundle) -> int:
    """Bytes of a bundle's weights, without packed ones."""
    files = (read_index(bundle.folder / file.file, "export the model again") for file in bundle.manifest.weights)
    return sum(tensor.length for file in files for tensor in file.values() if tensor.dtype in FLOATS)


def level_note(session: Session) -> str | None:
    """A remark on how packed weights are multiplied. None if there are none."""
    if not session.bundle.manifest.weight_formats:
        return None
    level = getattr(session, "accuracy_level", 0)
    how = "in float32" if level == 0 else "by int8 activations"
    return f"packed weights are multiplied {how} (accuracy level {level})"


def widening_note(bundle: Bundle) -> str | None:
    """A remark on the memory that an OnnxSession takes beyond the weights' own size. None if it takes none."""
    if bundle.manifest.dtype == "float32":
        return None
    size = decimal(2 * float_bytes(bundle))
    return (
        f"onnxruntime's CPU provider computes in float32. Each session converts the {bundle.manifest.dtype} "
        f"weights, which takes about {size} of memory: to avoid this, export the model with --dtype float32"
    )
