"""Attention calls of the kernels' C interface from Python, and NumPy's answers in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tests.native.kernels import TYPES, Ints, Kernels

Doubles = npt.NDArray[np.float64]

STORED: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Half a unit in the last place of 1: of a weight, and of the answer. Scores of up to 40 are sums in float32.
ROUNDING = {"float32": 2.0**-19, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LAYOUTS = ("by head", "by row", "packed")
DECODER_SIZES = (64, 128)
ENCODER_SIZES = (64, 72, 80, 128)


class IvcStrides(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("frame", "head", "row")]


class IvcAttention(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "capacity", "heads", "kv_heads", "head_dim")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("fresh", ctypes.c_int32),
        *((name, IvcStrides) for name in ("q", "k", "v")),
    ]


class IvcEncoder(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("frames", "heads", "rows", "head_dim")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        *((name, IvcStrides) for name in ("q", "k", "v")),
    ]


def softmax(x: Doubles) -> Doubles:
    """Over the last axis; zeros where all are minus infinity."""
    most = x.max(axis=-1, keepdims=True)
    weights = np.exp(x - np.where(np.isinf(most), 0.0, most))
    found: Doubles = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return found


def laid_out(
    tensors: Sequence[npt.NDArray[Any]], layout: str
) -> tuple[list[npt.NDArray[Any]], list[int], list[IvcStrides]]:
    """q, k, v [frames, heads, rows, size] in memory: arrays that hold them, their first elements, and strides.

    Packed, all lie in one array [frames, rows, heads of q, k and v, size].
    """
    if layout == "by head":
        shapes = [x.shape for x in tensors]
        strides = [IvcStrides(h * r * d, r * d, d) for _, h, r, d in shapes]
        return [np.ascontiguousarray(x) for x in tensors], [0, 0, 0], strides
    by_row = [x.transpose(0, 2, 1, 3) for x in tensors]
    if layout == "by row":
        strides = [IvcStrides(r * h * d, d, h * d) for _, r, h, d in (x.shape for x in by_row)]
        return [np.ascontiguousarray(x) for x in by_row], [0, 0, 0], strides
    packed = np.concatenate(by_row, axis=2)
    _, rows, heads, size = packed.shape
    starts = np.cumsum([0] + [x.shape[2] * size for x in by_row[:2]]).tolist()
    return [packed] * 3, starts, [IvcStrides(rows * heads * size, size, heads * size)] * 3


def poison(generator: np.random.Generator, x: npt.NDArray[Any], at: Any) -> None:
    """What no answer may depend on: NaN, infinities and large numbers."""
    x[at] = generator.choice([np.nan, np.inf, -np.inf, 6e4], x[at].shape)


@dataclass(frozen=True)
class DecoderCase:
    """q [heads, S, size]; k, v [kv_heads, S, size]; caches [kv_heads, P, size], exact in `dtype`."""

    q: npt.NDArray[Any]
    k: npt.NDArray[Any]
    v: npt.NDArray[Any]
    key_cache: npt.NDArray[Any]
    value_cache: npt.NDArray[Any]
    past_length: int  # as the device has it
    append: bool
    dtype: str
    layout: str

    @property
    def past(self) -> int:
        """What counts as past."""
        capacity = self.key_cache.shape[1]
        most: int = capacity - self.q.shape[1] if self.append else capacity
        return max(0, min(self.past_length, most))

    def answer(self) -> Doubles:
        """y [S, heads * size]."""
        (heads, rows, size), group = self.q.shape, len(self.q) // len(self.k)
        keys, values = (
            np.concatenate([cache[:, : self.past], fresh], axis=1).astype(np.float64).repeat(group, axis=0)
            for cache, fresh in ((self.key_cache, self.k), (self.value_cache, self.v))
        )
        scores = self.q.astype(np.float64) @ keys.transpose(0, 2, 1) * np.float64(np.float32(size**-0.5))
        hidden = np.triu(np.ones((rows, rows), bool), 1)
        scores[:, :, self.past :][:, hidden] = -np.inf
        found: Doubles = (softmax(scores) @ values).transpose(1, 0, 2).reshape(rows, heads * size)
        return found

    def run(self, kernels: Kernels) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """y and both caches afterwards."""
        heads, rows, size = self.q.shape
        arrays, starts, strides = laid_out([x[None] for x in (self.q, self.k, self.v)], self.layout)
        capacity = self.key_cache.shape[1]
        extents = (rows, capacity, heads, len(self.k), size)
        struct = IvcAttention(*extents, size**-0.5, TYPES[self.dtype], int(self.append), *strides)
        put = [on_device(kernels, x) for x in (*arrays, self.key_cache, self.value_cache)]
        addresses = [kernels.address(x) + start * arrays[0].itemsize for x, start in zip(put, starts, strict=False)]
        caches = [kernels.address(x) if capacity else 0 for x in put[3:]]
        past = kernels.to_device(np.array([self.past_length], np.int32))
        y = on_device(kernels, np.full((rows, heads * size), np.nan, self.q.dtype))
        workspace = kernels.functions.ivcAttendWorkspace
        workspace.restype = ctypes.c_size_t
        scratch = kernels.to_device(np.full(workspace(ctypes.byref(struct)), 0xFF, np.uint8))
        pointers = [*addresses, *caches, kernels.address(past), kernels.address(y), kernels.address(scratch)]
        kernels.call("ivcAttendInPlace", ctypes.pointer(struct), *map(ctypes.c_void_p, pointers))
        y, key_cache, value_cache = (kernels.to_host(x).view(self.q.dtype) for x in (y, *put[3:]))
        return y, key_cache, value_cache

    def check(self, kernels: Kernels) -> float:
        """Against float64; returns the largest error, in units of what rounding may cost."""
        y, *caches = self.run(kernels)
        for found, wanted in zip(caches, self.caches(), strict=True):
            np.testing.assert_array_equal(bits(found), bits(wanted))
        return self.error(y)

    def caches(self) -> list[npt.NDArray[Any]]:
        """Keys and values afterwards."""
        found = [self.key_cache.copy(), self.value_cache.copy()]
        for cache, fresh in zip(found, (self.k, self.v), strict=True):
            if self.append:
                cache[:, self.past : self.past + fresh.shape[1]] = fresh
        return found

    def error(self, y: npt.NDArray[Any]) -> float:
        """Of an answer, in units of what rounding may cost."""
        largest = max(np.abs(x.astype(np.float64)).max(initial=0) for x in (self.v, self.value_cache[:, : self.past]))
        return error(y, self.answer(), 2 * ROUNDING[self.dtype] * float(largest))


@dataclass(frozen=True)
class EncoderCase:
    """q, k, v [frames, heads, rows, size], exact in `dtype`; windows int32 [rows] where there are any."""

    q: npt.NDArray[Any]
    k: npt.NDArray[Any]
    v: npt.NDArray[Any]
    dtype: str
    layout: str
    windows: Ints | None = None
    block_size: int = 0

    def answer(self) -> Doubles:
        """y [frames, rows, heads * size]; of places without a window zeros."""
        frames, heads, rows, size = self.q.shape
        q, k, v = (x.astype(np.float64) for x in (self.q, self.k, self.v))
        if self.windows is not None:
            nothing = self.windows < 0
            q[:, :, nothing] = k[:, :, nothing] = v[:, :, nothing] = 0
        scores = q @ k.transpose(0, 1, 3, 2) * np.float64(np.float32(size**-0.5))
        if self.windows is not None:
            seen = (self.windows[:, None] == self.windows) & (self.windows >= 0)
            scores = np.where(seen, scores, -np.inf)
        y = (softmax(scores) @ v).transpose(0, 2, 1, 3)[:, self.block_size : rows - self.block_size]
        found: Doubles = y.reshape(frames, rows - 2 * self.block_size, heads * size)
        return found

    def run(self, kernels: Kernels) -> npt.NDArray[Any]:
        frames, heads, rows, size = self.q.shape
        arrays, starts, strides = laid_out([self.q, self.k, self.v], self.layout)
        extents = (frames, heads, rows, size)
        struct = IvcEncoder(*extents, size**-0.5, TYPES[self.dtype], self.block_size, *strides)
        put = [on_device(kernels, x) for x in arrays]
        addresses = [kernels.address(x) + start * arrays[0].itemsize for x, start in zip(put, starts, strict=True)]
        windows = None if self.windows is None else kernels.to_device(self.windows)
        y = on_device(kernels, np.full((frames, rows - 2 * self.block_size, heads * size), np.nan, self.q.dtype))
        pointers = [*addresses, 0 if windows is None else kernels.address(windows), kernels.address(y)]
        kernels.call("ivcEncodeAttend", ctypes.pointer(struct), *map(ctypes.c_void_p, pointers))
        found: npt.NDArray[Any] = kernels.to_host(y).view(self.q.dtype)
        return found

    def check(self, kernels: Kernels) -> float:
        """Against float64; returns the largest error, in units of what rounding may cost."""
        return self.error(self.run(kernels))

    def error(self, y: npt.NDArray[Any]) -> float:
        """Of an answer, in units of what rounding may cost."""
        real = self.v if self.windows is None else self.v[:, :, self.windows >= 0]
        largest = float(np.abs(real.astype(np.float64)).max(initial=0))
        return error(y, self.answer(), 2 * ROUNDING[self.dtype] * largest)


def on_device(kernels: Kernels, x: npt.NDArray[Any]) -> Any:
    """A copy, of its bits: not every library of arrays knows bfloat16."""
    return kernels.to_device(bits(x).copy())


def bits(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = x.view(np.uint16) if x.itemsize == 2 else x.view(np.uint32)
    return found


def error(found: npt.NDArray[Any], wanted: Doubles, allowed: float) -> float:
    assert found.shape == wanted.shape
    apart = float(np.abs(found.astype(np.float64) - wanted).max(initial=0))
    assert apart <= allowed, f"{apart} is more than {allowed}"
    return apart / allowed if allowed else 0.0


def decoder_case(seed: int, most: int = 200) -> DecoderCase:
    """Fresh and cached rows, one or many or none; every third `past_length` is out of range."""
    generator = np.random.default_rng(seed)
    dtype = ("float16", "bfloat16", "float16", "bfloat16", "float32")[seed % 5]
    size, layout = int(generator.choice(DECODER_SIZES)), str(generator.choice(LAYOUTS))
    kv_heads, group = int(generator.integers(1, 4)), int(generator.integers(1, 17))
    rows = 1 if generator.random() < 0.4 else int(generator.integers(1, max(2, most // group)))
    append = bool(generator.integers(2))
    capacity = int(generator.integers(0, most)) * int(seed % 7 != 0) + rows * append
    past = int(generator.integers(0, capacity - rows * append + 1))
    if seed % 3 == 0:
        past = int(generator.choice([-(2**31), -1, capacity + 1, 2**31 - 1, 2**30 + 5]))

    def tensor(*shape: int) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = generator.standard_normal(shape) * generator.choice([0.5, 2])
        return found.astype(STORED[dtype])

    q, k, v = tensor(kv_heads * group, rows, size), tensor(kv_heads, rows, size), tensor(kv_heads, rows, size)
    caches = tensor(kv_heads, capacity, size), tensor(kv_heads, capacity, size)
    case = DecoderCase(q, k, v, *caches, past, append, dtype, layout)
    for cache in caches:
        poison(generator, cache, np.s_[:, case.past :])
    return case


def encoder_case(seed: int, windows: bool, most: int = 200) -> EncoderCase:
    """Rows of frames; or windows of several sizes in blocks, with places between them where nothing is."""
    generator = np.random.default_rng(seed)
    dtype = ("float16", "bfloat16", "float16", "bfloat16", "float32")[seed % 5]
    size, layout = int(generator.choice(ENCODER_SIZES)), str(generator.choice(LAYOUTS))
    frames, heads = int(generator.integers(1, 3)), int(generator.integers(1, 4))
    block_size = int(generator.integers(1, 80)) if windows else 0
    blocks = int(generator.integers(1, max(2, most // block_size))) if windows else 0
    rows = (blocks + 2) * block_size if windows else int(generator.integers(1, most))
    q, k, v = (
        (generator.standard_normal((frames, heads, rows, size)) * generator.choice([0.5, 2])).astype(STORED[dtype])
        for _ in range(3)
    )
    if not windows:
        return EncoderCase(q, k, v, dtype, layout)
    numbers = np.full(rows, -1, np.int32)
    at, number = block_size, 0
    while at < rows - block_size:  # a window is at most a block long, so that it lies in two blocks at most
        end = min(at + int(generator.integers(1, block_size + 1)), rows - block_size)
        places = np.arange(at, end)[generator.random(end - at) < 0.8]
        numbers[places] = number
        at, number = end, number + 1
    for x in (q, k, v):
        poison(generator, x, np.s_[:, :, numbers < 0])
    return EncoderCase(q, k, v, dtype, layout, numbers, block_size)
