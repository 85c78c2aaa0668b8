"""Products over weights in 4 and 8 bits on a GPU against NumPy; needs what test_kernels.py needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.gpu.test_kernels import kernels  # a fixture
from tests.native.kernels import Kernels
from tests.native.packed import packed_case

__all__ = ["kernels"]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bits", [4, 8])
def test_500_cases_agree_with_float64(
    kernels: Kernels, bits: int, record_property: Callable[[str, object], None]
) -> None:
    cases = [packed_case(seed, bits) for seed in range(500)]
    worst = max(case.check(kernels) for case in cases)
    for case in cases:
        case.check_unpacked(kernels)
    record_property(f"500 products over {bits} bits", f"largest error {worst:.2f} of what rounding may cost")


def test_two_runs_give_the_same_bits(kernels: Kernels) -> None:
    for seed in range(20):
        case = packed_case(seed, 4 + 4 * (seed % 3 == 0))
        np.testing.assert_array_equal(case.run(kernels), case.run(kernels))
