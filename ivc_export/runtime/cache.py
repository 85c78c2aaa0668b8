"""Key-value caches on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.contract import DecoderSizes
from ivc_export.errors import UserError


def input_names(layers: range) -> list[str]:
    """Names of the graph inputs that caches of `layers` feed."""
    return [f"past_{kind}.{i}" for i in layers for kind in ("key", "value")]


class KVCache:
    """Keys and values of all layers, float32 [1, kv_heads, P, head_dim] each.

    capacity: None keeps arrays of the exact length; a number keeps zeroed buffers of so many rows, whose rows at or
    beyond `length` the graphs mask: static shapes, at the price of computing over the whole buffer.
    """

    def __init__(self, sizes: DecoderSizes, capacity: int | None = None) -> None:
        self.length = 0
        self.capacity = capacity
        shape = (1, sizes.kv_heads, capacity or 0, sizes.head_dim)
        self._arrays = {name: np.zeros(shape, np.float32) for name in input_names(range(sizes.layers))}

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        """The array of a graph input `past_key.i` or `past_value.i`."""
        return self._arrays[name]

    def inputs(self, layers: range) -> dict[str, npt.NDArray[np.float32]]:
        """The graph inputs `past_key.i` and `past_value.i` of `layers`."""
        return {name: self[name] for name in input_names(layers)}

    def append(self, outputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append what the decoder gives: `compact_*` of the layers below the cut and `new_*` of those above.

        Raises:
            UserError: the buffers are full.
        """
        rows = 0
        for name, past in self._arrays.items():
            suffix = name.removeprefix("past_")
            new = outputs[f"compact_{suffix}" if f"compact_{suffix}" in outputs else f"new_{suffix}"]
            rows = new.shape[2]
            if self.capacity is None:
                self._arrays[name] = np.concatenate([past, new], axis=2)
            elif self.length + rows > self.capacity:
                raise UserError(
                    f"the cache holds {self.capacity} rows, {self.length + rows} are needed: give it a larger capacity"
                )
            else:
                past[:, :, self.length : self.length + rows] = new
        self.length += rows

    @property
    def bytes_used(self) -> int:
        """Bytes of the valid rows."""
        return sum(array.nbytes // max(array.shape[2], 1) * self.length for array in self._arrays.values())
