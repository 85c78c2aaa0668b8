"""Rotary embedding: frequencies, angles, rotations."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ivc_export.contract.manifest import RotarySizes
from ivc_export.graph.builder import FLOAT, Graph


def rotary_frequencies(rotary: RotarySizes) -> np.ndarray:
    """Frequencies by axis, float64 [axes, rotary.size / 2]. They are zero if the pair belongs to another axis.

    Source: Su et al. 2021, section 3.2.2; sections as Wang et al. 2024 (Qwen2-VL), or interleaved as in Qwen3-VL.
    """
    axes = len(rotary.sections)
    if rotary.interleaved:
        axis_of = np.zeros(rotary.size // 2, int)
        for axis, length in enumerate(rotary.sections[1:], 1):
            axis_of[axis : axes * length : axes] = axis
    else:
        axis_of = np.repeat(np.arange(axes), rotary.sections)
    table = rotary.theta ** (-2.0 * np.arange(rotary.size // 2) / rotary.size)
    return np.where(axis_of == np.arange(axes)[:, None], table, 0.0)


def rotary_angles(g: Graph, positions: ir.Value, frequencies: np.ndarray) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of the rotary angles, float32 [rows, pairs].

    positions: int32 [axes, rows]; frequencies: [axes, pairs]. The sum over axes is one of elementwise products. A
    MatMul might run in TF32, which cannot represent a position times a frequency.
    """
    turns = g.cast(g.op("Unsqueeze", positions, g.ints(2)), FLOAT)
    table = g.constant(frequencies[:, None, :], FLOAT)
    angles = g.op("ReduceSum", g.op("Mul", turns, table), g.ints(0), keepdims=0)
    return g.op("Cos", angles), g.op("Sin", angles)


def rotate(g: Graph, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Rotate the pairs (j, j + head_dim / 2) of `x` [..., rows, head_dim] by angles [rows, head_dim / 2].

    Computed in the dtype of the angles; returns that of `x`.
    """
    return g.call("Rotate", x, cos, sin)
