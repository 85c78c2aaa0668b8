"""The kernels on a GPU against NumPy. Needs CuPy, and the library: IVC_KERNELS names it, or CMake and nvcc build it.

python -m pytest -m gpu tests/gpu/test_kernels.py
compute-sanitizer --tool memcheck|racecheck python -m pytest -m gpu tests/gpu/test_kernels.py -k "not thousand"
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SCORE_TOLERANCE
from tests.native.attention import decoder_case, encoder_case
from tests.native.joined import joined_case, split_case
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
from tests.native.test_plugin_builds import build

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    try:
        capability = cupy.cuda.Device().compute_capability
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"there is no GPU ({error})")
    given = os.environ.get("IVC_KERNELS")
    path = Path(given) if given else build(tmp_path_factory.mktemp("kernels"), capability)
    return Kernels(path, cupy.asarray, cupy.asnumpy, lambda array: array.data.ptr)


def test_a_thousand_cases_agree_with_numpy(kernels: Kernels, record_property: Callable[[str, object], None]) -> None:
    worst, flips, largest = 0.0, 0, 0
    for seed in range(1000):
        case = random_case(seed, 16384, DTYPES[seed % 3])
        error, flipped = case.check(*kernels.select(case), SCORE_TOLERANCE)
        worst, flips, largest = max(worst, error), flips + flipped, max(largest, len(case.visual))
        check_ties(kernels, case)
    assert largest == 16384
    record_property("1000 cases on the GPU", f"largest score error {worst:.1e}, {flips} choices flip at a near-tie")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_cases_agree_with_numpy(kernels: Kernels, dtype: str) -> None:
    for seed in range(1, 13):
        case = random_case(seed, 3000, dtype)
        case.check(*kernels.select(case), SCORE_TOLERANCE)
        check_ties(kernels, case)


def test_equal_vectors_have_equal_scores(kernels: Kernels) -> None:
    for length in (1, 50, 257, 1025):
        rows = np.arange(length + 7, dtype=np.int32)
        values, priority = np.ones((2, length + 7, 40), np.float32), np.zeros(length, np.float32)
        case = Case(values, priority, rows[:length], rows[length:], rows[-1:], max(1, length // 2))
        keep, score, seeds = kernels.select(case)
        assert len(set(score.tolist())) == 1
        assert seeds.tolist() == list(range(max(1, round(length / SEED_DIVISOR))))
        np.testing.assert_array_equal(keep, case.kept(score, seeds))


def test_a_decode_step_keeps_its_only_row(kernels: Kernels) -> None:
    row = np.zeros(1, np.int32)
    case = Case(np.ones((2, 1, 128), np.float32), np.zeros(1, np.float32), row, row[:0], row, 1)
    for over_all in (False, True):
        keep, score, seeds = kernels.select(replace(case, softmax_over_all=over_all))
        assert (keep.tolist(), score.tolist(), seeds.tolist()) == ([0], [1.0], [0])


def test_two_runs_give_the_same_bits(kernels: Kernels) -> None:
    case = random_case(4, 4096, "float16")
    for first, second in zip(kernels.select(case), kernels.select(case), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_captured_graph_replays_on_new_inputs(kernels: Kernels) -> None:
    """Captured on one case's inputs, replayed on another's of the same extents."""
    first = random_case(8, 2000, "float16")
    other = replace(first, values=first.values[:, ::-1].copy(), priority=first.priority[::-1].copy())
    struct = first.struct
    fields = ("stored", "priority", "visual", "text", "query")
    inputs = [cupy.asarray(getattr(first, name)) for name in fields]
    keep = cupy.zeros(len(first.text) + first.keep_count, cupy.int32)
    score = cupy.zeros(len(first.visual), cupy.float32)
    seeds = cupy.zeros(max(1, round(len(first.visual) / SEED_DIVISOR)), cupy.int32)
    workspace = kernels.workspace(struct)
    stream = cupy.cuda.Stream(non_blocking=True)
    on_stream = Kernels(kernels.path, kernels.to_device, kernels.to_host, kernels.address, stream.ptr)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        on_stream.call("ivcSelectTokens", struct, *inputs, keep, score, seeds, workspace)
        graph = stream.end_capture()
    for case in (first, other):
        for array, name in zip(inputs, fields, strict=True):
            array.set(np.ascontiguousarray(getattr(case, name)))
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        case.check(cupy.asnumpy(keep), cupy.asnumpy(score), cupy.asnumpy(seeds), SCORE_TOLERANCE)


def test_indices_out_of_range_do_no_harm(kernels: Kernels) -> None:
    check_arbitrary_memory(kernels)


def test_gathering_many_tensors(kernels: Kernels) -> None:
    for seed in range(20):
        check_gather(kernels, seed)


def test_gathering_into_caches(kernels: Kernels) -> None:
    for seed in range(5):
        check_gather_into(kernels, seed)


def test_rows_of_caches_are_indexed(kernels: Kernels) -> None:
    for seed in range(100):
        check_cache_index(kernels, seed)


def test_appending_to_caches(kernels: Kernels) -> None:
    for seed in range(5):
        check_append(kernels, seed)


@pytest.mark.parametrize("kind", ["decoder", "frames", "windows"])
def test_500_cases_of_attention_agree_with_float64(
    kernels: Kernels, kind: str, record_property: Callable[[str, object], None]
) -> None:
    worst = 0.0
    with np.errstate(all="ignore"):  # NaN and infinities stand where nothing may be read
        for seed in range(500):
            most = 1000 if seed % 4 == 0 else 300
            case = decoder_case(seed, most) if kind == "decoder" else encoder_case(seed, kind == "windows", most)
            worst = max(worst, case.check(kernels))
    record_property(f"500 cases of attention, {kind}", f"largest error {worst:.2f} of what rounding may cost")


def test_500_cases_over_joined_rows_agree_with_float64(kernels: Kernels) -> None:
    with np.errstate(all="ignore"):
        for seed in range(500):
            joined_case(seed, 4500 if seed % 10 == 0 else 300).check(kernels)
            split_case(seed).check_split(kernels)


def test_the_library_says_its_version(kernels: Kernels, tmp_path: Path) -> None:
    assert kernels.functions.ivcKernelsVersion() == 2
