"""A conversation's memory on the device, as the graphs of the `ort-cuda` lowering need it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ivc_export.contract.caches import PLACED_ROWS
from ivc_export.contract.graphs import CacheRole, TensorName, cache_shape
from ivc_export.contract.manifest import Manifest
from ivc_export.dtypes import FloatName
from ivc_export.runtime.onnxruntime.loading import load_onnxruntime
from ivc_export.runtime.onnxruntime.stream import Mark, Place, Shapes, Stream, places_from

if TYPE_CHECKING:
    from onnxruntime import OrtValue

Values = dict[str, "OrtValue"]
Inputs = dict[str, "OrtValue | Place"]
"""A graph's inputs by name."""
Put = Callable[[npt.NDArray[Any]], "OrtValue"]
"""Puts an array into the device's memory."""


Arrays = dict[str, npt.NDArray[Any]]
"""Arrays in host memory by name."""


def on_host(array: npt.NDArray[Any]) -> OrtValue:
    """An array in host memory."""
    return load_onnxruntime().OrtValue.ortvalue_from_numpy(array)


@dataclass(frozen=True)
class PictureRows:
    """A picture's rows of `inputs_embeds`, to which vision writes `image_embeds`, or of another input of prefix.

    embeds: [1, rows, hidden], of `dtype`. start: the first of `count` rows. frames: in how many frames vision takes the
    picture.
    """

    embeds: OrtValue
    dtype: FloatName
    start: int
    count: int
    frames: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of vision's output, [frames, visual, hidden]."""
        return (self.frames, self.count // self.frames, self.embeds.shape()[2])

    @property
    def address(self) -> int:
        """Address of the first row."""
        row: int = self.embeds.shape()[2] * np.dtype(self.dtype).itemsize
        return int(self.embeds.data_ptr()) + self.start * row

    def fetch(self) -> npt.NDArray[np.float32]:
        """A copy in host memory."""
        rows: npt.NDArray[Any] = self.embeds.numpy()[0, self.start : self.start + self.count]
        return rows.reshape(self.shape).astype(np.float32)


@dataclass
class DeviceCache:
    """Keys and values of all layers in buffers of `capacity` rows. Layers that are compacted have a second set.

    rows: int32 [capacity], 0 to capacity - 1. length: valid rows. whole: layers that keep every row; they have
    `whole_length` valid rows. grows: whether its conversation takes a larger cache when this one is full.
    """

    capacity: int
    current: Values
    spare: Values
    whole: tuple[str, ...]
    rows: OrtValue | None = None
    length: int = 0
    whole_length: int = 0
    swapped: bool = False
    grows: bool = False

    @staticmethod
    def make(m: Manifest, capacity: int, dtype: FloatName, put: Put) -> DeviceCache:
        """Zeroed buffers."""

        def buffers(names: Iterable[str]) -> Values:
            return {name: put(np.zeros(cache_shape(m.decoder, name, capacity), dtype)) for name in names}

        everything = buffers(f"{kind}.{i}" for i in range(m.decoder.layers) for kind in ("key", "value"))
        rows = put(np.arange(capacity, dtype=np.int32))
        return DeviceCache(capacity, everything, buffers(compacted(m)), whole_layers(m), rows)

    @staticmethod
    def empty(m: Manifest) -> DeviceCache:
        """A cache that grows, without rows and without memory."""
        return DeviceCache(0, {}, {}, whole_layers(m), grows=True)

    @staticmethod
    def row_bytes(m: Manifest, dtype: FloatName) -> int:
        """Bytes of one row in all buffers."""
        layers = m.decoder.layers + len(compacted(m)) // 2  # keys and values each
        return layers * m.decoder.row_values * np.dtype(dtype).itemsize

    def inputs(self) -> Values:
        """past_key.i and past_value.i of all layers."""
        return {in_role(name, "past"): value for name, value in self.current.items()}

    def outputs(self) -> Values:
        """present_key.i and present_value.i in place, and compact_key.i and compact_value.i in the second set."""
        compact = {in_role(name, "compact"): value for name, value in self.spare.items()}
        return compact | {in_role(name, "present"): value for name, value in self.current.items()}

    def placed_rows(self, kept: int) -> dict[str, Place]:
        """The inputs that number rows, for a run that keeps so many: see contract.caches.placed_rows_info."""
        assert self.rows is not None
        address, size = int(self.rows.data_ptr()), np.dtype(np.int32).itemsize
        parts = (0, self.capacity), (self.length, kept), (self.length, 1)
        places = (Place(address + size * start, (count,), np.int32) for start, count in parts)
        return dict(zip(PLACED_ROWS, places, strict=True))

    def swap(self) -> None:
        """Make the compacted buffers the current ones."""
        self.swapped = not self.swapped
        for name, value in self.spare.items():
            self.spare[name], self.current[name] = self.current[name], value

    def index(self, keep_index: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """cache_index int32 [capacity] for the kept rows of a run: see contract.caches.in_place_info."""
        found = np.arange(self.capacity, dtype=np.int32)
        found[self.length : self.length + len(keep_index)] = self.length + keep_index
        return found

    def clear(self) -> None:
        """Start again, in the buffers that were current at first: their decode step may have been captured.

        Old rows stay. Attention gives invalid rows a weight of 0, and 0 times a finite number is 0. All rows are
        finite, because buffers start with zeros and get only keys and values.
        """
        self.length = self.whole_length = 0
        if self.swapped:
            self.swap()

    def take_over(self, smaller: DeviceCache) -> None:
        """Start with another cache's rows, which pass through the host."""
        for name, value in smaller.current.items():
            old = value.numpy()
            rows = np.zeros(self.current[name].shape(), old.dtype)
            rows[:, :, : smaller.capacity] = old
            self.current[name].update_inplace(rows)
        self.length, self.whole_length = smaller.length, smaller.whole_length

    @property
    def room(self) -> int | None:
        """How many rows every layer still takes. None if the cache grows."""
        return None if self.grows else self.capacity - max(self.lengths(0).values())

    @property
    def bytes_used(self) -> int:
        """Bytes of the valid rows."""
        if not self.current:
            return 0
        layer = [self.current[f"{kind}.0"] for kind in ("key", "value")]
        values = sum(value.shape()[1] * value.shape()[3] for value in layer)
        rows = len(self.whole) * self.whole_length + (len(self.current) // 2 - len(self.whole)) * self.length
        return int(rows * values * (2 if "float16" in layer[0].data_type() else 4))

    def lengths(self, rows: int) -> dict[str, int]:
        """Valid rows plus `rows`, by the suffix of a length's name: "", or ".0" for layer 0 kept whole."""
        return {"": self.length + rows} | dict.fromkeys(self.whole, self.whole_length + rows)


@cache
def in_role(name: str, role: CacheRole) -> str:
    """The name of a layer's keys or values in another role. Each run asks for all layers'."""
    return TensorName.of(name).to(role)


def compacted(m: Manifest) -> list[str]:
    """Names of the caches that are compacted, and have two sets of buffers."""
    names = (TensorName.of(tensor.name) for tensor in m.graphs["decoder"].outputs)
    return [f"{name.kind}.{name.layer}" for name in names if name.role == "compact"]


def whole_layers(m: Manifest) -> tuple[str, ...]:
    """Suffixes of the names of layers that keep every row."""
    names = (TensorName.of(tensor.name) for tensor in m.graphs["prefix"].inputs)
    return tuple(f".{name.layer}" for name in names if name.stem == "past_length" and name.layer is not None)


@dataclass(frozen=True)
class HostStep:
    """The inputs and results of a decode step, in host memory that the device also reads and writes.

    row exists only if the device does not read the embedding table, and before, the step before's best, only if it
    does. See lowering.onnxruntime.host_steps.
    """

    step: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.int32]
    best: npt.NDArray[np.int32]
    told: npt.NDArray[np.float32]
    row: npt.NDArray[Any] | None
    before: npt.NDArray[np.int32] | None

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by the inputs' names."""
        found = {"step": self.step, "wanted": self.wanted, "best": self.best, "told": self.told}
        either = {"row": self.row, "before": self.before}
        return found | {name: array for name, array in either.items() if array is not None}

    @staticmethod
    def make(
        m: Manifest, dtype: FloatName, gathered: bool, shared: Callable[..., npt.NDArray[Any]]
    ) -> tuple[HostStep, HostStep]:
        """Make two of zeros, for steps by turns: each is the step before the other. Only one of them may want logits at
        a time. shared: makes memory of a shape and a type. gathered: whether the device reads the table.
        """
        size = 1 + len(m.rotary.sections) + 1 + bool(whole_layers(m))
        told, bests = shared((m.decoder.vocab_size,), np.float32), [shared((2,), np.int32) for _ in range(2)]
        row = None if gathered else shared((1, 1, m.decoder.hidden_size), dtype)

        def one(best: npt.NDArray[np.int32], before: npt.NDArray[np.int32]) -> HostStep:
            numbers = shared((size,), np.int32), shared((1,), np.int32)
            return HostStep(*numbers, best, told, row, before if gathered else None)

        return one(*bests), one(*reversed(bests))


@dataclass(frozen=True)
class UploadedStep:
    """The inputs of a decode step, which one copy uploads.

    arrays: the inputs by name, to be written on the host. places: the same on the device.
    """

    arrays: dict[str, npt.NDArray[Any]]
    places: dict[str, Place]
    _host: npt.NDArray[np.uint8]
    _device: OrtValue

    @staticmethod
    def make(inputs: Shapes, put: Put) -> UploadedStep:
        """Make it of zeros, for inputs of these shapes and types."""
        starts, size = places_from(0, inputs)
        host, device = np.zeros(size, np.uint8), put(np.zeros(size, np.uint8))
        arrays = {name: np.ndarray(of.shape, of.dtype, host.data, of.address) for name, of in starts.items()}
        places, _ = places_from(int(device.data_ptr()), inputs)
        return UploadedStep(arrays, places, host, device)

    def upload(self) -> None:
        """Copy all inputs to the device."""
        self._device.update_inplace(self._host)


@dataclass
class Workspace:
    """Memory of one conversation at fixed addresses: caches, a decode step's other inputs, and its logits.

    host: the other inputs if they are in host memory. uploaded: those that are uploaded otherwise. bindings: of decode
    steps over both, and numbers of their captured CUDA graphs, by DeviceCache.swapped: each set of buffers has its own.
    prefills: captured prefills over these caches, by form; see prefill_graphs.
    mark: behind the last step, if that may run ahead. other: a second one over the same caches and logits: the two then
    take steps by turns. second: whether the last step was in the other one. ahead: positions and lengths of the last
    step, if it runs ahead.
    """

    cache: DeviceCache
    step: Inputs
    logits: OrtValue
    host: HostStep | None = None
    uploaded: UploadedStep | None = None
    bindings: dict[bool, tuple[Any, int]] = field(default_factory=dict)
    prefills: dict[Any, Any] = field(default_factory=dict)
    mark: Mark | None = None
    other: Workspace | None = None
    second: bool = False
    ahead: list[int] | None = None

    @staticmethod
    def make(m: Manifest, capacity: int, dtype: FloatName, put: Put) -> Workspace:
        """Make it with zeroed memory."""
        cache = DeviceCache.make(m, capacity, dtype, put)
        shapes: Shapes = {
            "inputs_embeds": ((1, 1, m.decoder.hidden_size), dtype),
            "position_ids": ((len(m.rotary.sections), 1, capacity), np.int32),
            **{f"seqlens_k{suffix}": ((1,), np.int32) for suffix in cache.lengths(0)},
        }
        uploaded = UploadedStep.make(shapes, put)
        totals = {
            f"total_sequence_length{suffix}": on_host(np.array(capacity, np.int32)) for suffix in cache.lengths(0)
        }
        return Workspace(cache, uploaded.places | totals, logits_of(m, put), uploaded=uploaded)

    @staticmethod
    def make_on_host(
        m: Manifest,
        capacity: int,
        dtype: FloatName,
        put: Put,
        hosts: tuple[HostStep, HostStep],
        stream: Stream | None,
    ) -> Workspace:
        """Make it with steps' inputs in host memory. stream: on which steps may run ahead, if they may."""
        cache, logits = DeviceCache.make(m, capacity, dtype, put), logits_of(m, put)

        def one(host: HostStep) -> Workspace:
            values = {name: on_host(array) for name, array in host.arrays.items()}
            return Workspace(cache, {**values}, logits, host, mark=stream.mark() if stream else None)

        first, second = map(one, hosts)
        if stream:
            first.other = second
            weakref.finalize(first, stream.wait)  # a step that ran ahead still uses the memory
        return first

    @property
    def last(self) -> Workspace:
        """Where the last step was taken."""
        return self.other if self.second and self.other is not None else self

    def turn(self) -> Workspace:
        """Where to take the next step."""
        self.second = self.other is not None and not self.second
        return self.last

    def taken(self, token: int, numbers: list[int]) -> Workspace | None:
        """Where a step with such positions and lengths runs already, if one does."""
        host, known = self.last.host, self.ahead == numbers
        return self.last if known and host and host.before is not None and host.before[0] == token else None

    def give_up(self) -> bool:
        """Give up the step that ran ahead, if there is one, and wait for its end.

        Returns whether the row that it wrote behind the valid ones is finite; see DeviceCache.clear.
        """
        ahead, self.ahead = self.ahead, None
        mark, host = self.last.mark, self.last.host
        return ahead is None or mark is None or host is None or (mark.wait() and bool(host.best[1]))


def logits_of(m: Manifest, put: Put) -> OrtValue:
    """Memory for a step's logits."""
    return put(np.zeros((1, 1, m.decoder.vocab_size), np.float32))
