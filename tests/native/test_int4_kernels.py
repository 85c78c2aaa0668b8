"""Products over weights in 4 bits, emulated on the host; tests/gpu/test_int4_kernels.py runs the kernels themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.native.int4 import BLOCKS, DTYPES, Int4Case, int4_case
from tests.native.kernels import Kernels


@pytest.fixture(scope="module", params=[0, 1], ids=["forwards", "backwards"])
def kernels(emulation: Path, request: pytest.FixtureRequest) -> Kernels:
    """Warps and blocks in rising or falling order."""
    return Kernels(emulation, np.ascontiguousarray, lambda a: a, lambda a: a.ctypes.data, request.param)


def test_500_cases_agree_with_float64(kernels: Kernels) -> None:
    """In both orders together."""
    for seed in range(kernels.stream, 500, 2):
        int4_case(seed).check(kernels)


def test_random_cases_hold_what_they_are_for() -> None:
    cases = [int4_case(seed) for seed in range(500)]
    assert {(c.dtype, c.block_size, c.points is None, len(c.x) == 1) for c in cases} == {
        (dtype, block, symmetric, one)
        for dtype in DTYPES
        for block in BLOCKS
        for symmetric in (False, True)
        for one in (False, True)
    }
    assert sum(c.x.shape[1] % c.block_size != 0 for c in cases) > 100
    assert sum(c.x.shape[1] % 8 != 0 for c in cases) > 100
    assert {len(c.x) <= most for c in cases for most in (1, 4, 16, 128)} == {False, True}
    assert max(len(c.x) for c in cases) > 290


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_what_lies_behind_a_row_has_no_effect(kernels: Kernels, rows: int) -> None:
    generator = np.random.default_rng(rows)
    x = generator.standard_normal((rows, 72)).astype(np.float16)
    packed = generator.integers(0, 256, (50, 3, 16), dtype=np.uint8)
    other = packed.copy()
    other[:, 2, 4:] = 255
    scales = generator.standard_normal((50, 3)).astype(np.float16)
    case = Int4Case(x, packed, scales, None, "float16")
    np.testing.assert_array_equal(case.run(kernels), replace(case, packed=other).run(kernels))


@pytest.mark.parametrize("changed", [{"features": 0}, {"block_size": 24}, {"block_size": 8}, {"type": 0}, {"rows": -1}])
def test_impossible_products_are_refused(kernels: Kernels, changed: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match="returned 1"):
        int4_case(1).run(kernels, **changed)
