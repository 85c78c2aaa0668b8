"""The options by which commands choose a selection method."""

from __future__ import annotations

import argparse

from ivc_export.errors import UserError
from ivc_export.selection.method import METHODS, Method

SCORED_HELP = (
    "what visual tokens are scored by: values of layer k-1 as it caches them, or unnormed-values, made of rows without "
    "the norm before it (default: as the official code does)"
)


def add_method_options(p: argparse.ArgumentParser, default: str) -> None:
    """Add --method and --method-seed, which are None where they are not given. default: what is then, in words."""
    p.add_argument(
        "--method",
        choices=tuple(METHODS),
        help="how visual tokens are chosen; foreground and random are there to compare with, fastv is a bundle's own "
        f"({default})",
    )
    p.add_argument("--method-seed", type=int, metavar="N", help="of --method random (default: 0)")


def given_method(options: argparse.Namespace) -> Method | None:
    """The method of the options; None where they name none.

    Raises:
        UserError: the seed is out of range, or of a method that draws nothing.
    """
    method = Method(options.method or "ivc-prune", options.method_seed or 0)
    if options.method_seed is not None and not method.record.drawn:
        drawn = [name for name, record in METHODS.items() if record.drawn]
        raise UserError(f"--method-seed is for --method {'|'.join(drawn)}: {method.name} draws nothing")
    return method if options.method is not None else None
