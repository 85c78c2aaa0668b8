"""Matrix products on the checkpoint's own weights, and what is made of them alone.

Rows are two-dimensional ([rows, hidden]), so that every linear layer is one Gemm.
"""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.graph.activations import silu
from ivc_export.graph.builder import Graph


def linear(g: Graph, x: ir.Value, name: str, out: int, features: int, bias: bool) -> ir.Value:
    """`x W^T + b`. x: [rows, features]; W: [out, features], as stored; returns [rows, out]."""
    inputs = [x, g.weight(f"{name}.weight", (out, features))]
    if bias:
        inputs.append(g.weight(f"{name}.bias", (out,)))
    return g.op("Gemm", *inputs, transB=1)


def gated_mlp(g: Graph, x: ir.Value, name: str, size: int, inner: int, bias: bool) -> ir.Value:
    """`down(silu(gate(x)) up(x))`. x: [rows, size]; returns the same shape. Source: Shazeer 2020, eq. 6 (SwiGLU)."""
    gate = silu(g, linear(g, x, f"{name}.gate_proj", inner, size, bias))
    up = linear(g, x, f"{name}.up_proj", inner, size, bias)
    return linear(g, g.op("Mul", gate, up), f"{name}.down_proj", size, inner, bias)
