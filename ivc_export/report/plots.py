"""Plots of a parity report, as SVG text. Needs matplotlib, which is imported when a plot is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ivc_export.report.overlay import COLOURS, LABELS, kinds
from ivc_export.runtime.interface import Step
from ivc_export.verify.parity import Comparison

INK, GRID, OK, BAD = "#1f2937", "#e5e7eb", "#2563eb", "#dc2626"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "ivc-export", "font.family": "sans-serif", "font.size": 9}
FLOOR = 1e-10
"""Where errors of exactly zero are drawn on a logarithmic axis."""


def draw(width: float, height: float, paint: Callable[[Any], None]) -> str:
    """An <svg> element of this size in inches; `paint` draws on matplotlib's axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=GRID)
        paint(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def short(name: str) -> str:
    """A comparison's name, short enough for an axis."""
    for long, brief in (
        ("compacted keys and values of layers", "compacted"),
        ("keys and values of layer", "layer"),
        (", of the graph's own values", " (own values)"),
        ("logits of decode step", "step"),
        ("logits of prefill", "logits"),
    ):
        name = name.replace(long, brief)
    return name


def plot_errors(comparisons: Sequence[Comparison]) -> str:
    """Error of each tensor in the order in which data passes, on a logarithmic axis, with its tolerance."""
    measured = [c for c in comparisons if c.error is not None and c.tolerance is not None]
    x = np.arange(len(measured))
    errors = np.array([max(c.error or 0.0, FLOOR) for c in measured])
    tolerances = np.array([c.tolerance for c in measured], float)
    colours = [OK if c.passed else BAD for c in measured]

    def paint(axes: Any) -> None:
        axes.vlines(x, FLOOR, errors, colors=colours, linewidth=1.2, alpha=0.35)
        axes.scatter(x, errors, c=colours, s=26, zorder=3)
        edges = np.append(x - 0.5, len(x) - 0.5)
        axes.step(edges, np.append(tolerances, tolerances[-1]), where="post", color=BAD, linewidth=1.3)
        axes.text(-0.5, tolerances[0] * 1.4, "tolerance", color=BAD, va="bottom")
        axes.set_yscale("log")
        axes.set_ylim(min(1e-9, errors.min() / 2), max(tolerances.max(), errors.max()) * 12)
        axes.set_xlim(-0.7, len(x) - 0.3)
        axes.set_xticks(x, [short(c.name) for c in measured], rotation=50, ha="right", rotation_mode="anchor")
        axes.set_ylabel("largest error")

    return draw(10.5, 3.9, paint)


def plot_scores(step: Step) -> str:
    """Histogram of the visual tokens' scores by their kind, with the boundary of the selection."""
    score, found = step.prefix["token_score"], np.array(kinds(step))
    order = [kind for kind in reversed(COLOURS) if (found == kind).any()]
    edges = np.histogram_bin_edges(score, bins=min(60, max(12, len(score) // 6)))

    def paint(axes: Any) -> None:
        colours = [tuple(channel / 255 for channel in COLOURS[kind]) for kind in order]
        parts = [score[found == kind] for kind in order]
        axes.hist(parts, edges, stacked=True, color=colours, label=[LABELS[kind] for kind in order])
        scored = [kind for kind in ("foreground", "attended") if kind in order]
        if scored:
            boundary = float(score[found == scored[0]].min())
            axes.axvline(boundary, color=INK, linewidth=1.2, linestyle="--", label=f"boundary, {boundary:.2e}")
        axes.set_xlabel("token_score")
        axes.set_ylabel("visual tokens")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
        axes.legend(frameon=False)

    return draw(6.2, 4.2, paint)
