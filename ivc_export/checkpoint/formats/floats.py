"""Weights as floats of the graph's dtype, [out, in]."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.checkpoint.formats.weight_format import Builder, WeightFormat


def float_linear(g: Builder, x: ir.Value, name: str, out: int, features: int, bias: bool) -> ir.Value:
    """One Gemm on the stored bytes."""
    inputs = [x, g.weight(f"{name}.weight", (out, features))]
    if bias:
        inputs.append(g.weight(f"{name}.bias", (out,)))
    return g.op("Gemm", *inputs, transB=1)


FLOAT = WeightFormat("float", covers=lambda layer: True, read=lambda tensors: {}, linear=float_linear)
"""The format of layers that no other format takes."""
