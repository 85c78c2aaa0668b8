"""Turns errors of onnxruntime and its readers into sentences for users. Bugs of ours pass through."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from ivc_export.errors import UserError

_SHORT = (
    "failed to allocate",  # onnxruntime's arenas, on any device
    "out of memory",  # CUDA
    "alloc_failed",  # cuBLAS and cuDNN
    "bad_alloc",
    "bad allocation",
    "cannot allocate memory",  # the system, for a memory map
)
"""Parts of messages about a lack of memory, in small letters."""


SMALLER = "use smaller pictures, or close other programs"
"""What to do if a run finds no memory."""


def reason(error: BaseException) -> str:
    """An exception's message on one line, or its name if it has no message."""
    return textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an exception reports a lack of memory. Bindings raise different classes for it."""
    return isinstance(error, MemoryError) or any(words in reason(error).lower() for words in _SHORT)


@cache
def own() -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions, one for each of its status codes. They share no base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def known() -> tuple[type[Exception], ...]:
    """The exceptions that its bindings raise. RuntimeError counts only if it reports a lack of memory."""
    return (MemoryError, RuntimeError, *own())


@contextmanager
def told(what: str, short: str, otherwise: str) -> Iterator[None]:
    """Turn exceptions that onnxruntime raises in the block into one sentence with its reason. Other exceptions pass
    through.

    what: what failed, such as "prefix cannot run". short, otherwise: what to do if memory is short, and if it is not.

    Raises:
        UserError: onnxruntime raised an exception, or memory is short.
    """
    try:
        yield
    except known() as error:
        if is_short_of_memory(error):
            raise UserError(f"{what} for lack of memory ({reason(error)}): {short}") from error
        if not isinstance(error, own()):
            raise
        raise UserError(f"{what} ({reason(error)}): {otherwise}") from error
