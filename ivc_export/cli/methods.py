"""Options that choose a selection method."""

from __future__ import annotations

import argparse

from ivc_export.errors import UserError
from ivc_export.selection.method import METHODS, Method

SCORED_HELP = (
    "what scores visual tokens: values, which layer k-1 caches, or unnormed-values, computed without the norm before "
    "them (default: as in the official code)"
)


def add_method_options(p: argparse.ArgumentParser, default: str) -> None:
    """Add --method and --method-seed. They are None if they are not given. default: the method then, in words."""
    p.add_argument(
        "--method",
        choices=tuple(METHODS),
        help="how visual tokens are selected; foreground and random are for comparison, and a bundle has fastv only if "
        f"it was exported with it ({default})",
    )
    p.add_argument("--method-seed", type=int, metavar="N", help="seed of --method random (default: 0)")


def given_method(options: argparse.Namespace) -> Method | None:
    """The method of the options. None if they name none.

    Raises:
        UserError: the seed is out of range, or the method draws nothing.
    """
    method = Method(options.method or "ivc-prune", options.method_seed or 0)
    if options.method_seed is not None and not method.record.drawn:
        drawn = [name for name, record in METHODS.items() if record.drawn]
        raise UserError(f"--method-seed works only with --method {'|'.join(drawn)}: leave it out with {method.name}")
    return method if options.method is not None else None
