"""Rounds floats to 4 or 8 bits without data, with a scale, and possibly a zero point, for each block of a row.

The simple way is a scale that reaches the largest value of a block. It wastes steps on that one value. So the search
also tries other ranges. For each range the best scale is known in closed form, as the least squares solution, and the
range with the least squared error is taken. Errors are weighted by the size of what multiplies the values: behind an
RMSNorm, a column of x is as large as the norm's weight there, which is known without data. Source: the weighted least
squares of a line through the origin; Lin et al. 2024 (AWQ) for weighting by the size of activations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.formats.nbits import Bytes, Packing

Wide = npt.NDArray[np.float32]
T = TypeVar("T")
R = TypeVar("R")

RANGES = tuple(np.linspace(0.55, 1.05, 11).tolist())
"""The ranges that are tried, as fractions of the range that reaches the largest value."""
SIDES = (0.75, 0.875, 1.0)
"""The same for each end of a range with a zero point."""
LEAST_IMPORTANCE = 1e-3
"""The least importance of a column, as a fraction of the mean, so that no column is ignored."""
THREADS = 2
PIECE = 1 << 16
"""How many values a thread works on at once, so that they and their intermediate results stay in its cache."""


class Rounding(NamedTuple):
    """Scales [rows, blocks], and zero points less the packing's middle, [rows, blocks] or [rows, 1]; see find_grid."""

    scales: npt.NDArray[Any]
    points: npt.NDArray[Any]


def importance_of(norm: Wide | None, features: int) -> Wide:
    """How much an error in each column counts, float32 [features]. norm: the weight of an RMSNorm before the layer."""
    if norm is None:
        return np.ones(features, np.float32)
    found: Wide = np.square(norm)
    found += np.float32(LEAST_IMPORTANCE * max(float(found.mean()), 1e-12))
    return found


def find_grid(values: Wide, packing: Packing, importance: Wide, dtype: npt.DTypeLike, search: bool = True) -> Rounding:
    """Find the grid of each block, in float32. values: [rows, features]; importance: [features]; dtype: scales are
    rounded to it.

    search: without it, scales reach the largest value, and values are rounded to the nearest.
    """
    blocks, weight = split_blocks(values, packing), split_blocks(importance[None], packing)
    find = find_asymmetric if packing.zero_points else find_symmetric
    scales, points = find(blocks, weight, packing, search)
    rounded = scales.astype(dtype).astype(np.float32)
    least = np.float32(np.finfo(dtype).smallest_subnormal if np.dtype(dtype).kind == "f" else 1e-38)
    rounded = np.where(rounded > 0, rounded, np.where(scales > 0, least, np.float32(1)))  # a block of zeros
    return Rounding(rounded, points)


def find_symmetric(blocks: Wide, weight: Wide, packing: Packing, search: bool) -> Rounding:
    """Scales without zero points. Without a search, the largest value is half a step beyond the grid or at its end."""
    middle, largest = np.float32(packing.middle), np.abs(blocks).max(axis=-1)
    points = np.zeros_like(largest)
    plain = Rounding(largest / (middle - np.float32(0.5)), points)
    if not search:
        return plain
    parts = RANGES if packing.bits == 4 else (1.0,)
    grids = (Rounding(largest * np.float32(part) / (middle - 1), points) for part in parts)
    return best_grid(blocks, weight, packing, (plain, *grids))


def find_asymmetric(blocks: Wide, weight: Wide, packing: Packing, search: bool) -> Rounding:
    """Scales and zero points. The grid's ends are the block's, each less a part; 0 is always on it."""
    middle, steps = np.float32(packing.middle), np.float32(2 * packing.middle - 1)
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)

    def grid(below: float, above: float) -> Rounding:
        scales = (high * np.float32(above) - low * np.float32(below)) / steps
        points = np.rint(-low * np.float32(below) / np.where(scales > 0, scales, 1))
        return Rounding(scales, np.clip(points, 0, steps) - middle)

    if not search:
        return grid(1, 1)
    sides = SIDES if packing.bits == 4 else (1.0,)
    return best_grid(blocks, weight, packing, (grid(below, above) for below in sides for above in sides))


def best_grid(blocks: Wide, weight: Wide, packing: Packing, grids: Iterable[Rounding]) -> Rounding:
    """Of these grids, take the one with the least weighted squared error, each with its best scale.

    The best scale for rounded values q is sum(h w q) / sum(h q^2), and the error is sum(h w^2) - sum(h w q)^2 / sum(h
    q^2).
    """
    weighted, best = blocks * weight, Rounding(*np.zeros((2, *blocks.shape[:2]), np.float32))
    most, steps = np.full(blocks.shape[:2], -1, np.float32), np.empty_like(blocks)
    for grid in grids:
        to_steps(blocks, grid, packing, steps)
        along = np.vecdot(weighted, steps)
        steps *= steps
        size = np.vecdot(steps, weight)
        scales = along / np.where(size > 0, size, 1)
        gain = along * scales
        better = gain > most
        for kept, new in ((most, gain), (best.scales, scales), (best.points, grid.points)):
            np.copyto(kept, new, where=better)
    return best


def to_steps(blocks: Wide, grid: Rounding, packing: Packing, steps: Wide | None = None) -> Wide:
    """Values in steps of their block's scale, rounded, from its zero point. steps: where they are written."""
    middle, points = np.float32(packing.middle), grid.points[..., None]
    each = (np.float32(1) / np.where(grid.scales > 0, grid.scales, 1))[..., None]
    steps = np.multiply(blocks, each, out=steps)
    np.rint(steps, out=steps)
    np.maximum(steps, -middle - points, out=steps)
    np.minimum(steps, middle - 1 - points, out=steps)
    return steps


def round_values(values: Wide, packing: Packing, grid: Rounding) -> Bytes:
    """Stored values on a grid, [rows, features]."""
    steps = to_steps(split_blocks(values, packing), grid, packing)
    steps += grid.points[..., None] + np.float32(packing.middle)
    return steps.reshape(len(values), -1)[:, : values.shape[1]].astype(np.uint8)


def split_blocks(values: Wide, packing: Packing) -> Wide:
    """[rows, features] as [rows, blocks, block]; the last block of a row is filled with zeros."""
    rows, features = values.shape
    block, blocks = packing.block(features), packing.blocks(features)
    if block * blocks > features:
        values = np.pad(values, ((0, 0), (0, block * blocks - features)))
    return values.reshape(rows, blocks, block)


def side_by_side(work: Callable[[T], R], parts: Iterable[T]) -> Iterator[R]:
    """Apply `work` to each part, and yield the results in order. THREADS threads run a little ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[Any] = deque()
        for part in parts:
            pending.append(pool.submit(work, part))
            if len(pending) > 2 * THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
