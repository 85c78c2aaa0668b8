"""The graphs of the `ort-cuda` lowering in onnxruntime: caches stay on the device and are written in place."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnxruntime import OrtValue
from rich.filesize import decimal

from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.manifest import Scaling
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.contract.ratio import check_ratio
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.families.pictures import Picture
from ivc_export.floats import cast
from ivc_export.lowering import lower
from ivc_export.lowering.join_decode import join_decode
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.runtime.cache import check_capacity
from ivc_export.runtime.conversation import HEADROOM, Fetched, Step, Timings, one_at_a_time, planned
from ivc_export.runtime.failures import SILENT, SMALLER, told
from ivc_export.runtime.onnxruntime.workspace import DeviceCache, Rows, Values, Workspace
from ivc_export.runtime.plan import Run
from ivc_export.tensorrt.memory import available_bytes

Arrays = dict[str, npt.NDArray[Any]]
Provider = Literal["cuda", "cpu"]
PROVIDERS: Mapping[Provider, str] = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
DTYPES: Mapping[Provider, FloatName] = {"cuda": "float16", "cpu": "float32"}
"""GroupQueryAttention's CUDA kernels know float16 and bfloat16, and NumPy no bfloat16; its CPU kernel float32."""

WIDER = "use --provider cpu, or TensorRT engines built with ivc-build --dtype fp32"
"""What to do where float16 does not reach."""

NO_ROOM = "close other programs that use the GPU, or use --provider cpu"
CHECK_GPU = "see that the GPU and its driver work, or use --provider cpu"
NOT_CAPTURED = "cannot use the graph capture feature"
"""What onnxruntime says of a graph of which it computes a part on the host."""

BLOCK = 512
"""Rows that a cache which grows has a multiple of."""


class FusedSession:
    """The vision graph, prefix and decoder, and one graph of both for decode steps, with one copy of the weights.

    provider: "cuda", or "cpu" to check the same graphs and the same hand-over without a GPU.
    cuda_graph: capture the decode step, and replay it, unless onnxruntime refuses; the attribute says whether it does.
    op_library: our library of custom operators (graphs/plugin/onnxruntime), which then selects and compacts.

    Conversations of several threads take turns, a run at a time; see AnySession.

    Raises:
        UserError: onnxruntime has no such provider, or cannot open a graph or the library.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: Provider = "cuda",
        cuda_graph: bool = True,
        op_library: Path | None = None,
    ) -> None:
        if PROVIDERS[provider] not in onnxruntime.get_available_providers():
            raise UserError(
                "this onnxruntime has no CUDA provider: install onnxruntime-gpu in the place of onnxruntime, or use "
                "--provider cpu"
            )
        if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries, where pip has put them
        bundle.check_portable("the CUDA provider")
        self.bundle = bundle
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self.versions: Mapping[str, str] = {"onnxruntime": onnxruntime.__version__}
        self.device = provider
        self.backend = f"onnxruntime-{provider}"
        self.dtype: FloatName = DTYPES[provider]
        self.op_library = op_library
        self.lowering = "ort-cuda-ops" if op_library else "ort-cuda"
        cast(pixel_bounds(bundle.manifest.preprocessing), self.dtype, "a normalised picture of this model", WIDER)
        models = {name: self.lowered(name, self.lowering) for name in GRAPH_NAMES}
        take_float32(models["vision"])
        self._owners: Values = {}
        self._weights: Values = {}
        """Views of these: onnxruntime shares memory between sessions that it does not own itself."""
        self._converted: Values = {}
        """What onnxruntime's optimizers read, while sessions open, of weights that no file has in this dtype."""
        self._sessions: dict[str, onnxruntime.InferenceSession] = {
            name: self._open(model) for name, model in models.items()
        }
        self.cuda_graph = cuda_graph and provider == "cuda"
        try:
            self._sessions["decode"] = self._open(self._joined(), self.cuda_graph)
        except UserError as error:
            if not (self.cuda_graph and NOT_CAPTURED in str(error)):
                raise
            self.cuda_graph = False  # onnxruntime captures no graph of which it computes a part on the host
            self._sessions["decode"] = self._open(self._joined())
        self._converted.clear()
        self.captures = count(1)
        """Numbers for captured CUDA graphs."""
        self._idle: list[Workspace] = []
        """Workspaces that no conversation has. Conversations that end add to them, in any thread and at any time."""

    def converse(self, ratio: float | None = None, capacity: int | None = None) -> FusedConversation:
        """Begin a conversation; see FusedConversation."""
        return FusedConversation(self, ratio, capacity)

    def lend(self, capacity: int, least: int | None = None) -> Workspace:
        """A workspace for one conversation, which gives it back: the next one replays its CUDA graph, and onnxruntime
        forgets none.

        capacity: rows of its caches. least: None for just so many; else they may be more, or fewer where memory is
            short, down to this.

        Raises:
            UserError: the device has no memory for it.
        """
        with self.lock:
            sizes = {number: workspace.cache.capacity for number, workspace in enumerate([*self._idle])}
            fit = [number for number, rows in sizes.items() if rows == capacity or (least and rows > capacity)]
            workspace = self._idle.pop(min(fit, key=sizes.__getitem__)) if fit else self._make(capacity, least)
        workspace.cache.clear()
        workspace.cache.grows = least is not None
        return workspace

    def _make(self, capacity: int, least: int | None) -> Workspace:
        if least:  # who grew out of a smaller one leaves it, and none of them is to be captured again for long
            self._idle[:] = [workspace for workspace in self._idle if workspace.cache.capacity > capacity]

        def attempt(rows: int) -> Workspace:
            with told(f"caches of {rows:,} rows cannot be had", SMALLER, CHECK_GPU):
                return Workspace.make(self.bundle.manifest, rows, self.dtype, self.value)

        with suppress(UserError):  # outside of which what was made before memory ran short is gone
            return attempt(capacity)
        self._idle.clear()
        return attempt(least or capacity)

    def rows_that_fit(self) -> int | None:
        """Rows of a cache that the device has memory for, as far as is known; of a GPU it is not."""
        free = available_bytes() if self.device == "cpu" else None
        return None if free is None else free // DeviceCache.row_bytes(self.bundle.manifest, self.dtype)

    def take_back(self, workspace: Workspace) -> None:
        """Keep a workspace for the next conversation."""
        self._idle.append(workspace)

    def lowered(self, name: GraphName, lowering: str) -> ir.Model:
        """A graph of the bundle, in the dtype that is computed in."""
        return self._lower(self.bundle.graph(name), lowering)

    def _lower(self, model: ir.Model, lowering: str) -> ir.Model:
        if self.dtype != self.bundle.manifest.dtype:
            model = RetypeFloatsPass(self.dtype)(model).model
        return lower(model, lowering)

    def _joined(self) -> ir.Model:
        """The graph of decode steps."""
        return self._lower(join_decode(self.bundle.graph("prefix"), self.bundle.graph("decoder")), "ort-cuda")

    def _open(self, model: ir.Model, cuda_graph: bool = False) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        if self.op_library:
            register(self.op_library, options)
        folder = str(self.bundle.folder)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor):  # to be converted, or as the bundle has it
                if name not in self._weights:  # weights that several graphs read, such as tied embeddings, are one
                    array = np.ascontiguousarray(read_values(tensor))
                    self._owners[name] = self.value(array)
                    self._weights[name] = view(self._owners[name])
                    if isinstance(tensor, ir.LazyTensor):
                        self._converted[name] = OrtValue.ortvalue_from_numpy(array)
                options.add_initializer(name, self._weights[name])
                if isinstance(tensor, ir.LazyTensor):
                    value.const_value = self._given(name, tensor)
                    options.add_external_initializers([name], [self._converted[name]])
        chosen = cuda_options(onnxruntime.__version__, cuda_graph) if self.device == "cuda" else {}
        provider = (PROVIDERS[self.device], chosen)
        content = ir.to_proto(model).SerializeToString()
        with told(f"{model.graph.name} does not open in onnxruntime", NO_ROOM, "use --provider cpu"):
            session = onnxruntime.InferenceSession(content, options, providers=[provider])
        if PROVIDERS[self.device] not in session.get_providers():  # onnxruntime falls back to the CPU without a word
            raise UserError(
                "onnxruntime's CUDA provider does not load: install the CUDA and cuDNN that this onnxruntime-gpu is "
                "for, or use --provider cpu"
            )
        return session

    def _given(self, name: str, tensor: ir.LazyTensor) -> ir.ExternalTensor:
        """What stands in a graph for a converted weight that is given in memory: what cannot be read from its file."""
        shape, file = tensor.shape.numpy(), self.bundle.manifest.embedding.file
        length = int(np.prod(shape) * tensor.dtype.itemsize)
        end = (self.bundle.folder / file).stat().st_size
        return ir.ExternalTensor(file, end, length, tensor.dtype, shape=ir.Shape(shape), name=name)

    def embed(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """Rows of the embedding table for `tokens`, in the dtype that is computed in: [1, len(tokens), hidden].

        Raises:
            UserError: they leave its range.
        """
        return cast(self.bundle.embedding_table[tokens], self.dtype, "an embedding of this model", WIDER)[None]

    def value(self, array: npt.NDArray[Any]) -> OrtValue:
        """An array in the device's memory; on the CPU it is the array's own.

        Raises:
            UserError: the device has no memory for it.
        """
        with told(f"{decimal(array.nbytes)} cannot be put into the device's memory", SMALLER, CHECK_GPU):
            return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def fetch(self, rows: Rows) -> npt.NDArray[np.float32]:
        """A copy in host memory, made while nothing runs: onnxruntime may be capturing a CUDA graph."""
        with self.lock:
            return rows.fetch()

    def bind(self, name: str, inputs: Values, outputs: Mapping[str, OrtValue | Rows | str]) -> Any:
        """Bind a graph's inputs, and its outputs to memory of the caller's, or to new memory on "cpu" or "cuda"."""
        session = self._sessions[name]
        binding = session.io_binding()
        for tensor in session.get_inputs():
            binding.bind_ortvalue_input(tensor.name, inputs[tensor.name])
        for tensor in session.get_outputs():
            place = outputs.get(tensor.name, self.device)
            if isinstance(place, str):
                binding.bind_output(tensor.name, place)
            elif isinstance(place, Rows):
                dtype = np.dtype(place.dtype).type
                binding.bind_output(tensor.name, self.device, 0, dtype, place.shape, place.address)
            else:
                binding.bind_ortvalue_output(tensor.name, place)
        return binding

    def run(self, name: str, binding: Any) -> Values:
        """Run a graph, and return its outputs by name.

        Raises:
            UserError: onnxruntime cannot, for lack of memory or another reason.
        """
        self.run_bound(name, binding)
        return dict(zip([o.name for o in self._sessions[name].get_outputs()], binding.get_outputs(), strict=True))

    def run_bound(self, name: str, binding: Any, captured: int | None = None) -> None:
        """Run a graph whose outputs the caller has bound.

        captured: number of the CUDA graph to capture or to replay; one number belongs to one set of addresses.

        Raises:
            UserError: as run.
        """
        session, options = self._sessions[name], onnxruntime.RunOptions()
        if captured is not None:
            options.add_run_config_entry("gpu_graph_id", str(captured))
        with told(f"{name} cannot run", SMALLER, CHECK_GPU):
            session.run_with_iobinding(binding, options)


def cuda_options(version: str, cuda_graph: bool) -> dict[str, str]:
    """Options of onnxruntime's CUDA provider, by onnxruntime's version.

    Before 1.27 it squared float16 in float16 in norms of sums, which then gave zeros for rows beyond 10,000 or so, as
    some models have: its strict mode does not (github.com/microsoft/onnxruntime/issues/29034).
    """
    chosen = {"enable_cuda_graph": "1"} if cuda_graph else {}
    if tuple(int(part) for part in version.split(".")[:2]) < (1, 27):
        chosen["enable_skip_layer_norm_strict_mode"] = "1"
    return chosen


def view(owner: OrtValue) -> OrtValue:
    """The same memory, as long as `owner` lives. onnxruntime 1.23 has OrtValue.from_dlpack only inside."""
    inner: Any = owner._ortvalue
    return OrtValue(type(inner).from_dlpack(inner.to_dlpack()))


def pixel_bounds(scaling: Scaling) -> npt.NDArray[np.float64]:
    """The least and the largest value of each channel of a normalised picture, [2, 3]."""
    pixels = np.array([[0.0], [255.0]])
    bounds: npt.NDArray[np.float64] = (pixels * scaling.rescale_factor - np.array(scaling.mean)) / np.array(scaling.std)
    return bounds


def take_float32(vision: ir.Model) -> None:
    """Let a vision graph take pixels in float32, and cast them itself: a host takes tens of milliseconds for that."""
    graph = vision.graph
    (pixels,) = [value for value in graph.inputs if value.name == "pixel_values"]
    if pixels.dtype == ir.DataType.FLOAT:
        return
    given = ir.val("pixel_values", dtype=ir.DataType.FLOAT, shape=pixels.shape)
    pixels.name = "pixel_values/narrow"
    cast = ir.node("Cast", [given], {"to": int(pixels.dtype or 0)}, name="pixel_values/cast")
    graph.inputs[list(graph.inputs).index(pixels)] = given
    pixels.replace_all_uses_with(cast.outputs[0])
    cast.outputs[0].name = pixels.name
    graph.insert_before(graph[0], cast)


def register(library: Path, options: onnxruntime.SessionOptions) -> None:
    """Add a library of custom operators to a session to be opened.

    Raises:
        UserError: there is no such file, or onnxruntime cannot load it.
    """
    if not library.is_file():
        raise UserError(f"there is no {library}: build it as docs/tensorrt.md says, or leave --op-library out")
    version = onnxruntime.__version__
    build = f"build it on this machine, against headers of onnxruntime {version} or older"
    with told(f"{library} does not load as custom operators", NO_ROOM, build):
        options.register_custom_ops_library(str(library.resolve()))


def blocks(rows: int) -> int:
    """The least multiple of BLOCK that holds so many."""
    return -(-rows // BLOCK) * BLOCK


class FusedConversation:
    """Runs of one FusedSession that share a cache; as Conversation, with everything but logits, kept rows and scores
    left on the device.

    capacity: rows of the cache; None for one that begins with room for the first run and `headroom`, and grows by half
        or more when it is full, while memory lasts. A finished conversation's memory goes to the next one that it fits.

    Raises:
        UserError: the ratio or the capacity is out of range, or the device has no memory for the cache.
    """

    def __init__(self, session: FusedSession, ratio: float | None = None, capacity: int | None = None) -> None:
        manifest = session.bundle.manifest
        self.session = session
        self.ratio = check_ratio(manifest.default_ratio if ratio is None else ratio)
        self.headroom = HEADROOM
        self.next_position = 0
        self.timings = Timings()
        self.cache = DeviceCache.empty(manifest)
        self._workspace: Workspace | None = None
        self._give_back: weakref.finalize[..., FusedConversation] | None = None
        if capacity is not None:
            self._take(session.lend(check_capacity(capacity)))

    def _take(self, workspace: Workspace) -> None:
        self.cache, self._workspace = workspace.cache, workspace
        self._give_back = weakref.finalize(self, self.session.take_back, workspace)
        self._give_back.atexit = False

    def _grow(self, needed: int, more: int) -> None:
        """Go on in caches of `needed` rows, with room for `more` behind them where the device has it."""
        old, give_back, most = self.cache, self._give_back, self.session.rows_that_fit()
        wanted, least = blocks(max(needed + more, old.capacity * 3 // 2)), blocks(needed)
        workspace = self.session.lend(least if most is not None and most < wanted else wanted, least)
        workspace.cache.take_over(old)
        self._take(workspace)
        if give_back is not None:
            give_back()

    @one_at_a_time
    def run(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        pictures: Sequence[Picture] = (),
        keep_index: npt.NDArray[np.int32] | None = None,
    ) -> Step:
        """Run `tokens`, image tokens included, over the cache, and append the kept rows to it.

        keep_index: rows that a prefill is to keep instead of those of the prefix graph, to replay another run.

        Raises:
            UserError: see planned; or the cache is full, or cannot grow, or activations leave float16's range.
        """
        m = self.session.bundle.manifest
        plan = planned(self, tokens, pictures)
        needed = max(self.cache.lengths(plan.rows).values())
        if needed > self.cache.capacity and self.cache.grows:
            self._grow(needed, min(self.headroom, m.decoder.max_positions - plan.next_position))
        if needed > self.cache.capacity:
            raise UserError(
                f"the cache holds {self.cache.capacity} rows, {needed} are needed: give it a larger capacity"
            )
        decode = plan.stage(self.cache.length) == "decode"
        step = self._decode(plan) if decode else self._prefill(plan, pictures, keep_index)
        self.cache.length += len(step.keep_index)
        self.cache.whole_length += plan.rows
        self.next_position = plan.next_position
        return step

    def _prefill(self, plan: Run, pictures: Sequence[Picture], keep_index: npt.NDArray[np.int32] | None) -> Step:
        session, cache, put = self.session, self.cache, self.session.value
        embeds = put(session.embed(plan.tokens))
        images = self._see(pictures, plan, embeds)
        position_ids = put(plan.position_ids)
        with self.timings.stage("prefill.prefix"):
            feeds = cache.inputs() | self._lengths(plan.rows)
            feeds |= {"inputs_embeds": embeds, "position_ids": position_ids}
            feeds |= {name: put(array) for name, array in plan.selection_inputs.items()}
            feeds["keep_count"] = OrtValue.ortvalue_from_numpy(np.array([plan.keep_count], np.int32))  # on the host
            prefix = session.run("prefix", session.bind("prefix", feeds, cache.outputs()))
        kept = len(plan.text_index) + plan.keep_count if keep_index is None else len(keep_index)
        with self.timings.stage("prefill.decoder"):
            feeds = cache.inputs() | self._lengths(kept) | prefix | {"position_ids": position_ids}
            if keep_index is not None:
                feeds |= {"keep_index": put(keep_index), "cache_index": put(cache.index(keep_index))}
            feeds["logit_index"] = put(np.array([kept - 1], np.int32))
            binding = session.bind("decoder", feeds, cache.outputs() | {"logits": "cpu"})
            decoder = session.run("decoder", binding)
        cache.swap()
        vision = tuple(Fetched({"image_embeds": image}, session.fetch) for image in images)
        logits = self._checked(decoder["logits"].numpy())
        below, above = self._shown(plan, kept, prefix)
        return Step(plan, vision, below, above | {"logits": logits}, keep_index)

    def _shown(self, plan: Run, kept: int, prefix: Values) -> tuple[Arrays, Arrays]:
        """What a prefill shows of prefix and decoder beside logits; caches have its rows, and not yet their lengths."""
        return {name: prefix[name].numpy() for name in ("keep_index", "token_score", "seed_index")}, {}

    def _see(self, pictures: Sequence[Picture], plan: Run, embeds: OrtValue) -> list[Rows]:
        """Run the pictures, whose tokens vision writes to their rows of `embeds`, [1, S, hidden]."""
        session, found, seen = self.session, [], 0
        for picture in pictures:
            with self.timings.stage("vision"):
                feeds = {name: session.value(array) for name, array in picture.inputs.items()}
                grid = picture.grid
                rows = Rows(embeds, session.dtype, int(plan.visual_index[seen]), grid.visual, len(grid.blocks))
                session.run_bound("vision", session.bind("vision", feeds, {"image_embeds": rows}))
            found.append(rows)
            seen += grid.visual
        return found

    def _decode(self, plan: Run) -> Step:
        assert self._workspace is not None  # since the run before
        session, cache, step = self.session, self.cache, self._workspace.step
        bindings, logits = self._workspace.bindings, self._workspace.logits
        with self.timings.stage("decode.decoder"):
            step["inputs_embeds"].update_inplace(session.embed(plan.tokens))
            step["position_ids"].update_inplace(plan.position_ids.repeat(cache.capacity, axis=2))
            for suffix, length in cache.lengths(0).items():
                step[f"seqlens_k{suffix}"].update_inplace(np.array([length], np.int32))
            if cache.swapped not in bindings:
                binding = session.bind("decode", step | cache.inputs(), cache.outputs() | {"logits": logits})
                bindings[cache.swapped] = (binding, next(session.captures))
            session.run_bound("decode", *bindings[cache.swapped])
            found = self._checked(np.array(logits.numpy()))  # a copy: the next step writes to the same memory
        return Step(plan, (), {"keep_index": np.zeros(1, np.int32)}, {"logits": found})

    def _checked(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not np.isfinite(logits.max()):  # NaN if any of them is
            if self._give_back is not None:
                self._give_back.detach()  # caches are to be finite; see DeviceCache.clear
            raise UserError(f"this model's activations leave float16's range: {WIDER}")
        return logits

    def _lengths(self, rows: int) -> Values:
        values: Values = {}
        for suffix, total in self.cache.lengths(rows).items():
            values[f"seqlens_k{suffix}"] = self.session.value(np.array([total - 1], np.int32))
            length = OrtValue.ortvalue_from_numpy(np.array(total, np.int32))
            values[f"total_sequence_length{suffix}"] = length
        return values
