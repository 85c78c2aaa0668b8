"""Compares times with those of an earlier ivc-bench, and finds those that grew. See verify/baseline.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ivc_export.bench.measure import Row
from ivc_export.verify.baseline import Baseline, Changes, Stored, check_factor, read_stored

TIMES_FACTOR = 1.5
"""By which factor a time may grow. Times are medians of five rounds, on a machine that also does other work."""


class StoredGpu(Stored):
    """The GPU that took part."""

    name: str


class StoredRow(Stored):
    """Times of one side in milliseconds; see measure.Row."""

    side: str
    dtype: str
    ratio: float
    visual_tokens: int
    text_tokens: int
    stages: dict[str, float]
    prefill: float = Field(ge=0)
    first_token: float = Field(ge=0)
    decode: float = Field(ge=0)


class StoredTimes(Stored):
    """A file of ivc-bench --json; see entrants.report."""

    cpu: str
    gpu: StoredGpu | None
    bundle: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[StoredRow, ...]


def read_times(path: Path, factor: float | None = None) -> Baseline:
    """Read the times of a file of ivc-bench --json. factor: see Baseline; None takes TIMES_FACTOR.

    Raises:
        UserError: the file is missing, damaged, or not such a file; or the factor is out of range.
    """
    made_by = "ivc-bench --json"
    factor = TIMES_FACTOR if factor is None else factor
    check_factor(factor)
    stored: StoredTimes = read_stored(path, StoredTimes, made_by)
    gpu = stored.gpu.name if stored.gpu else None
    return Baseline(path, factor, made_by, facts(stored.cpu, gpu, stored.bundle, stored.settings), times(stored.rows))


def facts(cpu: str, gpu: str | None, bundle: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that two runs must share so that their times can be compared."""
    return {"bundle": dict(bundle), "CPU": cpu, "GPU": gpu or "none", "kind of run (ratios, tokens, rounds)": settings}


def report_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts of the report that ivc-bench --json will write."""
    gpu = report["gpu"]["name"] if report["gpu"] else None
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in report["settings"].items()}
    return facts(report["cpu"], gpu, report["bundle"], settings)


def times(rows: Sequence[Row | StoredRow]) -> dict[str, float | None]:
    """Milliseconds by side, size, ratio and stage: vision, prefill, first token, and decode step."""
    found: dict[str, float | None] = {}
    for row in rows:
        who = f"{row.side} in {row.dtype}, {row.visual_tokens} visual and {row.text_tokens} text tokens"
        parts = {"vision": row.stages.get("vision"), "prefill": row.prefill}
        parts |= {"first token": row.first_token, "decode step": row.decode}
        found |= {f"{who}, ratio {row.ratio:g}: {part}": value for part, value in parts.items()}
    return found


def compare_times(baseline: Baseline, rows: Sequence[Row]) -> Changes:
    """Find the times that grew, appeared or disappeared since the baseline.

    Raises:
        UserError: no time was measured in both runs.
    """
    return baseline.compare(times(rows))
