"""The table of dtypes, with their names in other libraries, and the one function that narrows floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.errors import UserError

FloatName = Literal["float32", "float16", "bfloat16"]
DtypeName = Literal["float32", "float16", "bfloat16", "int32"]


@dataclass(frozen=True)
class Dtype:
    """One dtype, with its names elsewhere. stored: in safetensors; tensorrt: the member of TensorRT's DataType.

    short: another name, for options. end: the least value that rounds to infinity; 0 if float32 has none.
    """

    numpy: np.dtype[Any]
    onnx: ir.DataType
    stored: str
    tensorrt: str
    short: str = ""
    end: float = 0

    @property
    def bytes(self) -> int:
        """Size of one value in bytes."""
        return self.numpy.itemsize


DTYPES: dict[DtypeName, Dtype] = {
    "float32": Dtype(np.dtype(np.float32), ir.DataType.FLOAT, "F32", "FLOAT", "fp32"),
    "float16": Dtype(np.dtype(np.float16), ir.DataType.FLOAT16, "F16", "HALF", "fp16", (2 - 2.0**-11) * 2.0**15),
    "bfloat16": Dtype(
        np.dtype(ml_dtypes.bfloat16), ir.DataType.BFLOAT16, "BF16", "BF16", "bf16", (2 - 2.0**-8) * 2.0**127
    ),
    "int32": Dtype(np.dtype(np.int32), ir.DataType.INT32, "I32", "INT32"),
}
"""Dtypes of inputs and outputs of graphs."""
FLOATS: dict[FloatName, Dtype] = {name: DTYPES[name] for name in get_args(FloatName)}
"""Dtypes in which graphs compute."""
STORED: dict[str, ir.DataType] = {name: one.onnx for name, one in FLOATS.items()} | {
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "I32": ir.DataType.INT32,
}
"""Dtypes of stored weights: floats by our names, and integers of some weight formats by safetensors' names."""
ONNX_FLOATS = frozenset(one.onnx for one in FLOATS.values())


def long_name(text: str) -> str:
    """The full name of the float `text`: float16 for fp16. Other texts stay unchanged."""
    return next((name for name, one in FLOATS.items() if one.short == text), text)


def cast(values: npt.NDArray[Any], dtype: np.dtype[Any] | str, what: str, mend: str) -> npt.NDArray[Any]:
    """`values` in `dtype`, of the same shape. They are returned unchanged if they have that dtype. Infinities stay.

    what, mend: for the sentence: whose values these are, and what to do if they do not fit.

    Raises:
        UserError: finite values would become infinite.
    """
    target = np.dtype(dtype)
    if values.dtype == target:
        return values
    wide = values if values.dtype.itemsize >= 4 else values.astype(np.float32)  # NumPy compares integers faster
    end = next((one.end for one in FLOATS.values() if one.numpy == target), 0)
    if end and wide.size and not (-end < wide.min() and wide.max() < end):  # or there are NaN
        largest = np.abs(wide[np.isfinite(wide)]).max(initial=0)
        if largest >= end:
            most = float(ml_dtypes.finfo(target).max)
            raise UserError(
                f"{what} has values up to {largest:.4g}, but the largest value of {target.name} is {most:.5g}: {mend}"
            )
    return wide.astype(target)
