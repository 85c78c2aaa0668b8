"""Computes rotary positions of text and pictures in order, for Family.positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ivc_export.families.pictures import Grid


def counted_positions(segments: Sequence[int | Grid], start: int) -> tuple[npt.NDArray[np.int32], int]:
    """One-dimensional positions, which count text and visual tokens alike."""
    rows = sum(part.visual if isinstance(part, Grid) else part for part in segments)
    return np.arange(start, start + rows, dtype=np.int32)[None], start + rows


def mrope_positions(segments: Sequence[int | Grid], start: int) -> tuple[npt.NDArray[np.int32], int]:
    """M-RoPE positions. Text advances all axes alike, a picture spreads over rows and columns, and its frames over
    time.

    Text after a video starts behind the video's rows and columns, however long the video is. Positions of time are
    computed in float32, as in transformers. Source: arXiv 2409.12191, section 2.1; get_rope_index in transformers.
    """
    parts = []
    for segment in segments:
        if isinstance(segment, Grid):
            frame, row, column = np.mgrid[: segment.time, : segment.rows, : segment.columns].reshape(3, -1)
            time = (frame.astype(np.float32) * np.float32(segment.interval)).astype(np.int64)
            parts.append(start + np.stack([time, row, column]))
            start += max(segment.rows, segment.columns)
        else:
            parts.append(np.broadcast_to(np.arange(start, start + segment), (3, segment)))
            start += segment
    positions = np.concatenate(parts, axis=1).astype(np.int32)
    return positions, int(positions.max()) + 1
