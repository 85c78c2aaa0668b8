"""Activation functions."""

from __future__ import annotations

import math

import onnx_ir as ir

from ivc_export.graph.builder import Graph


def silu(g: Graph, x: ir.Value) -> ir.Value:
    """`x sigmoid(x)`."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def quick_gelu(g: Graph, x: ir.Value) -> ir.Value:
    """`x sigmoid(1.702 x)`."""
    return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.scalar(1.702))))


def gelu_tanh(g: Graph, x: ir.Value) -> ir.Value:
    """`x (1 + tanh(y)) / 2` for `y = sqrt(2 / pi) (x + 0.044715 x^3)`, written as `x sigmoid(2 y)`.

    In float16 2 y may leave the range, where the sigmoid is 0 or 1 as it should be. Source: Hendrycks and Gimpel 2016.
    """
    scale = 2 * math.sqrt(2 / math.pi)
    factor = g.op("Add", g.op("Mul", g.op("Mul", x, x), g.scalar(0.044715 * scale)), g.scalar(scale))
    return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, factor)))


def gelu(g: Graph, x: ir.Value) -> ir.Value:
    """`x (1 + erf(x / sqrt 2)) / 2`, the exact form."""
    erf = g.op("Erf", g.op("Mul", x, g.scalar(math.sqrt(0.5))))
    return g.op("Mul", g.op("Mul", x, g.scalar(0.5)), g.op("Add", erf, g.scalar(1.0)))
