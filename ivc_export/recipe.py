"""What an export is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ivc_export.errors import UserError


def check_ratio(ratio: float) -> float:
    """Return `ratio`, the fraction of visual tokens kept, if it lies in (0, 1].

    Raises:
        UserError: it does not.
    """
    if not 0 < ratio <= 1:  # false for nan as well
        raise UserError(f"ratio {ratio} is out of range: it is the fraction of visual tokens kept, above 0 and up to 1")
    return ratio


@dataclass(frozen=True)
class ExportRecipe:
    """One export: which checkpoint, where to, and how it prunes.

    model: checkpoint folder in Hugging Face's layout.
    output: the bundle's folder; it must not exist unless `force` is set, which replaces an older bundle.
    ratio: the default fraction of visual tokens kept; every run can choose another.
    layer: layers below it see every token; None takes the family's default.
    max_visual: visual tokens of one picture at most; larger pictures are scaled down.
    testdata: whether to write testdata/, inputs and outputs of every graph for one picture and prompt.
    """

    model: Path
    output: Path
    ratio: float = 0.5
    layer: int | None = None
    max_visual: int = 1280
    force: bool = False
    testdata: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.max_visual < 4:
            raise UserError(f"max_visual {self.max_visual} is too small: give at least 4 visual tokens a picture")
