"""TensorRT engines: everything stays on the device but the logits, and what a caller looks at."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.graphs import TensorName
from ivc_export.contract.manifest import GraphInfo
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.contract.ratio import check_ratio
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.families.pictures import Picture
from ivc_export.floats import cast
from ivc_export.runtime.conversation import HEADROOM, Fetched, Step, Timings, one_at_a_time, planned
from ivc_export.runtime.plan import Run, check_kept
from ivc_export.runtime.tensorrt.device import Buffers, CudaDevice, Device
from ivc_export.tensorrt.library import Target, load_plugin, load_tensorrt, make_logger, own_capability
from ivc_export.tensorrt.store import find_engines

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "INT32": np.int32}
"""NumPy's types by the names of TensorRT's."""
HANDED_OVER = {"image_embeds": "inputs_embeds"}
"""Tensors that are copied into others, by their names."""
REBUILD = "build the engines again with ivc-build"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor in device memory, or in the host's where TensorRT reads a shape from it."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Engine:
    """One engine and an execution context for each of its profiles.

    info: the graph that it was built from, whose tensors it must have; None for one that belongs to no bundle.

    Raises:
        UserError: TensorRT does not load it, or it is another graph's.
    """

    def __init__(
        self,
        trt: Any,
        path: Path,
        profiles: Sequence[str],
        device: Device,
        runtime: Any,
        info: GraphInfo | None = None,
    ) -> None:
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise UserError(f"{path} does not load in TensorRT {trt.__version__}: build it here with ivc-build")
        self._name, self.device = path.stem, device
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        types = {name: self._engine.get_tensor_dtype(name).name for name in names}
        for name, kind in types.items():
            if kind not in DTYPES:
                raise UserError(f"{path} has {name} in {kind}, as no graph of ours has it: build it with ivc-build")
        self.dtypes = {name: np.dtype(DTYPES[kind]) for name, kind in types.items()}
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        self._shapes: dict[str, tuple[int | str, ...]] = {}  # of outputs, as the contract has them
        if info is not None:
            self._check(info, path)
            self._shapes = {tensor.name: tensor.shape for tensor in info.outputs}
        strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)  # from TensorRT 10 on
        if strategies is not None:
            contexts = [self._engine.create_execution_context(strategies.USER_MANAGED) for _ in profiles]
            self.scratch = int(self._engine.device_memory_size_v2)
        else:
            contexts = [self._engine.create_execution_context_without_device_memory() for _ in profiles]
            self.scratch = int(self._engine.device_memory_size)
        for number, context in enumerate(contexts):
            if context is None or not context.set_optimization_profile_async(number, device.stream):
                raise UserError(f"TensorRT cannot prepare {path}: see that the GPU has memory left")
        self.contexts = dict(zip(profiles, contexts, strict=True))

    def _check(self, info: GraphInfo, path: Path) -> None:
        """Compare its tensors with the graph's: what it reads, all that it gives, their kinds and known extents."""
        wanted = {tensor.name: tensor for tensor in (*info.inputs, *info.outputs)}
        strange = {*self._inputs} - {t.name for t in info.inputs} or {*self._outputs} ^ {t.name for t in info.outputs}
        for name in self.dtypes:
            if name in wanted and not strange:
                shape, graph = tuple(self._engine.get_tensor_shape(name)), wanted[name].shape
                same = len(shape) == len(graph) and all(
                    isinstance(axis, str) or extent in (-1, axis) for extent, axis in zip(shape, graph, strict=True)
                )
                if not same or (self.dtypes[name] == np.int32) != (wanted[name].dtype == "int32"):
                    strange = {name}
        if strange:
            raise UserError(
                f"{path} is not an engine of this bundle's {path.stem} graph (its {min(strange)} is another): build it "
                "with ivc-build"
            )

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its inputs, -1 where the extent is a run's."""
        return {name: tuple(self._engine.get_tensor_shape(name)) for name in self._inputs}

    def use_scratch(self, address: int) -> None:
        """Let all contexts work in the same memory, `scratch` bytes of it: they run one after the other."""
        for context in self.contexts.values():
            if hasattr(context, "set_device_memory"):
                context.set_device_memory(address, self.scratch)
            else:
                context.device_memory = address

    def run(
        self,
        profile: str,
        inputs: Mapping[str, Tensor],
        buffers: Buffers,
        place: str,
        extents: Mapping[str, int] | None = None,
    ) -> dict[str, Tensor]:
        """Start a run, and return its outputs, which lie in `buffers` under `place`. Does not wait for it.

        inputs: by name; those that the engine does not read are left out. extents: of the graph's symbolic axes, which
        outputs must have; those of other axes are the engine's to say.

        Raises:
            UserError: an input does not fit the engine's profile, or an output not the graph, or TensorRT cannot run
                it.
        """
        context = self.contexts[profile]
        for name in self._inputs:
            tensor = inputs[name]
            fits = context.set_input_shape(name, tensor.shape) and context.set_tensor_address(name, tensor.address)
            if not fits:
                raise UserError(
                    f"{name} of {list(tensor.shape)} does not fit the {self._name} engine: build engines with larger "
                    "maxima"
                )
        shapes = {name: self._shape(context, name, extents or {}) for name in self._outputs}
        outputs = {}
        for name, shape in shapes.items():
            size = math.prod(shape) * self.dtypes[name].itemsize
            outputs[name] = Tensor(buffers.get(f"{place}/{name}", size), shape, self.dtypes[name])
            if not context.set_tensor_address(name, outputs[name].address):
                raise UserError(f"TensorRT takes no memory for {name} of the {self._name} engine: {REBUILD}")
        if not context.execute_async_v3(self.device.stream):
            raise UserError(f"TensorRT cannot run the {self._name} engine: see that the GPU has memory left")
        return outputs

    def _shape(self, context: Any, name: str, extents: Mapping[str, int]) -> tuple[int, ...]:
        """An output's shape, once all inputs are set: known, and the graph's."""
        try:
            shape = tuple(context.get_tensor_shape(name))
        except ValueError:  # TensorRT's Dims of no known rank have a length of -1
            shape = (-1,)
        if any(extent < 0 for extent in shape):
            raise UserError(f"the {self._name} engine does not say how large {name} becomes: {REBUILD}")
        graph = self._shapes.get(name, shape)
        wanted = [extents.get(axis) if isinstance(axis, str) else axis for axis in graph]
        if len(shape) != len(wanted) or any(w not in (None, s) for w, s in zip(wanted, shape, strict=True)):
            due = ", ".join(str(axis if extent is None else extent) for axis, extent in zip(graph, wanted, strict=True))
            raise UserError(f"the {self._name} engine gives {name} of {list(shape)} in place of [{due}]: {REBUILD}")
        return shape


def check_hand_over(engines: Mapping[GraphName, Engine]) -> None:
    """Check that what goes from engine to engine as bytes is of one dtype on both sides.

    Raises:
        UserError: it is not: the engines were not built together.
    """
    found: dict[str, tuple[str, np.dtype[Any]]] = {}
    for engine in engines.values():
        for name, dtype in engine.dtypes.items():
            parts = TensorName.of(name)
            group = "caches" if parts.kind else HANDED_OVER.get(parts.stem, parts.stem)
            other, wanted = found.setdefault(group, (name, dtype))
            if dtype != wanted:
                raise UserError(f"{name} is {dtype} in one engine and {other} {wanted} in another: {REBUILD}")


class TensorrtSession:
    """A bundle's engines for this TensorRT and GPU, as ivc-build made them.

    target: "tensorrt" or "tensorrt-rtx". plugin: the library of the operators that the engines call, which must be the
    one that they were built with; it is loaded because the caller names it, never because a bundle does.
    device: None takes the current CUDA device.

    Conversations of several threads take turns, a run at a time; see AnySession.

    Raises:
        UserError: TensorRT is missing, or there are no engines for it and this GPU, or they are stale, or call another
            plugin.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: Target = "tensorrt",
        plugin: Path | None = None,
        device: Device | None = None,
    ) -> None:
        self.trt = load_tensorrt(target)
        self.capability = own_capability(self.trt)
        found = find_engines(bundle, target, self.capability, self.trt)
        found.check_plugin(plugin)
        if plugin is not None:
            load_plugin(plugin)
        record = found.record
        self.bundle = bundle
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self.backend: str = target
        self.dtype: FloatName = record.dtype
        self.versions: Mapping[str, str] = {target: str(self.trt.__version__)}
        self.capacity, self.recipe = record.capacity, record.recipe
        self._residual_scale = record.residual_scale
        self.device = device or CudaDevice()
        self.buffers = Buffers(self.device)
        self.runtime = self.trt.Runtime(make_logger(self.trt))
        self.engines = {
            name: Engine(
                self.trt,
                found.path(name),
                record.engines[name].profiles,
                self.device,
                self.runtime,
                bundle.manifest.graphs[name],
            )
            for name in GRAPH_NAMES
        }
        check_hand_over(self.engines)
        scratch = self.buffers.get("scratch", max(engine.scratch for engine in self.engines.values()))
        for engine in self.engines.values():
            engine.use_scratch(scratch)
        self._runs: dict[str, int] = {}

    def converse(self, ratio: float | None = None, capacity: int | None = None) -> TensorrtConversation:
        """Begin a conversation; see TensorrtConversation.

        Raises:
            UserError: the engines are built for another capacity.
        """
        if capacity not in (None, self.capacity):
            raise UserError(
                f"the engines' caches have {self.capacity} rows, not {capacity}: leave the capacity out, or build "
                "engines with other maxima"
            )
        return TensorrtConversation(self, ratio)

    def put(self, place: str, name: str, array: Array, dtype: np.dtype[Any]) -> Tensor:
        """Copy an array to the device, where it stays until another takes its place.

        Raises:
            UserError: values do not fit `dtype`.
        """
        array = cast(array, dtype, name, "build engines with ivc-build --dtype fp32")
        tensor = Tensor(self.buffers.get(f"{place}/{name}", array.size * dtype.itemsize), array.shape, dtype)
        self.device.upload(tensor.address, np.ascontiguousarray(array))
        return tensor

    def fetched(self, place: str, tensors: Mapping[str, Tensor]) -> Fetched[Tensor]:
        """Outputs of the newest run in `place`, to be looked at before the next one there; hidden_states at full scale.

        The mapping raises RuntimeError where that has begun.
        """
        number = self._runs[place]

        def fetch(tensor: Tensor) -> Array:
            array = np.empty(tensor.shape, tensor.dtype)
            with self.lock:
                if self._runs[place] != number:
                    raise RuntimeError(f"another {place} has taken the place of the one whose tensors are looked at")
                self.device.download(tensor.address, array)
            if array.dtype == np.int32:
                return array
            array = array.astype(np.float32, copy=False)
            return array / np.float32(self._residual_scale) if tensor is tensors.get("hidden_states") else array

        return Fetched(tensors, fetch)

    def begin(self, place: str) -> None:
        """Begin a run in `place`: the tensors of the one before are no longer to be had."""
        self._runs[place] = self._runs.get(place, 0) + 1


class EngineCache:
    """Keys and values of all layers on the device, in buffers of the engines' capacity."""

    def __init__(self, session: TensorrtSession) -> None:
        m = session.bundle.manifest
        self.capacity, self._session, self._sizes = session.capacity, session, m.decoder
        self.dtype = session.engines["decoder"].dtypes[f"past_key.{m.decoder.layers - 1}"]
        self._row = m.decoder.head_dim * self.dtype.itemsize
        self._buffers = Buffers(session.device)
        size = m.decoder.kv_heads * self.capacity * self._row
        self._addresses = {
            f"{kind}.{layer}": self._buffers.get(f"{kind}.{layer}", size)
            for layer in range(m.decoder.layers)
            for kind in ("key", "value")
        }
        self.whole = frozenset(m.selection.whole_layers)
        self.length = self.whole_length = 0

    def inputs(self, full: bool) -> dict[str, Tensor]:
        """past_key.i and past_value.i of all layers: the buffers, or, before a first run, nothing of them."""
        shape = (1, self._sizes.kv_heads, self.capacity if full else 0, self._sizes.head_dim)
        places = {TensorName.of(name).to("past"): address for name, address in self._addresses.items()}
        return {name: Tensor(address, shape, self.dtype) for name, address in places.items()}

    def lengths(self) -> dict[str, int]:
        """past_length, and past_length.i of layers kept whole."""
        return {"past_length": self.length} | {f"past_length.{layer}": self.whole_length for layer in self.whole}

    def append(self, outputs: Mapping[str, Tensor], kept: int, rows: int) -> None:
        """Append what prefix and decoder gave: `compact_*` of the layers that have it, `new_*` of the others."""
        for name, address in self._addresses.items():
            cache = TensorName.of(name)
            new = outputs.get(cache.to("compact")) or outputs[cache.to("new")]
            start = self.whole_length if cache.layer in self.whole else self.length
            size, step = new.shape[2] * self._row, self.capacity * self._row
            self._session.device.copy_blocks(
                address + start * self._row, step, new.address, size, size, self._sizes.kv_heads
            )
        self.length += kept
        self.whole_length += rows

    @property
    def room(self) -> int:
        """Rows that every layer still takes."""
        return self.capacity - (self.whole_length if self.whole else self.length)

    @property
    def bytes_used(self) -> int:
        """Bytes of the valid rows."""
        rows = (self._sizes.layers - len(self.whole)) * self.length + len(self.whole) * self.whole_length
        return int(2 * rows * self._sizes.kv_heads * self._row)


class TensorrtConversation:
    """Runs of one session that share a cache; as Conversation, from engine to engine on the device.

    A step's tensors are copied to the host when they are looked at: those of a prefill until the next prefill of the
    session, those of a decode step until its next one.

    Raises:
        UserError: the ratio is out of range, or the GPU has no memory for the cache.
    """

    def __init__(self, session: TensorrtSession, ratio: float | None = None) -> None:
        manifest = session.bundle.manifest
        self.session = session
        self.ratio = check_ratio(manifest.default_ratio if ratio is None else ratio)
        self.headroom = HEADROOM
        self.cache = EngineCache(session)
        self.next_position = 0
        self.timings = Timings()

    @one_at_a_time
    def run(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        pictures: Sequence[Picture] = (),
        keep_index: npt.NDArray[np.int32] | None = None,
    ) -> Step:
        """Run `tokens`, image tokens included, over the cache, and append the kept rows to it.

        keep_index: rows to keep instead of those that the prefix engine chooses, to replay another run.

        Raises:
            UserError: see planned and check_kept; or the run does not fit the engines.
        """
        session, cache = self.session, self.cache
        plan = planned(self, tokens, pictures)
        if keep_index is not None:
            keep_index = check_kept(keep_index, plan.rows)
        kept = len(plan.text_index) + plan.keep_count if keep_index is None else len(keep_index)
        self._check(plan, max(cache.length + kept, cache.whole_length + plan.rows if cache.whole else 0))
        stage = plan.stage(cache.length)
        session.begin(stage)
        embeds = self._put(stage, "inputs_embeds", session.bundle.embed(plan.tokens)[None])
        vision = self._see(pictures, plan, embeds) if pictures else []
        count = np.array([plan.keep_count], np.int32)
        inputs = cache.inputs(full=cache.length > 0) | {
            "inputs_embeds": embeds,
            "keep_count": Tensor(count.ctypes.data, count.shape, count.dtype),  # a shape input: in host memory
        }
        arrays: dict[str, Array] = {
            "position_ids": plan.position_ids,
            "logit_index": np.array([kept - 1], np.int32),
            **plan.selection_inputs,
        }
        arrays |= {name: np.array([length], np.int32) for name, length in cache.lengths().items()}
        inputs |= {name: self._put(stage, name, array) for name, array in arrays.items()}
        with self.timings.stage(f"{stage}.prefix"):
            extents = {"S": plan.rows, "L": len(plan.visual_index), "M": len(plan.text_index) + plan.keep_count}
            prefix = session.engines["prefix"].run(stage, inputs, session.buffers, f"{stage}/prefix", extents)
            if stage == "prefill":
                session.device.synchronize()  # for the timings alone
        inputs |= {name: tensor for name, tensor in prefix.items() if name not in inputs}
        if keep_index is not None:
            inputs["keep_index"] = self._put(stage, "keep_index", keep_index)
        with self.timings.stage(f"{stage}.decoder"):
            extents = {"M": kept, "R": 1}
            decoder = session.engines["decoder"].run(stage, inputs, session.buffers, f"{stage}/decoder", extents)
            cache.append(prefix | decoder, kept, plan.rows)
            session.device.synchronize()
        self.next_position = plan.next_position
        seen = tuple(session.fetched(stage, outputs) for outputs in vision)
        step = Step(plan, seen, session.fetched(stage, prefix), session.fetched(stage, decoder), keep_index)
        step.decoder["logits"]  # while no other thread's run takes their place
        return step

    def _put(self, place: str, name: str, array: Array) -> Tensor:
        engines = self.session.engines.values()
        dtype = next((engine.dtypes[name] for engine in engines if name in engine.dtypes), array.dtype)
        return self.session.put(place, name, array, dtype)

    def _see(self, pictures: Sequence[Picture], plan: Run, embeds: Tensor) -> list[dict[str, Tensor]]:
        """Run the pictures, and copy their tokens to their rows of `embeds`."""
        session, found, seen = self.session, [], 0
        row = embeds.nbytes // plan.rows
        for number, picture in enumerate(pictures):
            with self.timings.stage("vision"):
                inputs = {name: self._put("vision", name, array) for name, array in picture.inputs.items()}
                place = f"vision-{number}"
                frames = len(picture.grid.blocks)
                extents = {"B": frames, "visual": picture.grid.visual // frames}
                found.append(session.engines["vision"].run("prefill", inputs, session.buffers, place, extents))
                source = found[-1]["image_embeds"]
                target = embeds.address + row * int(plan.visual_index[seen])
                session.device.copy(target, source.address, source.nbytes)
                session.device.synchronize()
            seen += picture.grid.visual
        return found

    def _check(self, plan: Run, rows: int) -> None:
        recipe = self.session.recipe
        text = len(plan.text_index)
        for what, count, option in (
            ("visual tokens", len(plan.visual_index), "max_visual"),
            ("other tokens", text, "max_text"),
        ):
            most = getattr(recipe, option)
            if count > most:
                raise UserError(
                    f"the prompt has {count} {what}, and these engines take {most}: build them with "
                    f"--{option.replace('_', '-')} {count}"
                    + (", or use a smaller picture" if option == "max_visual" else "")
                )
        if rows > self.session.capacity:
            raise UserError(
                f"the engines' caches hold {self.session.capacity} rows, {rows} are needed: build engines with a "
                "larger --max-new"
            )
