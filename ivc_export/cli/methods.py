"""The options by which commands choose a selection method."""

from __future__ import annotations

import argparse

from ivc_export.errors import UserError
from ivc_export.selection.method import METHODS, Method

SCORED_HELP = (
    "what visual tokens are scored by: values of layer k-1 as it caches them, or unnormed-values, made of rows without "
    "the norm before it (default: as the official code does)"
)


def add_method_options(p: argparse.ArgumentParser) -> None:
    """Add --method and --method-seed; their default is None, so that a command can tell whether they were given."""
    p.add_argument(
        "--method",
        choices=tuple(METHODS),
        help="how visual tokens are chosen; foreground and random are there to compare with (default: ivc-prune)",
    )
    p.add_argument("--method-seed", type=int, metavar="N", help="of --method random (default: 0)")


def given_method(options: argparse.Namespace) -> Method:
    """The method of the options.

    Raises:
        UserError: the seed is out of range, or of a method that draws nothing.
    """
    method = Method(options.method or "ivc-prune", options.method_seed or 0)
    if options.method_seed is not None and not method.record.drawn:
        drawn = [name for name, record in METHODS.items() if record.drawn]
        raise UserError(f"--method-seed is for --method {'|'.join(drawn)}: {method.name} draws nothing")
    return method
