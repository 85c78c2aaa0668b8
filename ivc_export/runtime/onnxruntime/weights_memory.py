"""Memory on the device for all weights of a model, in one allocation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from rich.filesize import decimal

from ivc_export.runtime.failures import known, told
from ivc_export.runtime.onnxruntime.loading import load_onnxruntime
from ivc_export.runtime.onnxruntime.session_options import CHECK_GPU, NO_ROOM

if TYPE_CHECKING:
    from onnxruntime import OrtValue

ALIGNMENT = 256
"""Of a weight's address, in bytes: kernels read best from such addresses, and cudaMalloc gives no others."""
CODES = {"i": 0, "u": 1, "f": 2}
"""DLPack's code of a kind of numbers, by NumPy's."""


class WeightsMemory:
    """Memory for weights. CUDA rounds each allocation up to 2 MiB, so one for each weight would waste a tenth of it.

    size: bytes, as `room` counts them. device: "cuda", or "cpu" to check the same on a host.
    """

    @staticmethod
    @cache
    def works(device: str) -> bool:
        """Whether this onnxruntime can write to a part of its memory."""
        numbers = np.arange(6, dtype=np.float16).reshape(2, 3)
        with suppress(AttributeError, *known()):
            memory = WeightsMemory(2 * ALIGNMENT, device)
            return all(np.array_equal(memory.place(numbers + i).numpy(), numbers + i) for i in range(2))
        return False

    @staticmethod
    def of(models: Sequence[ir.Model], device: str) -> WeightsMemory | None:
        """Memory for the large weights of these models. None if there are none.

        Raises:
            UserError: the device has no room for them.
        """
        weights = {name: tensor for model in models for name, tensor in large_weights(model)}
        size = sum(room(tensor.nbytes) for tensor in weights.values())
        with told(f"{decimal(size)} of weights do not fit into GPU memory", NO_ROOM, CHECK_GPU):
            return WeightsMemory(size, device) if size else None

    def __init__(self, size: int, device: str) -> None:
        self._owner = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type((size,), np.uint8, device, 0)
        self._size, self._used = size, 0

    def place(self, array: npt.NDArray[Any]) -> OrtValue:
        """Copy an array to the next place, and return a view of it there. The view keeps the memory alive."""
        start = self._used
        self._used += room(array.nbytes)
        if self._used > self._size:
            raise ValueError(f"{self._used} bytes of weights do not fit into {self._size}")
        placed = view(self._owner, start, array.shape, array.dtype)
        placed.update_inplace(array)
        return placed


def large_weights(model: ir.Model) -> list[tuple[str, ir.LazyTensor | ir.ExternalTensor]]:
    """A graph's weights that are converted, or as in the bundle, by name. Other initializers are small."""
    found = [(name, value.const_value) for name, value in model.graph.initializers.items()]
    return [(name, tensor) for name, tensor in found if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor)]


def room(size: int) -> int:
    """Bytes that an array of so many bytes takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class DLTensor(ctypes.Structure):
    """The structure of this name in DLPack's header."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def view(owner: OrtValue, start: int = 0, shape: tuple[int, ...] | None = None, dtype: Any = None) -> OrtValue:
    """A view of a tensor's memory from byte `start`, by default of all of it with the same shape and type.

    It keeps memory of onnxruntime's alive, but not an array that onnxruntime reads in place. onnxruntime takes it as
    memory that it does not own, which sessions can share.

    onnxruntime 1.23 has OrtValue.from_dlpack only internally.
    """
    inner: Any = owner._ortvalue
    capsule = inner.to_dlpack()
    if shape is not None:
        kind = np.dtype(dtype)
        tensor = DLTensor.from_address(pointer_of()(capsule, b"dltensor"))
        extents = (ctypes.c_int64 * len(shape))(*shape)
        tensor.data += start
        tensor.ndim, tensor.shape, tensor.strides = len(shape), extents, None
        tensor.code, tensor.bits = CODES[kind.kind], 8 * kind.itemsize
    return load_onnxruntime().OrtValue(type(inner).from_dlpack(capsule))  # which copies the shape


def pointer_of() -> Callable[[Any, bytes], int]:
    """The address of what a capsule of a name holds."""
    function = ctypes.pythonapi.PyCapsule_GetPointer
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return function
