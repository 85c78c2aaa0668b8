"""Host memory that the device also reads and writes, allocated by our library of custom operators."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.errors import UserError


@cache
def functions(library: Path) -> ctypes.CDLL:
    """The library's own functions. onnxruntime has loaded the library already.

    Raises:
        UserError: it lacks one.
    """
    found = ctypes.CDLL(str(library.resolve()))
    address, number, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t
    try:
        for name, gives, takes in (
            ("ivcSharedMemory", address, [size]),
            ("ivcFreeSharedMemory", None, [address]),
            ("ivcStream", address, []),
            ("ivcAwaitStream", number, [address]),
            ("ivcFreeStream", None, [address]),
            ("ivcCopy", number, [address, address, address, size]),
            ("ivcTakeRows", number, [address, address, number, number, address, number, address]),
            ("ivcMakePixels", number, [address, address, address, address]),
            ("ivcMark", address, [address]),
            ("ivcMoveMark", number, [address, address]),
            ("ivcAwaitMark", number, [address]),
            ("ivcSeconds", ctypes.c_double, [address, address]),
            ("ivcFreeMark", None, [address]),
        ):
            function = getattr(found, name)
            function.restype, function.argtypes = gives, takes
    except AttributeError as error:
        raise UserError(
            f"{library} is of another version of ivc-export: build it again (docs/tensorrt.md says how)"
        ) from error
    return found


def shared_array(library: Path, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Zeros in such memory. It is freed with the last view of them.

    Raises:
        UserError: there is no such memory left.
    """
    size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    address = functions(library).ivcSharedMemory(size)
    if not address:
        raise UserError(f"{size} bytes of memory cannot be shared with the device: close other programs")
    buffer = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(buffer, functions(library).ivcFreeSharedMemory, address)
    array: npt.NDArray[Any] = np.frombuffer(buffer, np.dtype(dtype), int(np.prod(shape))).reshape(shape)
    array[...] = 0
    return array
