"""Selections to compare IVC-Prune with. They are other priorities for the same operators, so any bundle runs them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ivc_export.contract.manifest import Manifest
from ivc_export.selection.ivc_prune import Blocks, Floats, Ints


def foreground_priorities(m: Manifest, positions: Ints, blocks: Blocks, seed: int) -> Floats:
    """No priority for any token, float32 [L]: seeds come first, then all others by score."""
    return np.zeros(positions.shape[1], np.float32)


def random_priorities(m: Manifest, positions: Ints, blocks: Blocks, seed: int) -> Floats:
    """A drawn priority for every token, float32 [L]: seeds come first, then all others in the drawn order.

    Of L tokens, the one with the largest of `draws` gets L + 1, the next L, the last 2.
    """
    length = positions.shape[1]
    priority = np.empty(length, np.float32)
    priority[np.argsort(draws(seed, length))] = np.arange(2, length + 2)
    return priority


def draws(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """One number for each visual token of a run, uint64 [count], no two of them equal.

    That of token i is, modulo 2^64 throughout: `z = seed + (i + 1) * 0x9E3779B97F4A7C15`;
    `z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9`; `z = (z ^ (z >> 27)) * 0x94D049BB133111EB`; `z ^ (z >> 31)`.

    Source: splitmix64, of Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators, figure 16.
    """
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
