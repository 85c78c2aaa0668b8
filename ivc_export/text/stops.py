"""Finds texts that end an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class StopTexts:
    """Passes on an answer up to the first of some texts. Pieces that may begin such a text are held back."""

    def __init__(self, pieces: Iterator[str], stops: Sequence[str]) -> None:
        self._pieces, self._stops = pieces, stops
        self.hit = False

    def __iter__(self) -> Iterator[str]:
        held = ""
        for piece in self._pieces:
            held += piece
            ends = [end for stop in self._stops if (end := held.find(stop)) >= 0]
            if ends:
                self.hit = True
                yield held[: min(ends)]
                return
            begun = (n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n]))
            free = len(held) - max(begun, default=0)
            yield held[:free]
            held = held[free:]
        yield held
