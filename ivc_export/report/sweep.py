"""A plot of a calibration. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivc_export.contract.calibration import Calibration

RIVALS_STYLE: dict[str, Any] = {"marker": "s", "markersize": 4, "linestyle": "--", "linewidth": 1, "capsize": 3}


def plot_calibration(found: Calibration, path: Path) -> None:
    """Plot divergence and agreement by layer, with a line for each ratio, and other methods with their spreads, as a
    PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    divergence, agreement = figure.subplots(1, 2)
    panels: tuple[tuple[Any, str, str], ...] = (
        (divergence, "divergence", "divergence from the unpruned model, nats per token"),
        (agreement, "agreement", "fraction of identical answers"),
    )
    for axes, field, label in panels:
        for ratio in dict.fromkeys(trial.ratio for trial in found.trials):
            trials = [trial for trial in found.trials if trial.ratio == ratio]
            values = [getattr(trial, field) for trial in trials]
            axes.plot([trial.layer for trial in trials], values, marker="o", label=f"{ratio:.0%} kept")
        for name in dict.fromkeys(rival.name for rival in found.rivals):
            rivals = sorted((rival for rival in found.rivals if rival.name == name), key=lambda rival: rival.layer)
            axes.errorbar(
                [rival.layer for rival in rivals],
                [getattr(rival, field) for rival in rivals],
                yerr=[getattr(rival, f"{field}_spread") for rival in rivals],
                label=f"{name}, {rivals[0].ratio:.0%} kept",
                **RIVALS_STYLE,
            )
        axes.axvline(found.layer, color="0.6", linestyle=":")
        axes.set(xlabel="layer", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    divergence.legend(frameon=False)
    figure.savefig(path, dpi=110)
