"""The kernels over rows of joined heads, emulated on the host."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from tests.native.joined import joined_case, split_case
from tests.native.kernels import Kernels


def test_heads_are_split_normed_and_turned_as_in_float64(kernels: Kernels) -> None:
    for seed in range(kernels.stream, 500, 2):
        split_case(seed).check_split(kernels)


# KiB of shared memory of a block of a cluster: no clusters, room for one tile of keys (SM 120), and for all (SM 90)
CLUSTERS = [pytest.param(0, id="apart"), pytest.param(99, id="clusters of 99 KiB"), pytest.param(227, id="of 227 KiB")]


def in_clusters(kernels: Kernels, kib: int) -> Kernels:
    """The emulated kernels of a device where a block of a cluster has so much shared memory."""
    return replace(kernels, stream=kernels.stream + 2 * kib)


@pytest.mark.parametrize("kib", [CLUSTERS[0], CLUSTERS[2]])  # a block's keys are one tile
def test_attention_over_joined_rows_agrees_with_float64(kernels: Kernels, kib: int) -> None:
    cases = (joined_case(seed) for seed in range(kernels.stream, 500, 2))
    with np.errstate(all="ignore"):  # NaN and infinities stand where nothing may be read
        for case in cases:
            if kib == 0 or (len(case.rows) == 1 and case.dtype != "float32"):  # others need no clusters
                case.check(in_clusters(kernels, kib))


def test_random_cases_hold_what_they_are_for() -> None:
    cases = [joined_case(seed) for seed in range(500)]
    rows = [c for c in cases if len(c.rows) == 1 and c.dtype != "float32"]
    assert len(rows) > 200
    for some in (rows, [c for c in cases if len(c.rows) > 1]):
        assert {(c.size, c.dtype, c.grouped) for c in some} >= {
            (size, dtype, grouped) for size in (64, 128) for dtype in ("float16", "bfloat16") for grouped in (0, 1)
        }
        assert {(c.cos is None, c.query_norm is None, c.key_norm is None) for c in some} >= {
            (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)
        }
        assert {c.heads // c.kv_heads for c in some} == set(range(1, 17))
        assert any(c.layer().past == c.key_cache.shape[1] - len(c.rows) for c in some)
    assert {c.layer().past % 64 for c in rows} >= {0, 1, 63}


@pytest.mark.parametrize("kib", CLUSTERS)
@pytest.mark.parametrize("size", [64, 128])
def test_many_cached_rows_are_split_over_blocks(kernels: Kernels, size: int, kib: int) -> None:
    """Of one key-value head and of several, with as many keys as fill tiles and with one more or less."""
    generator = np.random.default_rng(size)
    case = next(c for c in map(joined_case, range(1, 500, 3)) if (c.size, len(c.rows), c.dtype) == (size, 1, "float16"))
    shape = (case.kv_heads, 4224, size)
    caches = [generator.standard_normal(shape).astype(np.float16) for _ in range(2)]
    for past in (0, 1, 63, 64, 65, 4000, 4159, 4223):
        long = replace(case, key_cache=caches[0], value_cache=caches[1], past_length=past)
        long.check(in_clusters(kernels, kib))


@pytest.mark.parametrize("kv_heads", [8, 9, 40, 130])  # more than 8 have no clusters
def test_keys_of_many_heads_are_split_over_blocks(kernels: Kernels, kv_heads: int) -> None:
    generator = np.random.default_rng(kv_heads)
    case = next(c for c in map(joined_case, range(1, 500, 3)) if (c.size, len(c.rows), c.dtype) == (64, 1, "float16"))
    heads = replace(case, heads=kv_heads, kv_heads=kv_heads, rows=generator.standard_normal((1, 3 * kv_heads * 64)))
    caches = [generator.standard_normal((kv_heads, 300, 64)).astype(np.float16) for _ in range(2)]
    rows = replace(heads, rows=heads.rows.astype(np.float16), key_cache=caches[0], value_cache=caches[1])
    for past in (0, 1, 127, 128, 299):
        replace(rows, past_length=past).check(in_clusters(kernels, 227))


@pytest.mark.parametrize("kib", CLUSTERS)
def test_keys_whose_scores_are_all_minus_infinity_get_no_weight(kernels: Kernels, kib: int) -> None:
    """Also where they are all keys of a warp or a block."""
    case = next(c for c in map(joined_case, range(1, 500, 3)) if (len(c.rows), c.dtype, c.size) == (1, "bfloat16", 64))
    plain = replace(case, cos=None, sin=None, query_norm=None, key_norm=None, rows=np.ones_like(case.rows))
    shape = (case.kv_heads, 200, 64)
    generator = np.random.default_rng(1)
    keys, values = (generator.standard_normal(shape).astype(case.rows.dtype) for _ in range(2))
    keys[:, 40:150] = -3e38
    with np.errstate(all="ignore"):
        replace(plain, key_cache=keys, value_cache=values, past_length=199).check(in_clusters(kernels, kib))


def test_impossible_rows_are_refused(kernels: Kernels) -> None:
    case = next(c for c in map(joined_case, range(500)) if c.query_norm is not None and c.cos is not None)
    count, heads = len(case.rows), case.heads + 2 * case.kv_heads
    full = replace(case, key_cache=case.key_cache[:, : count - 1], value_cache=case.value_cache[:, : count - 1])
    with pytest.raises(AssertionError, match="returned 1"):
        full.run(kernels)
    for size in (12, 80, 136):  # no multiple of 8, no power of 2 for a norm, more than 128
        odd = replace(case, size=size, rows=np.zeros((count, heads * size), case.rows.dtype))
        odd = replace(odd, query_norm=np.ones(size, case.rows.dtype), cos=None, sin=None)
        with pytest.raises(AssertionError, match="returned 1"):
            odd.check_split(kernels)
    with pytest.raises(AssertionError, match="returned 1"):
        replace(case, sin=None).check_split(kernels)
    with pytest.raises(AssertionError, match="returned 1"):
        replace(case, cos=np.zeros((count + 1, case.size // 2), np.float32)).run(kernels)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_angles_that_cannot_be_read_at_once_are_refused(kernels: Kernels, name: str) -> None:
    """Where they do not lie at a multiple of 16 bytes."""
    case = next(c for c in map(joined_case, range(500)) if len(c.rows) == 1 and c.cos is not None)
    joined, rows, _held = case.structs(kernels)
    for offset in (4, 8, 12):
        moved = type(rows.contents).from_buffer_copy(rows.contents)
        setattr(moved, name, getattr(moved, name) + offset)
        for function, others in (("ivcTurnHeads", 3), ("ivcAttendJoined", 6)):
            with pytest.raises(AssertionError, match="returned 1"):
                kernels.call(function, joined, ctypes.pointer(moved), *[ctypes.c_void_p(0)] * others)


@pytest.mark.parametrize("name", ["rows", "heads", "kv_heads", "head_dim"])
@pytest.mark.parametrize("grouped", [False, True])
def test_rows_without_extents_are_refused(kernels: Kernels, name: str, grouped: bool) -> None:
    case = next(c for c in map(joined_case, range(500)) if len(c.rows) == 1 and c.grouped == grouped)
    joined, rows, _held = case.structs(kernels)
    for extent in (0, -1):
        setattr(joined.contents, name, extent)
        assert kernels.functions.ivcAttendJoinedWorkspace(joined) == 0
        with pytest.raises(AssertionError, match="returned 1"):
            kernels.call("ivcAttendJoined", joined, rows, *[ctypes.c_void_p(0)] * 6)
