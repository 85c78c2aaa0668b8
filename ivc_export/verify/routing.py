"""Finds rows whose experts nearly tie in the reference. A runtime may choose others, and later values then differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.bundle.recording import Recording
from ivc_export.contract.graphs import TensorName

MARGIN = "routing_margin"
"""In recorded runs, by layer, [rows]: how far the last expert that a row takes is ahead of the next."""

Margins = Mapping[int, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class RoutingTie:
    """The first row, of those that a comparison includes, whose choice of experts may change by rounding."""

    row: int
    layer: int
    margin: float

    def __str__(self) -> str:
        return f"row {self.row}'s experts in layer {self.layer} are {self.margin:.1e} apart: a tie"

    def among(self, kept: npt.NDArray[Any]) -> RoutingTie:
        """The same among kept rows: the first of them that it may change."""
        return replace(self, row=int(np.searchsorted(kept, self.row)))


def margins_of(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[int, npt.NDArray[np.float32]]:
    """The margins among a graph's recorded tensors, by layer."""
    names = {name: TensorName.of(name) for name in tensors}
    return {of.layer: tensors[name] for name, of in names.items() if of.stem == MARGIN and of.layer is not None}


def first_tie(margins: Margins, below: int, error: float) -> RoutingTie | None:
    """The first row with a tie in a layer below this one. error: of scores, between both sides; a margin within twice
    that is a tie."""
    found = []
    for layer, margin in margins.items():
        rows = np.flatnonzero(margin <= 2 * error)
        if layer < below and len(rows):
            found.append(RoutingTie(int(rows[0]), layer, float(margin[rows[0]])))
    return min(found, key=lambda tie: tie.row, default=None)


def earliest(ties: Iterable[RoutingTie | None]) -> RoutingTie | None:
    """The tie of the earliest row."""
    return min((tie for tie in ties if tie is not None), key=lambda tie: tie.row, default=None)


def prompt_tie(reference: Recording, error: float) -> RoutingTie | None:
    """A row of a recorded run's prompt with a tie in any layer."""
    recorded = [margins_of(reference.of("prefill", graph)) for graph in ("prefix", "decoder")]
    return earliest(first_tie(margins, max(margins, default=0) + 1, error) for margins in recorded)
