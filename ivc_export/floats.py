"""Floating-point types, and the one way from a wider one to a narrower one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError

FLOAT_DTYPES: dict[FloatName, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_ENDS: dict[str, float] = {"float16": (2 - 2.0**-11) * 2.0**15, "bfloat16": (2 - 2.0**-8) * 2.0**127}
"""The least values that round to infinity."""


def cast(values: npt.NDArray[Any], dtype: np.dtype[Any] | str, what: str, mend: str) -> npt.NDArray[Any]:
    """`values` in `dtype`, of the same shape; themselves where they are in it. Infinities stay.

    what, mend: for the sentence: whose values these are, and what to do where they do not fit.

    Raises:
        UserError: finite values would become infinite.
    """
    target = np.dtype(dtype)
    if values.dtype == target:
        return values
    wide = values if values.dtype.itemsize >= 4 else values.astype(np.float32)  # which NumPy compares faster
    end = _ENDS.get(target.name)
    if end and wide.size and not (-end < wide.min() and wide.max() < end):  # or there are NaN
        largest = np.abs(wide[np.isfinite(wide)]).max(initial=0)
        if largest >= end:
            most = float(ml_dtypes.finfo(target).max)
            raise UserError(f"{what} has values up to {largest:.4g}, and {target.name} ends at {most:.5g}: {mend}")
    return wide.astype(target)
