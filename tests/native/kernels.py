"""The kernels' C interface from Python, on host arrays (tests/emulation.cpp) or device arrays, and NumPy's answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ivc_export.selection.ivc_prune import descending, kept_rows

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Array = Any  # a NumPy or a CuPy array

PLUGIN = Path(__file__).parents[2] / "graphs" / "plugin"
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
SEED_DIVISOR = 100


class IvcSelection(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kv_heads", "rows", "head_dim", "visual", "text", "queries")),
        *((name, ctypes.c_int32) for name in ("keep_count", "seed_divisor", "type", "softmax")),
    ]


class IvcRows(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("outer", ctypes.c_int32),
        ("row_bytes", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Case:
    """Inputs of SelectTokens. values: [kv_heads, S, head_dim], exact in `dtype`."""

    values: Floats
    priority: Floats
    visual: Ints
    text: Ints
    query: Ints
    keep_count: int
    dtype: str = "float32"
    softmax_over_all: bool = False

    @property
    def stored(self) -> npt.NDArray[Any]:
        """The values in `dtype`, bfloat16 as its bits."""
        if self.dtype == "bfloat16":
            return self.values.astype(ml_dtypes.bfloat16).view(np.uint16)
        return self.values.astype(self.dtype)

    @property
    def struct(self) -> IvcSelection:
        heads, rows, size = self.values.shape
        sizes = (heads, rows, size, len(self.visual), len(self.text), len(self.query), self.keep_count)
        return IvcSelection(*sizes, SEED_DIVISOR, TYPES[self.dtype], int(self.softmax_over_all))

    def votes(self, queries: Ints) -> Floats:
        """By query and visual token, mean over heads: float32 [queries, L]."""
        keys = self.values if self.softmax_over_all else self.values[:, self.visual]
        scores = self.values[:, queries] @ keys.transpose(0, 2, 1) / np.sqrt(np.float32(self.values.shape[-1]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        found: Floats = np.mean(weights[..., self.visual] if self.softmax_over_all else weights, axis=0)
        return found

    def check(self, keep: Ints, score: Floats, seeds: Ints, tolerance: float) -> tuple[float, bool]:
        """Compare with NumPy; returns the largest error of the scores, and whether kept rows flipped at a near-tie.

        Seeds may be exchanged for others whose votes differ by rounding alone; scores are compared for those seeds.
        """
        by_text = self.votes(self.query)
        votes = by_text.mean(axis=0)
        wanted_seeds = descending(votes)[: max(1, round(len(self.visual) / SEED_DIVISOR))]
        assert len(seeds) == len(wanted_seeds) == len(set(seeds.tolist()))
        close = 4 * float(np.spacing(votes.max()))
        assert np.abs(votes[seeds] - votes[wanted_seeds]).max() <= close
        wanted_score = np.concatenate([by_text, self.votes(self.visual[seeds])]).mean(axis=0)
        error = float(np.abs(score - wanted_score).max())
        assert error <= tolerance
        assert len(keep) == len(self.text) + self.keep_count
        np.testing.assert_array_equal(keep, self.kept(score, seeds))
        flipped = np.isin(self.visual, np.setxor1d(keep, self.kept(wanted_score, seeds)))
        assert not flipped.any() or np.ptp(wanted_score[flipped]) <= 2 * error
        return error, bool(flipped.any())

    def kept(self, score: Floats, seeds: Ints) -> Ints:
        """Kept rows by selection.py, from given scores and seeds."""
        return kept_rows(score, seeds, self.priority, self.visual, self.text, self.keep_count)


def random_case(seed: int, most: int, dtype: str = "float32") -> Case:
    """Visual tokens anywhere among the rows, up to `most`; every third case repeats value vectors and priorities."""
    generator = np.random.default_rng(seed)
    length = int(np.exp(generator.uniform(0, np.log(most + 1))))
    length = most if seed % 50 == 0 else max(1, min(length, most))
    text = int(generator.integers(1, 40))
    heads, size = int(generator.integers(1, 5)), int(generator.choice([8, 40, 64, 128]))
    rows = generator.permutation(length + text).astype(np.int32)
    visual, others = np.sort(rows[:length]), np.sort(rows[length:])
    values = generator.standard_normal((heads, length + text, size), np.float32)
    if seed % 3 == 0:
        values[:, visual] = values[:, generator.choice(visual, length)]
    if dtype != "float32":
        values = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)
    ivc = generator.permutation(length)[: length // 5]
    priority = np.zeros(length, np.float32)
    priority[ivc] = np.arange(len(ivc) + 1, 1, -1) // (2 if seed % 3 == 0 else 1) + 2
    query = np.sort(generator.choice(others, int(generator.integers(1, text + 1)), replace=False))
    keep_count = int(generator.integers(1, length + 1))
    return Case(values, priority, visual, others, query, keep_count, dtype, bool(seed % 4 == 1))


@dataclass
class Kernels:
    """A library with the kernels' calls.

    to_device: a NumPy array to what the library works on; to_host: back; address: of such an array.
    stream: a CUDA stream's handle, or for the emulation the order in which blocks and threads run, 0 or 1.
    """

    path: Path
    to_device: Callable[[npt.NDArray[Any]], Array]
    to_host: Callable[[Array], npt.NDArray[Any]]
    address: Callable[[Array], int]
    stream: int = 0
    functions: ctypes.CDLL = field(init=False)

    def __post_init__(self) -> None:
        self.functions = ctypes.CDLL(str(self.path))
        self.functions.ivcSelectionWorkspace.restype = ctypes.c_size_t

    def call(self, name: str, *arguments: object) -> None:
        """Call a function on the stream; arrays are given by their addresses."""
        converted = [
            a
            if isinstance(a, (int, ctypes.Structure, ctypes.Array, ctypes.c_void_p, ctypes._Pointer))
            else ctypes.c_void_p(self.address(a))
            for a in arguments
        ]
        references = [ctypes.byref(a) if isinstance(a, IvcSelection) else a for a in converted]
        status = getattr(self.functions, name)(*references, ctypes.c_void_p(self.stream))
        assert status == 0, f"{name} returned {status}"

    @property
    def staged(self) -> int:
        """How many emulated launches had weights that wait in shared memory."""
        return ctypes.c_int32.in_dll(self.functions, "ivcStagedLaunches").value

    @contextmanager
    def sharing(self, kib: int) -> Iterator[None]:
        """Emulate a device whose multiprocessors have so much shared memory for kernels that start early."""
        self.call("ivcEmulateShared", kib * 1024)
        try:
            yield
        finally:
            self.call("ivcEmulateShared", 228 * 1024)

    def workspace(self, struct: IvcSelection) -> Array:
        """Scratch memory, filled with a pattern that no call may rely on."""
        size = self.functions.ivcSelectionWorkspace(ctypes.byref(struct))
        return self.to_device(np.full(size, 0xA5, np.uint8))

    def select(self, case: Case) -> tuple[Ints, Floats, Ints]:
        """keep_index, token_score, seed_index."""
        struct, put = case.struct, self.to_device
        seeds = self.functions.ivcSeedCount(len(case.visual), SEED_DIVISOR)
        keep = put(np.full(len(case.text) + case.keep_count, -1, np.int32))
        score, seed = put(np.zeros(len(case.visual), np.float32)), put(np.zeros(seeds, np.int32))
        inputs = [put(a) for a in (case.stored, case.priority, case.visual, case.text, case.query)]
        self.call("ivcSelectTokens", struct, *inputs, keep, score, seed, self.workspace(struct))
        return self.to_host(keep), self.to_host(score), self.to_host(seed)

    def kept_rows(self, case: Case, score: Floats, seeds: Ints) -> Ints:
        """keep_index from given scores and seeds."""
        struct, put = case.struct, self.to_device
        keep = put(np.full(len(case.text) + case.keep_count, -1, np.int32))
        inputs = [put(a) for a in (score, seeds.astype(np.int32), case.priority, case.visual, case.text)]
        self.call("ivcKeptRows", struct, *inputs, keep, self.workspace(struct))
        return self.to_host(keep)

    def gather(self, tensors: Sequence[tuple[npt.NDArray[Any], int]], keep_index: Ints) -> list[npt.NDArray[Any]]:
        """CompactGatherN: each tensor's rows `keep_index` along its axis."""
        sources, targets, rows = [], [], []
        for x, axis in tensors:
            shape = (*x.shape[:axis], len(keep_index), *x.shape[axis + 1 :])
            sources.append(self.to_device(x))
            targets.append(self.to_device(np.zeros(shape, x.dtype)))
            rows.append(self.rows(sources[-1], targets[-1], x, axis))
        extent = tensors[0][0].shape[tensors[0][1]]
        array, keep = (IvcRows * len(rows))(*rows), self.to_device(keep_index)
        self.call("ivcCompactGather", array, len(rows), extent, keep, len(keep_index))
        return [self.to_host(target) for target in targets]

    def cache_index(self, keep_index: Ints, past: int, capacity: int) -> Ints:
        """CacheIndex: from which row each row of a cache comes."""
        keep, index = self.to_device(keep_index), self.to_device(np.full(capacity, -1, np.int32))
        self.call("ivcCacheIndex", keep, len(keep_index), past, capacity, index)
        return self.to_host(index)

    def append(
        self, caches: Sequence[npt.NDArray[Any]], new: Sequence[npt.NDArray[Any]], past_length: int
    ) -> list[npt.NDArray[Any]]:
        """AppendRows: the caches [heads, capacity, size] with `new` [heads, rows, size] at `past_length`."""
        sources, targets = [self.to_device(x) for x in new], [self.to_device(x.copy()) for x in caches]
        rows = [self.rows(s, t, x, 1) for s, t, x in zip(sources, targets, new, strict=True)]
        array, past = (IvcRows * len(rows))(*rows), self.to_device(np.array([past_length], np.int32))
        self.call("ivcAppendRows", array, len(rows), new[0].shape[1], past, caches[0].shape[1])
        return [self.to_host(target) for target in targets]

    def gather_into(
        self, caches: Sequence[npt.NDArray[Any]], new: Sequence[npt.NDArray[Any]], keep_index: Ints, past: int | None
    ) -> list[npt.NDArray[Any]]:
        """CompactGatherN into caches [heads, capacity, size]: rows `keep_index` of `new`, from row `past` on."""
        sources, targets = [self.to_device(x) for x in new], [self.to_device(x.copy()) for x in caches]
        rows = [self.rows(s, t, x, 1) for s, t, x in zip(sources, targets, new, strict=True)]
        array, keep = (IvcRows * len(rows))(*rows), self.to_device(keep_index)
        offset = ctypes.c_void_p() if past is None else self.to_device(np.array([past], np.int32))
        extents = new[0].shape[1], caches[0].shape[1]
        self.call("ivcCompactGatherInto", array, len(rows), extents[0], keep, len(keep_index), offset, extents[1])
        return [self.to_host(target) for target in targets]

    def rows(self, source: Array, target: Array, x: npt.NDArray[Any], axis: int) -> IvcRows:
        """A tensor, as [outer, rows, row bytes]."""
        outer, inner = int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis + 1 :]))
        return IvcRows(self.address(source), self.address(target), outer, inner * x.itemsize)


def check_cache_index(kernels: Kernels, seed: int) -> None:
    """Kept rows behind the past, and all others where they are; also where the cache ends before the kept rows do."""
    generator = np.random.default_rng(seed)
    past, rows, kept = (int(generator.integers(0, n)) for n in (600, 600, 600))
    keep = np.sort(generator.permutation(rows + kept)[:kept]).astype(np.int32)
    capacity = past + kept + (int(generator.integers(0, 400)) if seed % 3 else -min(kept, 5))
    wanted = np.arange(capacity, dtype=np.int32)
    wanted[past : past + kept] = past + keep[: capacity - past]
    np.testing.assert_array_equal(kernels.cache_index(keep, past, capacity), wanted)


def check_ties(kernels: Kernels, case: Case) -> None:
    """From the same scores the same rows, also where most scores tie, or all do, or zeros differ in sign."""
    generator = np.random.default_rng(len(case.visual))
    length = len(case.visual)
    seeds = generator.permutation(length)[: max(1, round(length / SEED_DIVISOR))].astype(np.int32)
    fine = (generator.random(length) / length).astype(np.float32)
    coarse = (np.round(fine * 3 * length) / np.float32(3 * length)).astype(np.float32)
    zeros = np.where(generator.random(length) < 0.5, np.float32(-0.0), np.float32(0.0)).astype(np.float32)
    for score in (fine, coarse, np.full(length, 0.25, np.float32), zeros):
        np.testing.assert_array_equal(kernels.kept_rows(case, score, seeds), case.kept(score, seeds))


def gather_case(seed: int) -> tuple[list[tuple[npt.NDArray[Any], int]], Ints]:
    """Tensors of a decoder's compaction, with odd sizes that rule wide vectors out, more than one launch takes."""
    generator = np.random.default_rng(seed)
    rows = int(generator.integers(1, 300))
    keep = np.sort(generator.permutation(rows)[: int(generator.integers(1, rows + 1))]).astype(np.int32)
    tensors: list[tuple[npt.NDArray[Any], int]] = [
        (generator.integers(0, 9999, (3, 1, rows), np.int32), 2),
        (generator.standard_normal((1, rows, 65), np.float32), 1),
    ]
    for size in (8, 20, 33, 64) * (40 if seed == 0 else 2):
        dtype = str(generator.choice(["float32", "float16", "int8"]))
        tensors.append(((20 * generator.standard_normal((1, 2, rows, size))).clip(-99, 99).astype(dtype), 2))
    return tensors, keep


def check_gather(kernels: Kernels, seed: int) -> None:
    """Equal to NumPy's take."""
    tensors, keep = gather_case(seed)
    for (x, axis), found in zip(tensors, kernels.gather(tensors, keep), strict=True):
        np.testing.assert_array_equal(found, x.take(keep, axis))


def check_append(kernels: Kernels, seed: int) -> None:
    """Rows land behind past_length; what is outside stays as it was, also where a cache is full."""
    generator = np.random.default_rng(seed)
    for past, rows, capacity in ((0, 5, 9), (3, 1, 9), (7, 5, 9), (9, 2, 9), (-1, 2, 9), (2**31 - 1, 2, 9)):
        sizes = [int(size) for size in generator.choice([8, 20, 33, 128], 5)]
        caches = [generator.standard_normal((2, capacity, size)).astype(np.float16) for size in sizes]
        new = [generator.standard_normal((2, rows, size)).astype(np.float16) for size in sizes]
        fitting = min(rows, max(0, capacity - past)) if past >= 0 else 0
        for cache, addition, found in zip(caches, new, kernels.append(caches, new, past), strict=True):
            wanted = cache.copy()
            wanted[:, max(past, 0) : max(past, 0) + fitting] = addition[:, :fitting]
            np.testing.assert_array_equal(found, wanted)


def check_gather_into(kernels: Kernels, seed: int) -> None:
    """Kept rows land in caches of another capacity; what is outside stays as it was, also where a cache is full."""
    generator = np.random.default_rng(seed)
    for past, rows, capacity in ((None, 30, 40), (None, 30, 5), (0, 30, 30), (3, 30, 40), (38, 30, 40), (-1, 30, 40)):
        keep = np.sort(generator.permutation(rows)[: int(generator.integers(1, rows + 1))]).astype(np.int32)
        sizes = [int(size) for size in generator.choice([8, 33, 128], 4)]
        caches = [generator.standard_normal((2, capacity, size)).astype(np.float16) for size in sizes]
        new = [generator.standard_normal((2, rows, size)).astype(np.float16) for size in sizes]
        first = past or 0
        fitting = min(len(keep), capacity - first) if first >= 0 else 0
        for cache, x, found in zip(caches, new, kernels.gather_into(caches, new, keep, past), strict=True):
            wanted = cache.copy()
            wanted[:, max(first, 0) : max(first, 0) + fitting] = x[:, keep[:fitting]]
            np.testing.assert_array_equal(found, wanted)


def check_arbitrary_memory(kernels: Kernels) -> None:
    """A builder may time kernels on arbitrary memory: it does no harm, whatever comes out, and leaves no trace."""
    generator = np.random.default_rng(0)

    def arbitrary(index: Ints) -> Ints:
        return generator.integers(-(2**31), 2**31 - 1, len(index)).astype(np.int32)

    case = random_case(9, 1000)
    wild = replace(case, visual=arbitrary(case.visual), text=arbitrary(case.text), query=arbitrary(case.query))
    kernels.select(wild)
    kernels.select(replace(wild, keep_count=5 * len(case.visual)))
    kernels.kept_rows(wild, np.full(len(case.visual), np.nan, np.float32), arbitrary(case.visual))
    kernels.gather([(np.zeros((2, 50, 33), np.float32), 1)], arbitrary(case.visual))
    kernels.append([np.zeros((2, 9, 8), np.float16)], [np.zeros((2, 3, 8), np.float16)], 2**31 - 2)
    case.check(*kernels.select(case), 1e-6)
