"""Layers that consist of linear layers alone."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.graph.activations import silu
from ivc_export.graph.builder import Graph


def gated_mlp(g: Graph, x: ir.Value, name: str, size: int, inner: int, bias: bool) -> ir.Value:
    """`down(silu(gate(x)) up(x))`. x: [rows, size]; returns the same shape. Source: Shazeer 2020, eq. 6 (SwiGLU)."""
    gate = silu(g, g.linear(x, f"{name}.gate_proj", inner, size, bias))
    up = g.linear(x, f"{name}.up_proj", inner, size, bias)
    return g.linear(g.op("Mul", gate, up), f"{name}.down_proj", size, inner, bias)
