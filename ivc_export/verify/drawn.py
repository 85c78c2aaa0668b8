"""Draws the numbers of the method `random`, in Python's integers."""

from __future__ import annotations

from collections.abc import Iterator


def splitmix64(state: int) -> Iterator[int]:
    """Numbers below 2^64. Source: Steele, Lea and Flood 2014, figure 16; its constants are of Stafford's mix 13."""
    mask = (1 << 64) - 1
    while True:
        state = state + 0x9E3779B97F4A7C15 & mask
        mixed = state
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ mixed >> shift) * factor & mask
        yield mixed ^ mixed >> 31
