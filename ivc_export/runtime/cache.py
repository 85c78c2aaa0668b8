"""KV caches in host memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.contract.graphs import TensorName, cache_shape
from ivc_export.contract.manifest import DecoderSizes
from ivc_export.errors import TooLongError, UserError

MOST = 2**31 - 1


def input_names(layers: range) -> list[str]:
    """Names of the graph inputs that take the caches of `layers`."""
    return [f"past_{kind}.{i}" for i in layers for kind in ("key", "value")]


class KVCache:
    """Keys and values of all layers, float32 [1, kv_heads, P, head_dim or value_dim] each.

    capacity: None keeps arrays of the exact length. A number keeps zeroed buffers of so many rows; graphs mask rows at
    or beyond the valid length. Shapes are then static, but graphs compute over the whole buffer. whole: layers that
    keep every row, also of pruned tokens.

    Raises:
        UserError: the capacity is out of range.
    """

    def __init__(self, sizes: DecoderSizes, capacity: int | None = None, whole: Collection[int] = ()) -> None:
        self.capacity = None if capacity is None else check_capacity(capacity)
        self.whole = frozenset(whole)
        self._lengths: dict[int | None, int] = dict.fromkeys(range(sizes.layers), 0)
        names = input_names(range(sizes.layers))
        self._arrays = {name: np.zeros(cache_shape(sizes, name, capacity or 0), np.float32) for name in names}
        named = {name: TensorName.of(name) for name in names}
        self._outputs = {name: (of.to("compact"), of.to("new"), of.layer) for name, of in named.items()}
        """For each array, the outputs that may give its rows, and its layer: made once, as each step appends."""

    def clear(self) -> None:
        """Start again. Rows of a buffer stay, but are masked."""
        self._lengths = dict.fromkeys(self._lengths, 0)
        if self.capacity is None:
            self._arrays = {name: array[:, :, :0] for name, array in self._arrays.items()}

    @property
    def length(self) -> int:
        """Rows of every layer but the whole ones."""
        return self._lengths[len(self._lengths) - 1]  # the last layer is never whole

    @property
    def room(self) -> int | None:
        """How many rows every layer still takes. None without a capacity."""
        return None if self.capacity is None else self.capacity - max(self._lengths.values())

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        """The array of a graph input `past_key.i` or `past_value.i`."""
        return self._arrays[name]

    def inputs(self, layers: range) -> dict[str, npt.NDArray[Any]]:
        """The graph inputs `past_key.i` and `past_value.i` of `layers`, and their lengths."""
        lengths = {"past_length": self.length} | {
            f"past_length.{i}": self._lengths[i] for i in layers if i in self.whole
        }
        found: dict[str, npt.NDArray[Any]] = {name: np.array([length], np.int32) for name, length in lengths.items()}
        return found | {name: self[name] for name in input_names(layers)}

    def append(self, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append the outputs of prefix and decoder: `compact_*` for layers that have it, `new_*` for the others.

        Raises:
            UserError: the buffers are full.
        """
        rows = {}
        for name, past in self._arrays.items():
            compact, every, layer = self._outputs[name]
            new = outputs[compact if compact in outputs else every]
            start, rows[layer] = self._lengths[layer], new.shape[2]
            if self.capacity is None:
                self._arrays[name] = np.concatenate([past, new], axis=2)
            elif start + rows[layer] > self.capacity:
                raise TooLongError(
                    f"the cache has {self.capacity} rows, but {start + rows[layer]} are needed: give it a larger "
                    "capacity"
                )
            else:
                past[:, :, start : start + rows[layer]] = new
        for layer, more in rows.items():
            self._lengths[layer] += more

    @property
    def bytes_used(self) -> int:
        """Bytes of the valid rows."""
        lengths = {name: self._lengths[TensorName.of(name).layer] for name in self._arrays}
        return sum(a.nbytes // max(a.shape[2], 1) * lengths[name] for name, a in self._arrays.items())


def check_capacity(capacity: int) -> int:
    """Check the number of rows of a cache, and return it.

    Raises:
        UserError: it is below 1, or beyond int32.
    """
    if not 1 <= capacity <= MOST:
        raise UserError(f"capacity {capacity} is out of range: give 1 to {MOST:,} rows")
    return capacity
