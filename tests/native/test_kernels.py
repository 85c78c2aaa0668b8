"""The kernels' algorithms, emulated on the host; tests/gpu/test_kernels.py runs the kernels themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import SCORE_TOLERANCE
from tests.native.kernels import (
    SEED_DIVISOR,
    Case,
    Kernels,
    check_append,
    check_arbitrary_memory,
    check_cache_index,
    check_gather,
    check_gather_into,
    check_ties,
    random_case,
)


def test_random_cases_agree_with_numpy(kernels: Kernels, record_property: Callable[[str, object], None]) -> None:
    worst, flips = 0.0, 0
    for seed in range(1, 90):
        case = random_case(seed, 1500, "bfloat16" if seed % 5 == 0 else "float32")
        error, flipped = case.check(*kernels.select(case), SCORE_TOLERANCE)
        worst, flips = max(worst, error), flips + flipped
    record_property("89 cases of the emulated kernels", f"largest score error {worst:.1e}, {flips} near-ties flip")


def test_16384_visual_tokens(kernels: Kernels) -> None:
    case = random_case(0, 16384)
    assert len(case.visual) == 16384
    few = replace(case, values=case.values[:1, :, :8].copy(), query=case.query[:2])
    few.check(*kernels.select(few), SCORE_TOLERANCE)
    check_ties(kernels, case)


@pytest.mark.parametrize("length", [1, 2, 49, 50, 51, 150, 255, 256, 257, 1023, 1024, 1025, 2500])
def test_ties_go_to_the_lowest_index(kernels: Kernels, length: int) -> None:
    generator = np.random.default_rng(length)
    rows = generator.permutation(length + 7).astype(np.int32)
    visual, text = np.sort(rows[:length]), np.sort(rows[length:])
    values, priority = np.ones((1, length + 7, 8), np.float32), np.zeros(length, np.float32)
    for keep_count in {1, max(1, length // 2), max(1, length - 1), length}:
        case = Case(values, priority, visual, text, text[-1:], keep_count)
        check_ties(kernels, case)
        keep, score, seeds = kernels.select(case)
        assert len(set(score.tolist())) == 1  # equal vectors have equal scores
        assert seeds.tolist() == list(range(max(1, round(length / SEED_DIVISOR))))
        np.testing.assert_array_equal(keep, case.kept(score, seeds))


def test_a_decode_step_keeps_its_only_row(kernels: Kernels) -> None:
    row = np.zeros(1, np.int32)
    case = Case(np.ones((2, 1, 8), np.float32), np.zeros(1, np.float32), row, row[:0], row, 1)
    keep, score, seeds = kernels.select(case)
    assert (keep.tolist(), score.tolist(), seeds.tolist()) == ([0], [1.0], [0])


def test_seed_counts_round_half_to_even(kernels: Kernels) -> None:
    for length in range(1, 16385):
        assert kernels.functions.ivcSeedCount(length, 100) == max(1, round(0.01 * length))


def test_impossible_extents_are_refused(kernels: Kernels) -> None:
    case = random_case(3, 50)
    for changed in ({"keep_count": 0}, {"query": case.query[:0]}, {"visual": case.visual[:0]}):
        with pytest.raises(AssertionError, match="returned 1"):
            kernels.select(replace(case, **changed))


def test_indices_out_of_range_do_no_harm(kernels: Kernels) -> None:
    check_arbitrary_memory(kernels)


def test_rows_of_caches_are_indexed(kernels: Kernels) -> None:
    for seed in range(20):
        check_cache_index(kernels, seed)


def test_gathering_many_tensors(kernels: Kernels) -> None:
    for seed in range(6):
        check_gather(kernels, seed)


def test_gathering_into_caches(kernels: Kernels) -> None:
    for seed in range(3):
        check_gather_into(kernels, seed)


def test_appending_to_caches(kernels: Kernels) -> None:
    for seed in range(3):
        check_append(kernels, seed)
