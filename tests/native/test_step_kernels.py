"""The beginning and the end of a decode step, emulated on the host."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.native.attention import STORED
from tests.native.kernels import TYPES, Kernels

SCRATCH = 385


class IvcStep(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("axes", "pairs", "hidden", "vocab", "type")),
        ("scale", ctypes.c_float),
    ]


def pointer(x: npt.NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if x is None else x.ctypes.data)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["of a table", "of the host"])
def test_a_step_is_taken(kernels: Kernels, dtype: str, whole: bool, given: bool) -> None:
    generator = np.random.default_rng(0)
    axes, pairs, hidden, vocab = 3, 37, 45 if whole else 2056, 101
    table = generator.standard_normal((vocab, hidden)).astype(STORED[dtype])
    frequencies = np.where(np.arange(pairs) % 3 == np.arange(3)[:, None], 0.9 ** np.arange(pairs), 0)
    frequencies = frequencies.astype(np.float32)
    for token in (0, 7, vocab - 1):
        positions = generator.integers(0, 3000, axes)
        step = np.array([token, *positions, 55, 77][: 5 + whole], np.int32)
        embeds, lengths = np.zeros(hidden, table.dtype), np.zeros((2, 1), np.int32)
        turns = np.full((2, pairs), np.nan, np.float32)
        scale = 0.0625 if token else 1
        struct = IvcStep(axes, pairs, hidden, vocab, TYPES[dtype], scale)
        source = (None, table[token].copy()) if given else (table, None)
        before = np.array([token, 1], np.int32)
        if token == 7:
            step[0] = -1  # that of the answer before
        elif whole:
            before[0] = 50  # which counts only there
        arrays = (step, *source, None if token == 0 else before, frequencies, embeds, *turns, lengths[0])
        arrays = (*arrays, lengths[1] if whole else None)
        kernels.call("ivcTakeStep", ctypes.pointer(struct), *map(pointer, arrays))
        np.testing.assert_array_equal(embeds, (table[token].astype(np.float32) * scale).astype(table.dtype))
        np.testing.assert_array_equal(lengths[:, 0], [55, 77 * whole])
        angles = (positions[:, None] * frequencies.astype(np.float64)).sum(axis=0)
        np.testing.assert_allclose(turns, [np.cos(angles), np.sin(angles)], atol=3e-4)


@pytest.mark.parametrize("dtype", STORED)
def test_the_best_token_is_told(kernels: Kernels, dtype: str) -> None:
    """The first of equal ones; all logits where they are wanted; that there are numbers."""
    generator = np.random.default_rng(1)
    scratch = np.zeros(SCRATCH, np.int32)
    for case in range(40):
        vocab = int(generator.choice([1, 31, 257, 16384, 33000, 270000]))
        logits = generator.integers(-9, 9, vocab).astype(STORED[dtype])  # many equal ones
        wanted, numbers = np.array([case % 2], np.int32), True
        if case % 4 == 3:
            logits[generator.integers(vocab)], numbers = generator.choice([np.nan, np.inf]), False
        elif case % 8 == 4:
            logits[: vocab // 2] = -np.inf
        wide, best = np.zeros(vocab, np.float32), np.full(2, -1, np.int32)
        told = np.full(vocab, 0.5, np.float32)
        struct = IvcStep(1, 1, 1, vocab, TYPES[dtype])
        arrays = (logits, wanted, wide, best, told, scratch)
        kernels.call("ivcGiveAnswer", ctypes.pointer(struct), *map(pointer, arrays))
        assert best[1] == numbers
        if numbers:
            assert best[0] == logits.astype(np.float32).argmax()
        np.testing.assert_array_equal(wide, logits.astype(np.float32))
        np.testing.assert_array_equal(told, wide if wanted[0] else np.full(vocab, 0.5, np.float32))
        assert scratch[0] == 0


def test_impossible_steps_are_refused(kernels: Kernels) -> None:
    none = ctypes.c_void_p(0)
    for extents in ((0, 1, 1, 1), (253, 1, 1, 1), (1, 0, 1, 1), (1, 1, -1, 1), (1, 1, 1, 0)):
        with pytest.raises(AssertionError, match="returned 1"):
            kernels.call("ivcTakeStep", ctypes.pointer(IvcStep(*extents, 0, 1)), *[none] * 10)
    for vocab in (0, -1, 2**24 + 1):
        with pytest.raises(AssertionError, match="returned 1"):
            kernels.call("ivcGiveAnswer", ctypes.pointer(IvcStep(1, 1, 1, vocab, 0)), *[none] * 6)
