"""Norms over the last axis."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.graph.builder import Graph


def rms_norm(g: Graph, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
    """Root-mean-square norm over the last axis, computed in float32 with its weight.

    x: [rows, size]; returns the same shape. Source: Zhang and Sennrich 2019, eq. 4; Qwen2RMSNorm in transformers.
    """
    return g.call("RMSNorm", x, g.weight(f"{name}.weight", (size,)), epsilon=epsilon)


def layer_norm(g: Graph, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
    """Layer norm over the last axis, with statistics in float32. x: [rows, size]; returns the same shape."""
    weight, bias = g.weight(f"{name}.weight", (size,)), g.weight(f"{name}.bias", (size,))
    return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)
