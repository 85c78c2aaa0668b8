"""Imports onnxruntime when a session opens. Engines, exports and --help do not need it."""

from __future__ import annotations

from functools import cache
from typing import Any

from ivc_export.errors import UserError

SILENT = 4
"""The severity from which onnxruntime writes to standard error. Its exceptions have its errors anyway."""


@cache
def load_onnxruntime() -> Any:
    """Import onnxruntime, and stop it from writing to standard error.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        import onnxruntime
        from onnxruntime import InferenceSession as InferenceSession  # a partly removed package has none
    except ImportError as error:
        raise UserError(
            f"onnxruntime cannot be imported ({error}): install ivc-export[cpu], or ivc-export[cuda] instead if "
            "there is an NVIDIA GPU"
        ) from error
    onnxruntime.set_default_logger_severity(SILENT)
    return onnxruntime


def grow_exactly() -> None:
    """Let GPU memory for values that no session owns, such as weights, grow by the requested amount.

    By default it grows by powers of two, and up to 1 GB would be unused. onnxruntime offers this option only
    internally, and not if it is built without CUDA. Then nothing changes.
    """
    load_onnxruntime()
    from onnxruntime.capi import _pybind_state

    strategies = getattr(_pybind_state, "ArenaExtendStrategy", None)
    if strategies is not None and hasattr(_pybind_state, "set_arena_extend_strategy"):
        _pybind_state.set_arena_extend_strategy(strategies.kSameAsRequested)
