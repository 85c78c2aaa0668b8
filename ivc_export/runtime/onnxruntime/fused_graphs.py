"""Opens the graphs of the `ort-cuda` lowering in onnxruntime, with one copy of the weights."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from rich.filesize import decimal

from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.dtypes import DTYPES as DTYPE_OF_NAMES
from ivc_export.dtypes import FloatName, cast
from ivc_export.errors import UserError
from ivc_export.lowering import lower
from ivc_export.lowering.join_decode import join_decode
from ivc_export.lowering.onnxruntime.host_steps import TABLE, Table, give_answer, take_host_steps
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.runtime.failures import SMALLER, told
from ivc_export.runtime.onnxruntime.given import stand_in
from ivc_export.runtime.onnxruntime.loading import (
    SILENT,
    grow_exactly,
    load_onnxruntime,
    share_arena,
    small_workspaces,
)
from ivc_export.runtime.onnxruntime.pixel_types import pixel_bounds, take_float32
from ivc_export.runtime.onnxruntime.session_options import (
    CHECK_GPU,
    NO_ROOM,
    PROVIDERS,
    GraphOptions,
    Provider,
    cuda_options,
    register,
    replays_alone,
)
from ivc_export.runtime.onnxruntime.shared_memory import shared_array
from ivc_export.runtime.onnxruntime.small_graphs import rows_graph, shared_table, table_graph, tied_table
from ivc_export.runtime.onnxruntime.staging import Staging
from ivc_export.runtime.onnxruntime.stream import Place, Stream
from ivc_export.runtime.onnxruntime.weights_memory import WeightsMemory, large_weights, view
from ivc_export.runtime.onnxruntime.workspace import Inputs, PictureRows, Values

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

DTYPES: Mapping[Provider, FloatName] = {"cuda": "float16", "cpu": "float32"}
"""The dtype of each provider. GroupQueryAttention's CUDA kernels take float16 and bfloat16, but NumPy has no bfloat16.
Its CPU kernel takes float32."""

WIDER = "use --backend onnxruntime-cpu, or TensorRT engines built with ivc-build --dtype float32"
"""What to do about values beyond float16."""

TURNS = threading.RLock()
"""Held by whoever uses the GPU. Sessions of all models in the process share memory, so their runs take turns. Each turn
ends with a run that is waited for: then nothing on the device uses shared memory. A captured CUDA graph keeps the
addresses of its memory, so the sessions that capture do not share theirs. A decode step that runs ahead may thus
outlast a turn."""

SMALL_VISION = "vision.small"
"""The session of vision for small pictures."""
SHORT: Mapping[GraphName, str] = {"prefix": "prefix.short", "decoder": "decoder.short"}
"""The sessions of prefix and decoder for short prefills."""

NOT_CAPTURED = "cannot use the graph capture feature"
"""onnxruntime's message if it computes a part of a graph on the host."""


class FusedGraphs:
    """The vision graph, prefix and decoder, and one graph of both for decode steps, with one copy of the weights.

    Raises:
        UserError: onnxruntime has no such provider, or cannot open a graph or the library.
    """

    def __init__(self, bundle: Bundle, options: GraphOptions) -> None:
        provider, cuda_graph, op_library = options.provider, options.cuda_graph, options.op_library
        onnxruntime = load_onnxruntime()
        if PROVIDERS[provider] not in onnxruntime.get_available_providers():
            raise UserError(
                "this onnxruntime has no CUDA provider: install onnxruntime-gpu instead of onnxruntime, or use "
                "--backend onnxruntime-cpu"
            )
        if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries, if pip installed them
        bundle.check_portable("the CUDA provider")
        self.bundle = bundle
        self.device = provider
        self.dtype: FloatName = DTYPES[provider]
        self.op_library = op_library
        self.lowering = "ort-cuda-ops" if op_library else "ort-cuda"
        self.host_steps = False
        """Whether decode steps begin and end in host memory: see lowering.onnxruntime.host_steps."""
        cast(pixel_bounds(bundle.manifest.preprocessing), self.dtype, "a normalised picture of this model", WIDER)
        models = {name: self.lowered(name, self.lowering) for name in GRAPH_NAMES}
        take_float32(models["vision"])
        tied = tied_table(bundle, models["decoder"])
        if op_library:
            register(op_library, onnxruntime.SessionOptions())  # which says why it does not load
        alone = provider == "cpu" or (cuda_graph and replays_alone(onnxruntime.__version__))
        self.table = shared_table(bundle, self.dtype, op_library) if op_library and alone and not tied else None
        """The embedding table where decode steps have it as an input: in host memory that the device reads."""
        decode = self._decode(TABLE if self.table else tied)
        if not self.host_steps:
            self.table = None
        self.answers = self.host_steps and give_answer(models["decoder"])  # whether prefills end there, too
        self.stream = Stream(op_library) if op_library else None
        """On which all sessions run, so that the host need not wait between them."""
        self._pending: list[Any] = []
        """Bindings of runs for which the host has not waited yet, and what else the device still reads."""
        self._staging = Staging(self.stream, provider) if self.stream else None
        self._made: set[tuple[str, int]] = set()
        """Sessions and threads that have cuBLAS handles."""
        self._owners: list[OrtValue] = []
        """Weights that are not in one memory. On the CPU they are the arrays themselves."""
        self._weights: Values = {}
        """Views of the weights: onnxruntime shares memory between sessions only if it does not own it."""
        self._weights_memory = WeightsMemory.of([*models.values(), decode], provider) if self._in_one() else None
        self._converted: Values = {}
        """Values that onnxruntime's optimisers read while sessions open, for weights that no file has in this dtype."""
        self._sessions: dict[str, InferenceSession] = {name: self._open(model) for name, model in models.items()}
        self.cuda_graph = cuda_graph and provider == "cuda"
        try:
            self._sessions["decode"] = self._open(decode, self.cuda_graph)
        except UserError as error:
            if not (self.cuda_graph and NOT_CAPTURED in str(error)):
                raise
            self.cuda_graph = False  # onnxruntime cannot capture a graph with a part on the host
            self.table, alone = None, False
            self._sessions["decode"] = self._open(self._decode(tied))
        self.reads_table = tied is not None or self.table is not None
        """Whether the device reads embeddings of decode steps itself."""
        self.runs_ahead = self.host_steps and self.reads_table and alone
        """Whether a decode step can be given to the device before the answer of the step before is seen."""
        self._gathers, self._table = tied is not None, tied.name if tied else ""
        if not self._staging:
            rows = rows_graph(DTYPE_OF_NAMES[self.dtype].onnx) if tied is None else table_graph(tied.name, tied.tensor)
            self._sessions["rows"] = self._open(rows)
        self.captures_vision = cuda_graph and self._open_again({SMALL_VISION: models["vision"]})
        short = () if bundle.manifest.weight_formats else SHORT  # packed ones would be unpacked to memory of its own
        self.captures_prefills = cuda_graph and self._open_again({SHORT[name]: models[name] for name in short})
        """Whether sessions of their own capture vision of small pictures and short prefills."""
        self._converted.clear()

    def lowered(self, name: GraphName, lowering: str) -> ir.Model:
        """A graph of the bundle, lowered, in the computing dtype."""
        return self._lower(self.bundle.graph(name), lowering)

    def _lower(self, model: ir.Model, lowering: str) -> ir.Model:
        if self.dtype != self.bundle.manifest.dtype:
            model = RetypeFloatsPass(self.dtype)(model).model
        return lower(model, lowering)

    def _decode(self, table: Table | str | None) -> ir.Model:
        """The graph of decode steps, as it is opened."""
        joined = join_decode(self.bundle.graph("prefix"), self.bundle.graph("decoder"))
        model = self._lower(joined, self.lowering)
        if self.op_library:
            self.host_steps = take_host_steps(model, table, self.bundle.manifest.decoder.hidden_size)
        return model

    def _open_again(self, models: Mapping[str, ir.Model]) -> bool:
        """Open graphs once more, with memory of their own, since a captured CUDA graph keeps its addresses. Only on a
        stream, and where onnxruntime can capture them. Returns whether there are such graphs now."""
        if self.stream is None:
            return False
        try:
            self._sessions |= {name: self._open(model, self.device == "cuda") for name, model in models.items()}
        except UserError:  # nobody needs them
            return False
        return bool(models)

    def shared(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Zeros in host memory that the device also reads and writes."""
        assert self.op_library is not None
        return shared_array(self.op_library, shape, dtype)

    def _in_one(self) -> bool:
        """Whether all weights are in one allocation."""
        return self.device == "cuda" and grow_exactly(self.op_library is not None) and WeightsMemory.works(self.device)

    def _weight(self, tensor: ir.LazyTensor | ir.ExternalTensor, array: npt.NDArray[Any]) -> OrtValue:
        """A weight on the device."""
        if self._weights_memory is None:
            self._owners.append(self.value(array))
            return view(self._owners[-1])
        with told(f"{tensor.name} cannot be copied into GPU memory", NO_ROOM, CHECK_GPU):
            return self._weights_memory.place(array)

    def _open(self, model: ir.Model, cuda_graph: bool = False) -> InferenceSession:
        """Open a graph. It takes memory that runs before may still use, so the host waits for them."""
        with TURNS if self.device == "cuda" else nullcontext():
            if self.stream:
                self.stream.wait()
            return self._opened(model, cuda_graph)

    def _opened(self, model: ir.Model, cuda_graph: bool) -> InferenceSession:
        onnxruntime = load_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        if self.op_library:
            register(self.op_library, options)
            options.enable_mem_pattern = False  # else a second prompt of one length takes all of its memory once more
            if self.device == "cuda" and not cuda_graph and share_arena():
                options.add_session_config_entry("session.use_env_allocators", "1")
        folder = str(self.bundle.folder)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        for name, tensor in large_weights(model):
            # weights that several graphs read, such as tied embeddings, are loaded once
            if name not in self._weights:
                array = np.ascontiguousarray(read_values(tensor))
                self._weights[name] = self._weight(tensor, array)
                if isinstance(tensor, ir.LazyTensor):
                    self._converted[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            options.add_initializer(name, self._weights[name])
            if isinstance(tensor, ir.LazyTensor):
                model.graph.initializers[name].const_value = stand_in(self.bundle, name, tensor)
            if name in self._converted:
                options.add_external_initializers([name], [self._converted[name]])
        chosen = cuda_options(onnxruntime.__version__, cuda_graph, exact=self.op_library is not None)
        if self.stream:
            chosen["user_compute_stream"] = str(self.stream.address)
        provider = (PROVIDERS[self.device], chosen if self.device == "cuda" else {})
        content = ir.to_proto(model).SerializeToString()
        with (
            told(f"{model.graph.name} does not open in onnxruntime", NO_ROOM, "use --backend onnxruntime-cpu"),
            small_workspaces() if self.op_library else nullcontext(),
        ):
            session = onnxruntime.InferenceSession(content, options, providers=[provider])
        if PROVIDERS[self.device] not in session.get_providers():  # onnxruntime falls back to the CPU silently
            raise UserError(
                "onnxruntime's CUDA provider does not load: install the versions of CUDA and cuDNN that this "
                "onnxruntime-gpu needs, or use --backend onnxruntime-cpu"
            )
        session.stream = self.stream  # which must outlive it
        return session

    def embed(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """Rows of the embedding table for `tokens`, in the computing dtype: [1, len(tokens), hidden].

        Raises:
            UserError: they are beyond its range.
        """
        found = self.bundle.embed(tokens, np.dtype(self.dtype))
        return cast(found, self.dtype, "an embedding of this model", WIDER)[None]

    def embedded(self, tokens: npt.NDArray[np.int32], text: npt.NDArray[np.int32]) -> OrtValue:
        """The same on the device, for the rows `text`, ascending. Other rows have any content.

        If lm_head's weight is the table, rows are gathered from it. Otherwise only the rows of `text` are uploaded.
        On a stream they are there after the next run that is waited for.
        """
        embeds = self.memory((1, len(tokens), self.bundle.manifest.decoder.hidden_size))
        if self._gathers:
            if self._staging:
                self._staging.take_rows(self._weights[self._table], tokens, embeds)
            else:
                given = {"tokens": self.value(tokens)}
                self.run_bound("rows", self.bind("rows", given, {"inputs_embeds": embeds}), wait=False)
            return embeds
        for rows in np.split(text, np.flatnonzero(np.diff(text) > 1) + 1) if len(text) else ():
            place = PictureRows(embeds, self.dtype, int(rows[0]), len(rows), 1)
            found = self.embed(tokens[rows])
            if self._staging:
                self._staging.write(found, place.address)
            else:
                given = {"rows": self.value(found)}
                self.run_bound("rows", self.bind("rows", given, {"inputs_embeds": place}), wait=False)
        return embeds

    def memory(self, shape: tuple[int, ...], dtype: npt.DTypeLike | None = None) -> OrtValue:
        """Memory on the device for values in a dtype, or else the computing dtype, with any content.

        Raises:
            UserError: the device has no memory left.
        """
        with told("GPU memory cannot be allocated", SMALLER, CHECK_GPU):
            kind = np.dtype(dtype or self.dtype).type
            return load_onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, kind, self.device, 0)

    def value(self, array: npt.NDArray[Any]) -> OrtValue:
        """An array in the device's memory. On the CPU this is the array itself.

        Raises:
            UserError: the device has no memory for it.
        """
        with told(f"{decimal(array.nbytes)} cannot be copied into GPU memory", SMALLER, CHECK_GPU):
            given = np.ascontiguousarray(array)
            return load_onnxruntime().OrtValue.ortvalue_from_numpy(given, self.device, 0)

    def values(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Inputs:
        """The same for several arrays. On a stream the host does not wait for copies of few bytes. They are then there
        for the next runs, up to one that is waited for.
        """
        if self._staging and self._staging.takes(arrays):
            return {**self._staging.put(arrays)}
        return {name: self.value(array) for name, array in arrays.items()}

    def fetched(self, values: Inputs) -> dict[str, npt.NDArray[Any]]:
        """Copies of values in host memory. This waits for all runs.

        Raises:
            UserError: one of them failed.
        """
        if not (self.stream and self._staging):
            return {name: value.numpy() for name, value in values.items()}  # type: ignore[union-attr]  # no Place
        found = self._staging.get(values)
        if not self.stream.wait():
            raise UserError(f"the GPU cannot finish a run: {CHECK_GPU}")
        copies = {name: array.copy() for name, array in found.items()}
        self._release()
        return copies

    def bind(self, name: str, inputs: Inputs, outputs: Mapping[str, OrtValue | PictureRows | Place | str]) -> Any:
        """Bind a graph's inputs, and its outputs to memory of the caller's, or to new memory on "cpu" or "cuda"."""
        session = self._sessions[name]
        binding = session.io_binding()
        binding.stream = self.stream  # a binding keeps its session, which must not outlive the stream
        binding.held = inputs, outputs  # a run may outlast the caller's own references to them
        for name in (tensor.name for tensor in session.get_inputs()):
            given = inputs[name]
            if isinstance(given, Place):
                dtype = np.dtype(given.dtype).type
                binding.bind_input(name, self.device, 0, dtype, given.shape, given.address)
            else:
                binding.bind_ortvalue_input(name, given)
        for name in (tensor.name for tensor in session.get_outputs()):
            place = outputs.get(name, self.device)
            if isinstance(place, str):
                binding.bind_output(name, place)
            elif isinstance(place, PictureRows | Place):
                dtype = np.dtype(place.dtype).type
                binding.bind_output(name, self.device, 0, dtype, place.shape, place.address)
            else:
                binding.bind_ortvalue_output(name, place)
        return binding

    def run(self, name: str, binding: Any, wait: bool = True) -> Values:
        """Run a graph, and return its outputs by name. wait: see run_bound.

        Raises:
            UserError: onnxruntime fails, for lack of memory or another reason.
        """
        self.run_bound(name, binding, wait=wait)
        return dict(zip([o.name for o in self._sessions[name].get_outputs()], binding.get_outputs(), strict=True))

    def run_bound(self, name: str, binding: Any, captured: int | None = None, wait: bool = True) -> None:
        """Run a graph whose outputs the caller has bound.

        captured: number of the CUDA graph to capture or to replay. One number belongs to one set of addresses. wait:
            whether the outputs must be there when this returns. Otherwise the next runs may read them on the device,
            and they are there after the next run that is waited for, or `settle`.

        Raises:
            UserError: see run.
        """
        session, options = self._sessions[name], load_onnxruntime().RunOptions()
        if captured is not None:
            options.add_run_config_entry("gpu_graph_id", str(captured))
        if self.stream and not wait:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if captured is None:  # else the caller keeps it anyway
                self._pending.append(binding)
        with told(f"{name} cannot run", SMALLER, CHECK_GPU), self._handles(name):
            session.run_with_iobinding(binding, options)
        if wait:
            self._release()

    def _handles(self, name: str) -> AbstractContextManager[None]:
        """For a session's run: its first one in a thread makes handles of cuBLAS."""
        made = name, threading.get_ident()
        if self.op_library is None or made in self._made:
            return nullcontext()
        self._made.add(made)
        return small_workspaces()

    def settle(self) -> None:
        """Wait for the runs after which a failure left no run that is waited for, and give up what they use."""
        if self.stream:
            self.stream.wait()
        self._release()

    def _release(self) -> None:
        """Give up what runs use, which have all ended."""
        self._pending.clear()
        if self._staging:
            self._staging.reuse()
