"""Floating-point types: names and what other libraries call them."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

FloatName = Literal["float32", "float16", "bfloat16"]


FLOATS: dict[FloatName, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def data_type(name: str) -> ir.DataType:
    """ONNX element type of a dtype's name in the manifest."""
    return ir.DataType.INT32 if name == "int32" else FLOATS[name]  # type: ignore[index]
