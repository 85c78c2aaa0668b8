"""Runs TensorRT engines. Everything stays on the device except the logits and tensors that a caller reads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.dtypes import FloatName, cast
from ivc_export.errors import TooLongError, UserError
from ivc_export.families.pictures import PIXELS, Levels, NormalisedInputs
from ivc_export.lowering import LOWERINGS
from ivc_export.runtime.interface import Conversation, Fetched, Seen, Step, Turn, no_numbers
from ivc_export.runtime.tensorrt.cache import EngineCache
from ivc_export.runtime.tensorrt.device import Buffers, CudaDevice, Device
from ivc_export.runtime.tensorrt.engine import Array, Engine, Tensor, check_hand_over
from ivc_export.selection.method import Method
from ivc_export.tensorrt.loading import Target, load_plugin, load_tensorrt, make_logger, own_capability
from ivc_export.tensorrt.store import find_engines


class TensorrtSession:
    """A bundle's engines for this TensorRT and GPU, as ivc-build made them.

    target: "tensorrt" or "tensorrt-rtx". plugin: the library whose operators the engines call. It must be the one with
    which they were built. It is loaded because the caller names it, never because a bundle does. device: None takes the
    current CUDA device.

    Conversations of several threads take turns, one run at a time; see Session.

    Raises:
        UserError: TensorRT is missing, or there are no engines for it and this GPU, or they are outdated, or call
            another plugin.
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
                LOWERINGS[record.graphs].io(bundle.manifest.graphs[name]),
            )
            for name in GRAPH_NAMES
        }
        check_hand_over(self.engines)
        scratch = self.buffers.get("scratch", max(engine.scratch for engine in self.engines.values()))
        for engine in self.engines.values():
            engine.use_scratch(scratch)
        self._runs: dict[str, int] = {}
        self._sent: dict[str, tuple[int, Array]] = {}

    def converse(
        self, ratio: float | None = None, capacity: int | None = None, method: str | Method | None = None
    ) -> TensorrtConversation:
        """Begin a conversation; see TensorrtConversation.

        Raises:
            UserError: the engines are built for another capacity.
        """
        if capacity not in (None, self.capacity):
            raise UserError(
                f"the engines' caches have {self.capacity} rows, not {capacity}: leave out the capacity, or build "
                "engines with other maxima"
            )
        return TensorrtConversation(self, ratio, method)

    def put(self, place: str, name: str, array: Array, dtype: np.dtype[Any]) -> Tensor:
        """Copy an array to the device. It stays there until another one replaces it.

        Raises:
            UserError: values do not fit `dtype`.
        """
        array = np.ascontiguousarray(cast(array, dtype, name, WIDER))
        where = f"{place}/{name}"
        tensor = Tensor(self.buffers.get(where, array.size * dtype.itemsize), array.shape, dtype)
        address, sent = self._sent.get(where, (0, None))
        if address != tensor.address or sent is None or not np.array_equal(sent, array):
            self.device.upload(tensor.address, array)
        if array.dtype == np.int32 and array.size <= MOST_REMEMBERED:
            self._sent[where] = (tensor.address, array.copy())
        else:
            self._sent.pop(where, None)
        return tensor

    def put_levels(self, place: str, name: str, levels: Levels, dtype: np.dtype[Any]) -> Tensor:
        """Write the pixels of 8-bit levels to the device, in `dtype`.

        Raises:
            UserError: values do not fit `dtype`.
        """
        table = cast(levels.table, dtype, name, WIDER)
        size = math.prod(levels.shape) * dtype.itemsize
        tensor = Tensor(self.buffers.get(f"{place}/{name}", size), levels.shape, dtype)
        self.device.write(tensor.address, size, lambda pixels: levels.write(pixels.view(dtype), table))
        return tensor

    def fetched(self, place: str, tensors: Mapping[str, Tensor]) -> Fetched[Tensor]:
        """Outputs of the newest run in `place`. They must be read before the next run there. hidden_states are at full
        scale.

        After the next run has begun, the mapping raises RuntimeError.
        """
        number = self._runs[place]

        def fetch(tensor: Tensor) -> Array:
            array = np.empty(tensor.shape, tensor.dtype)
            with self.lock:
                if self._runs[place] != number:
                    raise RuntimeError(f"another {place} has replaced the one whose tensors are read")
                if tensor.head_step is None:
                    self.device.download(tensor.address, array)
                else:
                    for head, rows in enumerate(array[0]):
                        self.device.download(tensor.address + head * tensor.head_step, rows)
            if array.dtype == np.int32:
                return array
            array = array.astype(np.float32, copy=False)
            return array / np.float32(self._residual_scale) if tensor is tensors.get("hidden_states") else array

        return Fetched(tensors, fetch)

    def best(self, logits: Tensor) -> int:
        """The first of the largest logits.

        Raises:
            UserError: a logit is NaN, or the largest is infinite.
        """
        seen = self.device.look(logits.address, logits.nbytes).view(logits.dtype)
        best = int(seen.argmax())  # of NaN, if there is one
        if not np.isfinite(seen[best]):
            raise UserError(no_numbers(self))
        return best

    def begin(self, place: str) -> None:
        """Begin a run in `place`. The tensors of the run before can no longer be read."""
        self._runs[place] = self._runs.get(place, 0) + 1


WIDER = "build engines with ivc-build --dtype float32"
MOST_REMEMBERED = 64
"""The most integers of an input that is not uploaded again if it equals that of the run before."""


@dataclass
class DecodeStep:
    """A decode step over one cache. places: where its inputs are; prefix, decoder: its outputs.

    graph: the CUDA graph that replays it, once that was tried.
    """

    places: Mapping[str, int]
    prefix: dict[str, Tensor]
    decoder: dict[str, Tensor]
    graph: Callable[[], object] | None = None
    tried: bool = False


class TensorrtConversation(Conversation):
    """Runs of one session that share a cache; see Conversation. Tensors go from engine to engine on the device.

    A step's tensors are copied to the host when they are read: those of a prefill until the next prefill of the
    session, those of a decode step until its next decode step.

    Raises:
        UserError: the ratio is out of range, or the GPU has no memory for the cache.
    """

    session: TensorrtSession
    cache: EngineCache

    def __init__(
        self, session: TensorrtSession, ratio: float | None = None, method: str | Method | None = None
    ) -> None:
        super().__init__(session, ratio, method)
        self.cache = EngineCache(session.bundle.manifest, session.engines["decoder"], session.device, session.capacity)
        self._step: DecodeStep | None = None
        self._count = np.zeros(1, np.int32)
        """keep_count, on which shapes depend. TensorRT reads it from host memory."""

    def _clear(self) -> None:
        self.cache.clear()

    def _go(self, turn: Turn) -> Step:
        session, cache, plan, stage = self.session, self.cache, turn.plan, turn.stage
        self._check(turn)
        session.begin(stage)
        wide = any(isinstance(picture, Seen) for picture in turn.pictures)  # their rows are in float32
        table = session.bundle.embed(plan.tokens, None if wide else self._dtype("inputs_embeds", np.dtype(np.float32)))
        rows = turn.added(session.bundle.manifest.decoder) | {"image_embeds": table[None]}
        turn.write_seen(rows)
        embeds = self._put(stage, "inputs_embeds", rows.pop("image_embeds"))
        added = {name: self._put(stage, name, array) for name, array in rows.items()}
        vision = self._see(turn, {"image_embeds": embeds} | added)
        arrays = turn.inputs
        self._count[:] = arrays.pop("keep_count")
        arrays |= {name: np.array([length], np.int32) for name, length in cache.lengths().items()}
        inputs = cache.inputs() | {
            **added,
            "inputs_embeds": embeds,
            "keep_count": Tensor(self._count.ctypes.data, self._count.shape, self._count.dtype),
        }
        inputs |= {name: self._put(stage, name, array) for name, array in arrays.items()}
        if turn.keep_index is not None:
            inputs["keep_index"] = self._put(stage, "keep_index", turn.keep_index)
        prefix, decoder = self._decode(turn, inputs) if stage == "decode" else self._prefill(turn, inputs)
        shown = cache.shown(decoder, session.bundle.manifest.selection_layer, turn.kept)
        with self.timings.stage(f"{stage}.decoder"):
            cache.append(prefix | decoder, turn.kept, plan.rows)
            session.device.synchronize()
        best = None if self.logits_wanted else session.best(decoder["logits"])
        given, found = session.fetched(stage, prefix), session.fetched(stage, shown)
        step = Step(plan, vision, given, found, turn.keep_index, best)
        if self.logits_wanted:
            step.decoder["logits"]  # before another thread's run replaces them
        return step

    def _prefill(self, turn: Turn, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with self.timings.stage("prefill.prefix"):
            prefix = self._run_prefix(turn, inputs)
            self.session.device.synchronize()  # only for the timings
        with self.timings.stage("prefill.decoder"):
            return prefix, self._run_decoder(turn, inputs, prefix)

    def _decode(self, turn: Turn, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A decode step: first run directly, then captured too, and then replayed as long as its addresses stay.

        Once shapes are set, TensorRT wants a run before one that is captured; so the captured one sets none.
        """

        def run() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            prefix = self._run_prefix(turn, inputs)
            return prefix, self._run_decoder(turn, inputs, prefix)

        def start() -> None:
            for name in ("prefix", "decoder"):
                self.session.engines[name].start("decode")

        with self.timings.stage("decode.decoder"):
            places = {name: tensor.address for name, tensor in inputs.items()}
            if self._step is None or self._step.places != places:
                self._step = DecodeStep(places, *run())
                return self._step.prefix, self._step.decoder
            step = self._step
            if step.graph is not None:
                step.graph()
                return step.prefix, step.decoder
            found = run()
            if not step.tried:
                self.session.device.synchronize()
                step.graph, step.tried = self.session.device.capture(start), True
            return found

    def _run_prefix(self, turn: Turn, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session, plan = self.session, turn.plan
        extents = {"S": plan.rows, "L": len(plan.visual_index), "M": plan.kept}
        place = f"{turn.stage}/prefix"
        return session.engines["prefix"].run(turn.stage, inputs, session.buffers, place, extents)

    def _run_decoder(self, turn: Turn, inputs: Mapping[str, Tensor], prefix: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = self.session
        extents = {"M": turn.kept, "R": 1} | ({"P": self.cache.capacity} if self.cache.written else {})
        place, both = f"{turn.stage}/decoder", {**prefix, **inputs}
        engine = session.engines["decoder"]
        return engine.run(turn.stage, both, session.buffers, place, extents, self.cache.written)

    def _put(self, place: str, name: str, array: Array) -> Tensor:
        return self.session.put(place, name, array, self._dtype(name, array.dtype))

    def _dtype(self, name: str, other: np.dtype[Any]) -> np.dtype[Any]:
        """An input's dtype in the engines; `other` if none reads it."""
        engines = self.session.engines.values()
        return next((engine.dtypes[name] for engine in engines if name in engine.dtypes), other)

    def _put_frame(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """The vision engine's inputs for a frame. Pixels are computed from 8-bit levels if these are known."""
        found = dict[str, Tensor]()
        for name in arrays:
            if name == PIXELS and isinstance(arrays, NormalisedInputs):
                dtype = self._dtype(name, np.dtype(np.float32))
                found[name] = self.session.put_levels("vision", name, arrays.levels, dtype)
            else:
                found[name] = self._put("vision", name, arrays[name])
        return found

    def _see(self, turn: Turn, targets: Mapping[str, Tensor]) -> tuple[Mapping[str, Array], ...]:
        """Run vision on the pictures, and copy its outputs to their rows of `targets`, by the outputs' names.

        A video's frames run one by one, because an engine for frames of any size takes one. Returns the outputs for
        each picture, also for those that were seen before.
        """
        session, found = self.session, list[Mapping[str, Array]]()
        for number, picture in enumerate(turn.pictures):
            if isinstance(picture, Seen):
                found.append(picture.outputs)
                continue
            frames = list[Mapping[str, Array]]()
            for frame, arrays in enumerate(picture.frames):
                with self.timings.stage("vision"):
                    inputs = self._put_frame(arrays)
                    place = f"vision-{number}" if picture.grid.time == 1 else f"vision-{number}.{frame}"
                    extents = {"B": inputs[PIXELS].shape[0], "visual": picture.grid.visual // picture.grid.batch}
                    outputs = session.engines["vision"].run("prefill", inputs, session.buffers, place, extents)
                    for name, target in targets.items():
                        start = (turn.places if name == "image_embeds" else turn.firsts)[number]
                        start += frame * (picture.grid.visual // picture.grid.time)
                        row, source = target.nbytes // target.shape[1], outputs[name]
                        session.device.copy(target.address + row * start, source.address, source.nbytes)
                    session.device.synchronize()
                frames.append(session.fetched("prefill", outputs))
            whole = {name: np.concatenate([one[name] for one in frames]) for name in targets} if frames[1:] else {}
            found.append(whole or frames[0])
        return tuple(found)

    def _check(self, turn: Turn) -> None:
        recipe, cache, plan = self.session.recipe, self.cache, turn.plan
        rows = max(cache.length + turn.kept, cache.whole_length + plan.rows if cache.whole else 0)
        text = len(plan.text_index)
        for what, count, option in (
            ("visual tokens", len(plan.visual_index), "max_visual"),
            ("other tokens", text, "max_text"),
        ):
            most = getattr(recipe, option)
            if count > most:
                raise TooLongError(
                    f"the prompt has {count} {what}, but these engines take {most} at most: build them with "
                    f"--{option.replace('_', '-')} {count}"
                    + (", or use a smaller picture" if option == "max_visual" else "")
                )
        if rows > self.session.capacity:
            raise TooLongError(
                f"the engines' caches have {self.session.capacity} rows, but {rows} are needed: build engines with "
                "a larger --max-new"
            )
