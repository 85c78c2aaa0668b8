"""Products with what surrounds them, emulated on the host; tests/gpu/test_linear_kernels.py runs the kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.native.kernels import Kernels
from tests.native.linear import ACTIVATIONS, DTYPES, linear_case


def test_500_cases_agree_with_float64(kernels: Kernels) -> None:
    """In both orders together, in one launch and in several."""
    for seed in range(kernels.stream, 500, 2):
        case = linear_case(seed)
        case.check(kernels)
        case.check_apart(kernels)


def test_weights_that_wait_in_shared_memory_give_the_same_bits(kernels: Kernels) -> None:
    """Gated products of one row, of one turn of a block and of several, with one stage of weights or two."""
    turns = set()
    for seed in range(kernels.stream, 1500, 2):
        case = linear_case(seed)
        if not case.gated or len(case.x) > 1 or case.dtype == "float32" or case.layer_norm:
            continue
        before, staged = kernels.staged, case.run(kernels)
        after = kernels.staged
        with kernels.sharing(64):
            np.testing.assert_array_equal(case.run(kernels), staged)
        assert kernels.staged == after
        if after > before:
            turns.add(min(case.out // 32, 2))
    assert turns == {0, 1, 2}


def test_random_cases_hold_what_they_are_for() -> None:
    cases = [linear_case(seed) for seed in range(500)]
    assert {(c.dtype, c.activation, c.gated, len(c.x) == 1) for c in cases} == {
        (dtype, activation, gated, one)
        for dtype in DTYPES
        for activation in ACTIVATIONS
        for gated in (False, True)
        for one in (False, True)
    }
    norms = {(c.norm is None, c.layer_norm) for c in cases}
    assert {(c.norm is None, c.layer_norm, c.bias is None, c.residual is None) for c in cases} == {
        (*norm, bias, residual) for norm in norms for bias in (False, True) for residual in (False, True)
    }
    assert norms == {(True, False), (False, False), (False, True)}
    assert {(c.dtype, c.x.shape[1] % 8 != 0) for c in cases if c.layer_norm} == {
        (dtype, odd) for dtype in DTYPES for odd in (False, True)
    }
    widths = [c.x.shape[1] for c in cases if c.layer_norm and c.x.shape[1] % 8 == 0]
    assert min(widths) < 1280 < 2048 < max(widths) and any(1280 < width < 2048 for width in widths)
    assert sum(c.x.shape[1] % 8 != 0 for c in cases) > 100
    assert {len(c.x) <= most for c in cases for most in (1, 4, 8)} == {False, True}


def test_rows_far_beyond_float16_are_normed(kernels: Kernels) -> None:
    """Their squares and sums are taken in float32, and an epsilon of another scale counts."""
    case = next(c for seed in range(500) if (c := linear_case(seed)).norm is not None and c.dtype == "float16")
    assert case.norm is not None
    x = np.full_like(case.x, 60000)
    replace(case, x=x).check(kernels)
    replace(case, x=x, norm=case.norm, epsilon=case.epsilon * 2.0**-8).check_apart(kernels)


def test_layer_norms_need_a_launch_of_their_own(kernels: Kernels) -> None:
    case = next(c for seed in range(500) if (c := linear_case(seed)).layer_norm)
    with pytest.raises(AssertionError, match="returned 1"):
        case.run(kernels)


def test_a_wide_y_is_what_else_is_rounded(kernels: Kernels) -> None:
    """Of one row and of several, in every type."""
    for case in (c for seed in range(kernels.stream, 120, 2) if not (c := linear_case(seed)).layer_norm):
        wide, rounded = case.run(kernels, wide=1), case.run(kernels)
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide.astype(rounded.dtype), rounded)
        if case.dtype != "float32" and wide.size > 32:
            assert (wide != rounded.astype(np.float32)).any()


@pytest.mark.parametrize("changed", [{"features": 0}, {"rows": 0}, {"out": -1}, {"activation": 4}])
def test_impossible_products_are_refused(kernels: Kernels, changed: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match="returned 1"):
        linear_case(1).run(kernels, **changed)
