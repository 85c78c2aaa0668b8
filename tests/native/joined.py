"""Calls over rows of joined heads from Python, and NumPy's answers in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.native.attention import ROUNDING, STORED, DecoderCase, Doubles, on_device, poison
from tests.native.kernels import TYPES, Kernels

EPSILON = 1e-6
Array = npt.NDArray[Any]


class IvcJoined(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "angle_rows", "heads", "kv_heads", "head_dim", "order", "type")),
        ("epsilon", ctypes.c_float),
        ("capacity", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("by_head", ctypes.c_int32),
    ]


class IvcJoinedRows(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("rows", "cos", "sin", "query_norm", "key_norm")]


@dataclass(frozen=True)
class JoinedCase:
    """rows [S, (heads + 2 kv_heads) size], exact in `dtype`; cos, sin float32 [angle rows, size / 2]; caches as in
    DecoderCase, and empty where heads are split alone."""

    rows: Array
    heads: int
    kv_heads: int
    size: int
    grouped: bool
    cos: Array | None
    sin: Array | None
    query_norm: Array | None
    key_norm: Array | None
    dtype: str
    key_cache: Array
    value_cache: Array
    past_length: int = 0

    def places(self) -> list[Array]:
        """Numbers of the heads of queries, keys and values, in a row."""
        group, numbers = self.heads // self.kv_heads, np.arange(self.heads + 2 * self.kv_heads)
        if not self.grouped:
            return np.split(numbers, [self.heads, self.heads + self.kv_heads])
        parts = np.split(numbers.reshape(self.kv_heads, group + 2), [group, group + 1], axis=1)
        return [part.ravel() for part in parts]

    def split(self) -> list[Array]:
        """q [S, heads, size], k and v [S, kv_heads, size], normed and turned, rounded to `dtype`."""
        by_head = self.rows.reshape(len(self.rows), -1, self.size).astype(np.float64)
        q, k, v = (by_head[:, place] for place in self.places())
        found = [self.turned(normed(x, of)) for x, of in ((q, self.query_norm), (k, self.key_norm))]
        return [x.astype(np.float32).astype(STORED[self.dtype]) for x in (*found, v)]

    def turned(self, x: Doubles) -> Doubles:
        """x [S, heads, size]."""
        if self.cos is None or self.sin is None:
            return x
        times = (len(x) // len(self.cos), 1)
        cos, sin = (np.tile(table.astype(np.float64), times)[:, None] for table in (self.cos, self.sin))
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def layer(self) -> DecoderCase:
        """The same with heads apart."""
        q, k, v = (np.ascontiguousarray(x.transpose(1, 0, 2)) for x in self.split())
        return DecoderCase(q, k, v, self.key_cache, self.value_cache, self.past_length, True, self.dtype, "by head")

    def structs(self, kernels: Kernels) -> tuple[Any, Any, list[Any]]:
        """Both structures, and what they point to."""
        order, angles = int(self.grouped), 1 if self.cos is None else len(self.cos)
        extents = (len(self.rows), angles, self.heads, self.kv_heads, self.size, order, TYPES[self.dtype])
        capacity = self.key_cache.shape[1]
        joined = IvcJoined(*extents, EPSILON, capacity, self.size**-0.5)
        given = (self.rows, self.cos, self.sin, self.query_norm, self.key_norm)
        put = [None if x is None else on_device(kernels, x) for x in given]
        rows = IvcJoinedRows(*(None if x is None else kernels.address(x) for x in put))
        return ctypes.pointer(joined), ctypes.pointer(rows), put

    def check_split(self, kernels: Kernels) -> None:
        """Against float64, with the values and without, row by row and by head."""
        joined, rows, _held = self.structs(kernels)
        wanted = self.split()
        put = [on_device(kernels, np.full(x.shape, np.nan, x.dtype)) for x in wanted]
        frames = len(self.rows) // joined.contents.angle_rows
        for outputs, by_head in ((put, 0), ([*put[:2], None], 0), (put, 1)):
            joined.contents.by_head = by_head
            pointers = [ctypes.c_void_p(0 if x is None else kernels.address(x)) for x in outputs]
            kernels.call("ivcTurnHeads", joined, rows, *pointers)
            for found, x in zip(put, wanted, strict=True):
                answer = x.reshape(frames, -1, *x.shape[1:]).swapaxes(1, 2) if by_head else x
                near(kernels.to_host(found).view(x.dtype), answer, self.dtype)

    def run(self, kernels: Kernels) -> tuple[Array, Array, Array]:
        """y and both caches afterwards, twice over the same counters, with the same y bit by bit."""
        joined, rows, _held = self.structs(kernels)
        workspace = kernels.functions.ivcAttendJoinedWorkspace
        workspace.restype = ctypes.c_size_t
        scratch = kernels.to_device(np.full(workspace(joined), 0xFF, np.uint8))
        counters = kernels.to_device(np.zeros(self.kv_heads, np.int32))
        past = kernels.to_device(np.array([self.past_length], np.int32))
        caches = [on_device(kernels, x) for x in (self.key_cache, self.value_cache)]
        y = on_device(kernels, np.full((len(self.rows), self.heads * self.size), np.nan, self.rows.dtype))
        answers = []
        for _ in range(2):
            pointers = [kernels.address(x) for x in (*caches, past, y, scratch, counters)]
            kernels.call("ivcAttendJoined", joined, rows, *map(ctypes.c_void_p, pointers))
            assert not kernels.to_host(counters).any()
            answers.append(kernels.to_host(y).tobytes())
        assert answers[0] == answers[1]
        found = [kernels.to_host(x).view(self.rows.dtype) for x in (y, *caches)]
        return found[0], found[1], found[2]

    def check(self, kernels: Kernels) -> None:
        """Attention over caches against float64."""
        y, *caches = self.run(kernels)
        self.check_answer(y, *caches)

    def check_answer(self, y: Array, *caches: Array) -> None:
        """y [S, heads size], and the caches afterwards."""
        layer = self.layer()
        rows = np.s_[:, layer.past : layer.past + len(self.rows)]
        for found, wanted in zip(caches, layer.caches(), strict=True):
            near(found[rows], wanted[rows], self.dtype)
            rest, kept = (np.delete(cache, np.r_[rows[1]], axis=1).astype(np.float32) for cache in (found, wanted))
            np.testing.assert_array_equal(rest, kept)  # any NaN is one: a GPU's casts write another than a host's
        layer.error(y)


def normed(x: Doubles, weight: Array | None) -> Doubles:
    if weight is None:
        return x
    found: Doubles = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON) * weight.astype(np.float64)
    return found


def near(found: Array, wanted: Array, dtype: str) -> None:
    """Within one unit in the last place."""
    found, wanted = (x.astype(np.float64).reshape(wanted.shape) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=2.1 * ROUNDING[dtype], atol=1e-5)


def joined_case(seed: int, most: int = 200) -> JoinedCase:
    """One row or several, over caches or none of them valid; every third `past_length` is out of range."""
    generator = np.random.default_rng(seed)
    dtype = ("float16", "bfloat16", "float16", "bfloat16", "float32")[seed % 5]
    size, kv_heads = int(generator.choice((64, 128))), int(generator.integers(1, 4))
    group = int(generator.integers(1, 17))
    count = 1 if generator.random() < 0.7 else int(generator.integers(2, 2 + most // group))
    capacity = count + int(generator.integers(0, most))
    past = int(generator.integers(0, capacity - count + 1))
    if seed % 3 == 0:
        past = int(generator.choice([-(2**31), -1, capacity + 1, 2**31 - 1, 2**30 + 5]))

    def tensor(*shape: int) -> Array:
        found: Array = generator.standard_normal(shape) * generator.choice([0.5, 2])
        return found.astype(STORED[dtype])

    angles = generator.uniform(-9, 9, (count, size // 2)) if generator.random() < 0.8 else None
    cos, sin = (None if angles is None else turn(angles).astype(np.float32) for turn in (np.cos, np.sin))
    norms = [tensor(size) if generator.random() < 0.4 else None for _ in range(2)]
    case = JoinedCase(
        tensor(count, (group + 2) * kv_heads * size),
        group * kv_heads,
        kv_heads,
        size,
        bool(generator.integers(2)),
        cos,
        sin,
        norms[0],
        norms[1],
        dtype,
        tensor(kv_heads, capacity, size),
        tensor(kv_heads, capacity, size),
        past,
    )
    for cache in (case.key_cache, case.value_cache):
        poison(generator, cache, np.s_[:, case.layer().past :])
    return case


def split_case(seed: int) -> JoinedCase:
    """Heads of any size that there is, over frames whose rows turn alike."""
    case = joined_case(seed, 40)
    generator = np.random.default_rng(seed)
    size, frames, rows = int(generator.choice((16, 64, 72, 80, 128))), int(generator.integers(1, 4)), len(case.rows)
    width = (case.heads + 2 * case.kv_heads) * size
    values = generator.standard_normal((frames * rows, width)).astype(case.rows.dtype)
    angles = generator.uniform(-9, 9, (rows, size // 2)) if case.cos is not None else None
    cos, sin = (None if angles is None else turn(angles).astype(np.float32) for turn in (np.cos, np.sin))
    norms = [
        None if x is None or size not in (16, 64, 128) else values[0, :size] for x in (case.query_norm, case.key_norm)
    ]
    none = np.zeros((case.kv_heads, 0, size), case.rows.dtype)
    return replace(
        case,
        rows=values,
        size=size,
        cos=cos,
        sin=sin,
        query_norm=norms[0],
        key_norm=norms[1],
        key_cache=none,
        value_cache=none,
    )
