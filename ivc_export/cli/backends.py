"""Options that choose a runtime. They are made from the records of runtimes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ivc_export.errors import UserError
from ivc_export.runtime.backends import BACKENDS, DEFAULT, find_backend


class Gone(argparse.Action):
    """An option that existed in an earlier version."""

    def __call__(self, *arguments: object, **more: object) -> NoReturn:
        """Say which option replaces it.

        Raises:
            UserError: always.
        """
        raise UserError(
            "--provider was removed: give --backend onnxruntime-cpu in place of --provider cpu, and --backend "
            "onnxruntime-cuda in place of --provider cuda"
        )


def add_backend_options(p: argparse.ArgumentParser, several: bool = False, levels: bool = True) -> None:
    """Add --backend, and an option for each library that a runtime may load. several: --backend may be repeated.

    levels: whether packed weights may be multiplied at another accuracy level.
    """
    names = tuple(BACKENDS)
    if several:
        text = f"runtime to time; may be repeated (default: {DEFAULT})"
        p.add_argument("--backend", action="append", choices=names, help=text)
    else:
        text = f"runtime: onnxruntime runs the graphs, TensorRT the engines of ivc-build (default: {DEFAULT})"
        p.add_argument("--backend", choices=names, default=DEFAULT, help=text)
    for option, what in libraries().items():
        p.add_argument(flag(option), type=Path, metavar="LIB", help=f"{what}, for {', '.join(takers(option))}")
    if levels:
        text = "how packed weights are multiplied: 0 in float32, 4 with activations in int8"
        text = f"{text}, for {', '.join(takers('accuracy_level'))} (default: 4)"
        p.add_argument("--accuracy-level", type=int, metavar="LEVEL", help=text)
    p.add_argument("--provider", nargs="?", action=Gone, help=argparse.SUPPRESS)


def libraries() -> dict[str, str]:
    """Descriptions of the options that name a library, by their names in Python."""
    return {option: what for backend in BACKENDS.values() for option, what in backend.libraries.items()}


def flag(option: str) -> str:
    """An option's name in commands."""
    return f"--{option.replace('_', '-')}"


def takers(option: str) -> list[str]:
    """Names of the runtimes that take an option."""
    return [name for name, backend in BACKENDS.items() if backend.takes(option)]


def given_libraries(options: argparse.Namespace, backends: Sequence[str]) -> dict[str, Any]:
    """The libraries and the accuracy level of the command line, as options of open_session.

    Raises:
        UserError: none of `backends` takes one of them.
    """
    names = [*libraries(), "accuracy_level"]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    for option in given:
        check_taken(flag(option), option, backends)
    return given


def check_taken(shown: str, option: str, backends: Sequence[str]) -> None:
    """Check that one of `backends` takes an option. shown: the option's name in commands.

    Raises:
        UserError: none takes it.
    """
    if not any(find_backend(name).takes(option) for name in backends):
        names = takers(option)
        raise UserError(f"{shown} is for {' and '.join(names)}: use it with --backend {names[0]}, or leave it out")
