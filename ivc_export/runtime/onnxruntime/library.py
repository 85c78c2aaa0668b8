"""onnxruntime itself, which is imported when a session opens: engines, exports and --help do without."""

from __future__ import annotations

from functools import cache
from typing import Any

from ivc_export.errors import UserError

SILENT = 4
"""Severity of what onnxruntime writes to standard error by itself: what it says of errors is in its exceptions."""


@cache
def load_onnxruntime() -> Any:
    """The module, which writes nothing by itself.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        import onnxruntime
        from onnxruntime import InferenceSession as InferenceSession  # one that was half removed has none
    except ImportError as error:
        raise UserError(
            f"onnxruntime cannot be imported ({error}): install ivc-export[cpu], or in its place ivc-export[cuda] "
            "where there is an NVIDIA GPU"
        ) from error
    onnxruntime.set_default_logger_severity(SILENT)
    return onnxruntime
