"""Compares errors or times with those of an earlier ivc-check or ivc-bench, and finds those that grew.

A baseline is a file that the same command wrote: report/parity.json, or the file of ivc-bench --json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ivc_export.contract.records import first_problem
from ivc_export.errors import UserError
from ivc_export.files import read_object
from ivc_export.verify.parity import ParityReport

ERRORS_FACTOR = 2.0
"""By which factor ivc-check lets an error grow: other kernels sum in another order."""
LEAST_SHARE = 0.01
"""A fraction of the tolerance. Errors below it count as this much, because they depend on the order of summation."""


class Stored(BaseModel):
    """A part of a file that a command wrote. Fields that a comparison needs are checked; others are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class StoredError(Stored):
    """A line of parity.json; see parity.Comparison."""

    name: str
    error: float | None = Field(ge=0)


class StoredErrors(Stored):
    """A parity.json; see parity.ParityReport."""

    model: dict[str, Any]
    backend: str
    dtype: str
    ratio: float
    method: str = "ivc-prune"
    method_seed: int | None = None
    visual_tokens: int
    comparisons: tuple[StoredError, ...]


@dataclass(frozen=True)
class Baseline:
    """An earlier run.

    path: its file. factor: by which a figure may grow. made_by: a command that writes such a file. facts: which a run
    must share with it. figures: by name; None for a comparison without a figure.
    """

    path: Path
    factor: float
    made_by: str
    facts: Mapping[str, Any]
    figures: Mapping[str, float | None]

    def check_same(self, own: Mapping[str, Any]) -> None:
        """Check that a baseline is of the same kind of run. own: facts of this run, all of them or those that are known
        already.

        Raises:
            UserError: a fact differs.
        """
        for what, value in own.items():
            if self.facts[what] != value:
                both = f" ({self.facts[what]}, not {value})" if isinstance(value, str | float | int) else ""
                raise UserError(
                    f"{self.path} is from a run with another {what}{both}: give the file of a run like this one, "
                    f"or write a new one with {self.made_by}"
                )

    def compare(self, figures: Mapping[str, float | None], least: Mapping[str, float] | None = None) -> Changes:
        """Find figures that grew, appeared or disappeared.

        figures: this run's, by name. least: the smallest value with which a figure counts, by name.

        Raises:
            UserError: this run and the baseline have no name in common.
        """
        if not figures.keys() & self.figures.keys():
            raise UserError(
                f"{self.path} has none of this run's figures: give the file of a run like this one, or write a new "
                f"one with {self.made_by}"
            )
        grown = {}
        for name, now in figures.items():
            before = self.figures.get(name)
            if before is not None and now is not None:
                base = max(before, (least or {}).get(name, 0.0))
                if now > self.factor * base:
                    grown[name] = (base, now)
        return Changes(
            grown,
            new=tuple(name for name in figures if name not in self.figures),
            missing=tuple(name for name in self.figures if name not in figures),
        )


@dataclass(frozen=True)
class Changes:
    """Names of figures that changed. grown: with both values of each."""

    grown: Mapping[str, tuple[float, float]]
    new: tuple[str, ...]
    missing: tuple[str, ...]

    def sentences(self, baseline: Baseline, unit: str = "") -> dict[str, str]:
        """Sentences for users, by name. unit: of the figures, such as " ms"."""
        shown = "{:.2f}" if unit else "{:.1e}"
        limit = f"more than {baseline.factor:g} times the value in {baseline.path}"
        found = {
            name: f"{name} grew from {shown.format(before)}{unit} to {shown.format(now)}{unit}, {limit}"
            for name, (before, now) in self.grown.items()
        }
        found |= {name: f"{name} is new: {baseline.path} does not have it" for name in self.new}
        return found | {name: f"{name} is in {baseline.path}, but not in this run" for name in self.missing}


def read_stored(path: Path, kind: type[Any], made_by: str) -> Any:
    """Read a baseline's file as `kind`, which is a Stored.

    Raises:
        UserError: it is missing, damaged, or not such a file.
    """
    advice = f"give a file that was written by {made_by}"
    try:
        return kind.model_validate(read_object(path, advice))
    except ValidationError as error:
        raise UserError(f"{path} is damaged or another kind of file ({first_problem(error)}): {advice}") from error


def check_factor(factor: float) -> None:
    """Check that a factor is at least 1, so that unchanged figures pass, and finite, so that a figure can exceed it.

    Raises:
        UserError: it is not.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise UserError(f"--baseline-factor {factor:g} is out of range: give 1 or more, such as 1.5")


def read_errors(path: Path, factor: float | None = None) -> Baseline:
    """Read the errors of a parity.json. factor: see Baseline; None takes ERRORS_FACTOR.

    Raises:
        UserError: it is missing, damaged, or not such a file; or the factor is out of range.
    """
    made_by = "ivc-check --against"
    factor = ERRORS_FACTOR if factor is None else factor
    check_factor(factor)
    stored: StoredErrors = read_stored(path, StoredErrors, made_by)
    figures = {comparison.name: comparison.error for comparison in stored.comparisons}
    return Baseline(path, factor, made_by, errors_facts(stored), figures)


def errors_facts(report: StoredErrors | ParityReport) -> dict[str, Any]:
    """Facts that two reports must share so that their errors can be compared."""
    return {
        "model": report.model,
        "backend": report.backend,
        "dtype": report.dtype,
        "ratio": report.ratio,
        "method": report.method,
        "method seed": report.method_seed,
        "number of visual tokens": report.visual_tokens,
    }


def compare_errors(baseline: Baseline, report: ParityReport) -> Changes:
    """Find errors that grew, appeared or disappeared since the baseline.

    Raises:
        UserError: the baseline is of another model, backend, dtype, ratio or picture.
    """
    baseline.check_same(errors_facts(report))
    least = {one.name: LEAST_SHARE * one.tolerance for one in report.comparisons if one.tolerance is not None}
    return baseline.compare({one.name: one.error for one in report.comparisons}, least)
