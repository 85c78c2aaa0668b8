"""The attention kernels' algorithms, emulated on the host; tests/gpu/test_attention_kernels.py runs them on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.native.attention import (
    DECODER_SIZES,
    ENCODER_SIZES,
    LAYOUTS,
    STORED,
    DecoderCase,
    EncoderCase,
    decoder_case,
    encoder_case,
)
from tests.native.kernels import Kernels


def check_all(kernels: Kernels, case: Callable[[int], DecoderCase | EncoderCase]) -> None:
    """500 cases in both orders together."""
    with np.errstate(all="ignore"):  # NaN and infinities stand where nothing may be read
        for seed in range(kernels.stream % 2, 500, 2):
            case(seed).check(kernels)


@pytest.fixture(params=["warps", "groups"])
def encoders(kernels: Kernels, request: pytest.FixtureRequest) -> Kernels:
    """Encoder attention as on SM 80 and later, and as on SM 90, where groups of warps multiply together."""
    return replace(kernels, stream=kernels.stream + 2 * (request.param == "groups"))


def test_decoder_layers_agree_with_float64(kernels: Kernels) -> None:
    check_all(kernels, decoder_case)


def test_frames_agree_with_float64(encoders: Kernels) -> None:
    check_all(encoders, lambda seed: encoder_case(seed, False))


def test_windows_agree_with_float64(kernels: Kernels) -> None:
    check_all(kernels, lambda seed: encoder_case(seed, True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("step", [0.03, 0.3, 3.0, -3.0])
def test_scores_may_grow_from_key_to_key(encoders: Kernels, dtype: str, step: float) -> None:
    """Weights are relative to a score that was the largest some keys ago, and stay within 16 bits."""
    generator = np.random.default_rng(0)
    q, v = (generator.standard_normal((1, 1, 300, 80)) for _ in range(2))
    q[..., 0], k = 80**0.5, np.zeros_like(q)
    k[..., 0] = np.arange(300) * step
    q, k, v = (x.astype(STORED[dtype]) for x in (q, k, v))
    EncoderCase(q, k, v, dtype, "by head").check(encoders)


@pytest.mark.parametrize("size", ENCODER_SIZES)
def test_frames_are_longer_than_shared_memory(encoders: Kernels, size: int) -> None:
    """Tiles of keys take the places of earlier ones."""
    generator = np.random.default_rng(size)
    q, k, v = (generator.standard_normal((1, 1, 601, size)).astype(np.float16) for _ in range(3))
    EncoderCase(q, k, v, "float16", "by head").check(encoders)


def test_random_cases_hold_what_they_are_for() -> None:
    decoders = [decoder_case(seed) for seed in range(500)]
    assert {(c.q.shape[2], c.dtype, c.layout) for c in decoders if c.dtype != "float32"} == {
        (size, dtype, layout) for size in DECODER_SIZES for dtype in ("float16", "bfloat16") for layout in LAYOUTS
    }
    assert {len(c.q) // len(c.k) for c in decoders} == set(range(1, 17))
    assert sum(c.key_cache.shape[1] == 0 for c in decoders) > 20
    assert sum(c.past != c.past_length for c in decoders) > 100
    assert sum(c.past < c.key_cache.shape[1] and not c.append for c in decoders) > 100
    assert {c.q.shape[1] % 2 for c in decoders} == {c.past % 2 for c in decoders} == {0, 1}
    encoders = [encoder_case(seed, seed % 2 == 0) for seed in range(500)]
    assert {(c.q.shape[3], c.dtype, c.windows is None) for c in encoders if c.dtype != "float32"} == {
        (size, dtype, whole) for size in ENCODER_SIZES for dtype in ("float16", "bfloat16") for whole in (False, True)
    }


def test_many_cached_rows_are_split_over_blocks(kernels: Kernels) -> None:
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal(shape).astype(np.float16) for shape in ((6, 1, 64), (1, 1, 64), (1, 1, 64)))
    keys, values = (generator.standard_normal((1, 4224, 64)).astype(np.float16) for _ in range(2))
    for past in (0, 1, 63, 64, 65, 4000, 4223):
        DecoderCase(q, k, v, keys, values, past, True, "float16", "by head").check(kernels)


@pytest.mark.parametrize("size", DECODER_SIZES)
def test_many_queries_are_not_split(kernels: Kernels, size: int) -> None:
    """More tiles of queries than a GPU takes at a time have a kernel of their own."""
    generator = np.random.default_rng(size)
    q, k, v = (generator.standard_normal((129, 70, size)).astype(np.float16) for _ in range(3))
    keys, values = (generator.standard_normal((129, 90, size)).astype(np.float16) for _ in range(2))
    for past, append in ((13, True), (90, False)):
        DecoderCase(q, k, v, keys, values, past, append, "float16", "by row").check(kernels)


def test_impossible_attention_is_refused(kernels: Kernels) -> None:
    decoder, encoder = replace(decoder_case(1), append=True), encoder_case(2, False)
    assert encoder.q.shape[2] > 20
    narrow = replace(decoder, q=decoder.q[..., :40], k=decoder.k[..., :40], v=decoder.v[..., :40])
    full = replace(decoder, key_cache=decoder.key_cache[:, :0], value_cache=decoder.value_cache[:, :0])
    uncut = replace(encoder, q=encoder.q[:, :, :20], k=encoder.k[:, :, :20], v=encoder.v[:, :, :20], block_size=7)
    for case in (narrow, full, uncut, replace(encoder, block_size=-1)):
        with pytest.raises(AssertionError, match="returned 1"):
            case.run(kernels)


def test_impossible_extents_need_no_workspace(kernels: Kernels) -> None:
    assert kernels.functions.ivcAttendWorkspace(ctypes.byref((ctypes.c_byte * 256)())) == 0
