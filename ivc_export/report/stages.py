"""A plot of a benchmark. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivc_export.bench.measure import Row

COLOURS = {
    "vision": "#94a3b8",
    "prefix": "#2563eb",
    "decoder": "#60a5fa",
    "prefill": "#3b82f6",
    "host": "#e5e7eb",
    "decode": "#0d9488",
}
LIMIT = "#dc2626"


def plot_stages(rows: Sequence[Row], path: Path) -> None:
    """Plot stages to the first token, stacked, and beside them a decoded token, as a PNG file. Each picture is a row of
    panels.

    The roofline is a red line across each bar.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    sizes = list(dict.fromkeys(row.visual_tokens for row in rows))
    most = max(sum(row.visual_tokens == size for row in rows) for size in sizes)
    figure = Figure(figsize=(4 + 1.5 * most, 3.6 * len(sizes)), layout="constrained")
    for size, (first, token) in zip(sizes, figure.subplots(len(sizes), 2, squeeze=False), strict=True):
        found = [row for row in rows if row.visual_tokens == size]
        names = [f"{row.side}\n{row.dtype}\n{row.ratio:.0%} kept" for row in found]
        for number, row in enumerate(found):
            bottom = 0.0
            for stage in ("vision", "prefix", "decoder", "prefill", "host"):
                value = row.stages.get(stage, 0.0)
                first.bar(number, value, bottom=bottom, color=COLOURS[stage])
                bottom += value
            token.bar(number, row.decode, color=COLOURS["decode"])
            for axes, ideal in ((first, row.ideal["vision"] + row.ideal["prefill"]), (token, row.ideal["decode"])):
                axes.hlines(ideal, number - 0.45, number + 0.45, color=LIMIT)
        for axes, title in ((first, f"first token, {size} visual tokens"), (token, "decode step")):
            decorate(axes, title, names)
    stages = [stage for stage in COLOURS if any(stage in row.stages for row in rows)]
    handles: list[Any] = [Patch(color=COLOURS[stage], label=stage) for stage in stages]
    handles.append(Line2D([], [], color=LIMIT, label="roofline"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)


def decorate(axes: Any, title: str, names: Sequence[str]) -> None:
    """Title, names of the bars, and no frame."""
    axes.set_title(title)
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_ylabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)
