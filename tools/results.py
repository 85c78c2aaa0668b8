"""Files of benchmarks/results, and how tables on pages write what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def result(name: str) -> dict[str, Any]:
    """The content of benchmarks/results/`name`.json."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def table(head: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table with these columns, which `|` separates."""
    columns = [column.strip() for column in head.split("|")]
    cells = [columns, ["---"] * len(columns), *(map(str, row) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def percent(part: float, digits: int = 1) -> str:
    """A part of one in percent: 0.998 is 99.8."""
    return f"{100 * part:.{digits}f}"


def with_interval(found: Mapping[str, Any], digits: int = 1) -> str:
    """A mean and its 95% interval in percent, or in points."""
    mean, interval = found.values()
    low, high = (percent(end, digits) for end in interval)
    return f"{percent(mean, digits)} ({low} to {high})"
