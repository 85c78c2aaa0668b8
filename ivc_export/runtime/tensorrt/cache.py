"""The key-value cache of a conversation on TensorRT engines."""

from __future__ import annotations

from collections.abc import Mapping

from ivc_export.contract.graphs import TensorName, cache_shape
from ivc_export.contract.manifest import Manifest
from ivc_export.runtime.tensorrt.device import Buffers, Device
from ivc_export.runtime.tensorrt.engine import Engine, Tensor


class EngineCache:
    """Keys and values of all layers on the device, in buffers of the engines' capacity.

    Engines with our plugin's attention write to most of them themselves; see contract.caches.owned_caches_info.
    """

    def __init__(self, m: Manifest, decoder: Engine, device: Device, capacity: int) -> None:
        self.capacity, self._device, self._sizes = capacity, device, m.decoder
        self.dtype = decoder.dtypes[f"past_key.{m.decoder.layers - 1}"]
        self._buffers = Buffers(device)
        names = [f"{kind}.{layer}" for layer in range(m.decoder.layers) for kind in ("key", "value")]
        self._addresses = {name: self._buffers.get(name, self._tensor(name, 0, self.capacity).nbytes) for name in names}
        self.whole = frozenset(m.selection.whole_layers)
        self.length = self.whole_length = 0
        given = (TensorName.of(name) for name in decoder.outputs)
        names = [f"{name.kind}.{name.layer}" for name in given if name.role == "present"]
        self.written = {f"present_{name}": self._tensor(name, self._addresses[name], self.capacity) for name in names}
        """Outputs of the decoder engine that are caches."""
        self._names = {name: TensorName.of(name) for name in (*self._addresses, *self.written)}
        self._past = {
            rows: {self._names[name].to("past"): self._tensor(name, at, rows) for name, at in self._addresses.items()}
            for rows in (0, self.capacity)
        }

    def inputs(self) -> dict[str, Tensor]:
        """past_key.i and past_value.i of all layers: the buffers, or 0 rows of them before the first run.

        Buffers that an engine writes to are always given whole.
        """
        return {**self._past[self.capacity if self.length or self.written else 0]}

    def _tensor(self, name: str, address: int, rows: int) -> Tensor:
        return Tensor(address, cache_shape(self._sizes, name, rows), self.dtype)

    def lengths(self) -> dict[str, int]:
        """past_length, and past_length.i of layers kept whole."""
        return {"past_length": self.length} | {f"past_length.{layer}": self.whole_length for layer in self.whole}

    def append(self, outputs: Mapping[str, Tensor], kept: int, rows: int) -> None:
        """Append the outputs of prefix and decoder: `compact_*` for layers that have it, `new_*` for the others.

        Rows that the engines wrote themselves are there already.
        """
        for name, address in self._addresses.items():
            cache = self._names[name]
            if cache.to("present") in self.written:
                continue
            new = outputs.get(cache.to("compact")) or outputs[cache.to("new")]
            start = self.whole_length if cache.layer in self.whole else self.length
            row = new.shape[3] * self.dtype.itemsize
            size, step = new.shape[2] * row, self.capacity * row
            self._device.copy_blocks(address + start * row, step, new.address, size, size, self._sizes.kv_heads)
        self.length += kept
        self.whole_length += rows

    def shown(self, decoder: Mapping[str, Tensor], cut: int, kept: int) -> dict[str, Tensor]:
        """The decoder's outputs by the contract's names, with this run's rows of caches instead of the caches.

        cut: the first layer that has only kept rows. Call it before the rows are counted.
        """
        found = {}
        for name, tensor in decoder.items():
            if name in self.written:
                cache, (one, heads, _, size) = self._names[name], tensor.shape
                row = size * self.dtype.itemsize
                start, step = tensor.address + self.length * row, self.capacity * row
                tensor = Tensor(start, (one, heads, kept, size), self.dtype, head_step=step)
                name = cache.to("compact" if cache.layer is not None and cache.layer < cut else "new")
            found[name] = tensor
        return found

    def clear(self) -> None:
        """Start again. Rows stay, but are masked."""
        self.length = self.whole_length = 0

    @property
    def room(self) -> int:
        """How many rows every layer still takes."""
        return self.capacity - (self.whole_length if self.whole else self.length)

    @property
    def bytes_used(self) -> int:
        """Bytes of the valid rows."""
        rows = (self._sizes.layers - len(self.whole)) * self.length + len(self.whole) * self.whole_length
        return int(rows * self._sizes.row_values * self.dtype.itemsize)
