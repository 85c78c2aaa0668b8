"""Products over packed weights, emulated on the host; tests/gpu/test_packed_kernels.py runs the kernels themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.native.kernels import Kernels
from tests.native.linear import ACTIVATIONS
from tests.native.packed import BLOCKS, DTYPES, packed_case


@pytest.mark.parametrize("bits", [4, 8])
def test_500_cases_agree_with_float64(kernels: Kernels, bits: int) -> None:
    """In both orders together; weights of exact values, packed or not."""
    for seed in range(kernels.stream, 500, 2):
        case = packed_case(seed, bits)
        case.check(kernels)
        case.check_unpacked(kernels)


@pytest.mark.parametrize("kib", [0, 64])
def test_weights_wait_in_registers_where_shared_memory_is_small(kernels: Kernels, kib: int) -> None:
    for seed in (33, 34, 133, 134):
        case, before = packed_case(seed), kernels.staged
        case.check(kernels)
        assert kernels.staged == before + 1
        with kernels.sharing(kib):
            case.check(kernels)
        assert kernels.staged == before + 1


def test_random_cases_hold_what_they_are_for() -> None:
    cases = [packed_case(seed) for seed in range(500)]
    assert {(c.linear.dtype, c.block_size, c.points is None, c.linear.gated) for c in cases} == {
        (dtype, block, symmetric, gated)
        for dtype in DTYPES
        for block in BLOCKS
        for symmetric in (False, True)
        for gated in (False, True)
    }
    assert {(c.linear.activation, c.linear.norm is None, c.linear.gated) for c in cases} == {
        (activation, norm, gated) for activation in ACTIVATIONS for norm in (False, True) for gated in (False, True)
    }
    features = [c.linear.x.shape[1] for c in cases]
    assert sum(size % case.block_size != 0 for size, case in zip(features, cases, strict=True)) > 100
    assert sum(size % 8 != 0 for size in features) > 100
    assert {len(c.linear.x) <= most for c in cases for most in (1, 2, 4, 8)} == {False, True}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_what_lies_behind_a_row_has_no_effect(kernels: Kernels, rows: int, bits: int) -> None:
    case = next(
        c for seed in range(500) if (c := packed_case(seed, bits)).linear.x.shape[1] % c.block_size not in (0, 1)
    )
    x = np.repeat(case.linear.x[:1], rows, axis=0)
    case = replace(case, linear=replace(case.linear, x=x, residual=None))
    other, blocks = case.packed.copy(), case.packed.shape[1]
    behind = x.shape[1] - (blocks - 1) * case.block_size
    other[:, -1, -(-behind * bits // 8) :] = 255
    assert (other != case.packed).any()
    np.testing.assert_array_equal(case.run(kernels), replace(case, packed=other).run(kernels))


@pytest.mark.parametrize(
    "changed", [{"features": 0}, {"block_size": 24}, {"block_size": 8}, {"bits": 3}, {"type": 0}, {"rows": -1}]
)
def test_impossible_products_are_refused(kernels: Kernels, changed: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match="returned 1"):
        packed_case(1).run(kernels, **changed)
