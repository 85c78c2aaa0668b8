"""The fraction of visual tokens that is kept."""

from __future__ import annotations

from ivc_export.errors import UserError


def check_ratio(ratio: float) -> float:
    """Return `ratio`, the fraction of visual tokens kept, if it lies in (0, 1].

    Raises:
        UserError: it does not.
    """
    if not 0 < ratio <= 1:  # false for nan as well
        raise UserError(f"ratio {ratio} is out of range: it is the fraction of visual tokens kept, above 0 and up to 1")
    return ratio


def kept_tokens(visual: int, ratio: float) -> int:
    """Visual tokens to keep of one picture: `round(ratio * visual)`, half to even, at least 1.

    The at-least-1 is `keep_count`'s lower bound; it matters only for `ratio * visual < 0.5`.
    """
    return max(1, round(ratio * visual))
