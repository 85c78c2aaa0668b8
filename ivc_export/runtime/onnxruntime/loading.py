"""Imports onnxruntime when a session opens. Engines, exports and --help do not need it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from ivc_export.errors import UserError

SILENT = 4
"""The severity from which onnxruntime writes to standard error. Its exceptions have its errors anyway."""
FIRST_REGION = 208 << 20
"""Bytes that the shared arena takes at first. 2 B parameters need so much for a prompt with 1,024 visual tokens."""
LEAST_REST = 1 << 20
"""The arena gives a larger free chunk to a request whole if less than this would be left. onnxruntime's 128 MiB waste
much of an arena of this size."""


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


@cache
def share_arena() -> bool:
    """Register one arena of GPU memory for all sessions that are opened with `session.use_env_allocators`. It lasts as
    long as the process.

    Every session has an arena of its own otherwise, and keeps the most that it has ever needed, while only one of them
    runs at a time.

    Returns whether there is one. An onnxruntime without CUDA has none.
    """
    onnxruntime = load_onnxruntime()
    kinds = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    config = {
        "max_mem": 0,
        "arena_extend_strategy": 0,
        "initial_chunk_size_bytes": FIRST_REGION,
        "max_dead_bytes_per_chunk": LEAST_REST,
        "initial_growth_chunk_size_bytes": -1,
    }
    try:
        memory = onnxruntime.OrtMemoryInfo("Cuda", kinds[0], 0, kinds[1])
        arena = onnxruntime.OrtArenaCfg(config)
        onnxruntime.create_and_register_allocator_v2("CUDAExecutionProvider", memory, {}, arena)
    except (AttributeError, RuntimeError):  # too old, without CUDA, or the program has registered its own
        return False
    return True


@contextmanager
def small_workspaces() -> Iterator[None]:
    """Let cuBLAS handles that are made in the block have little memory, unless the user has chosen how much.

    onnxruntime makes handles for each session and thread, each with 64 MiB on recent GPUs. Where our operators
    multiply, with a workspace of their own, hardly anything uses these.
    """
    if "CUBLAS_WORKSPACE_CONFIG" in os.environ:
        yield
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:1"  # one of 4 MiB
    try:
        yield
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


GROWTH_NAMES = ("ArenaExtendStrategy", "set_arena_extend_strategy")
_GROWTH: list[bool] = []


def grow_exactly(wanted: bool) -> bool:
    """Let GPU memory for values that no session owns, such as weights, grow by the requested amount.

    By default it grows by powers of two, and up to half of it would be unused. In one run without our operators the
    default was a tenth faster, for a reason that we do not know. onnxruntime offers this option only internally, and
    not if it is built without CUDA. The first model of a process decides.

    Returns whether memory grows so.
    """
    load_onnxruntime()
    from onnxruntime.capi import _pybind_state

    if not _GROWTH:
        _GROWTH.append(wanted and all(hasattr(_pybind_state, name) for name in GROWTH_NAMES))
        if _GROWTH[0]:
            strategy, choose = (getattr(_pybind_state, name) for name in GROWTH_NAMES)
            choose(strategy.kSameAsRequested)
    return _GROWTH[0]
