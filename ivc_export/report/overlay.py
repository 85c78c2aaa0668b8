"""Kept tokens over the picture: pruned ones dimmed, IVC tokens, seeds and foreground framed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from ivc_export.families.pictures import Grid
from ivc_export.runtime.interface import Step

COLOURS = {
    "seed": (230, 57, 70),
    "ivc": (29, 132, 255),
    "foreground": (46, 174, 92),
    "random": (240, 150, 30),
    "attended": (150, 80, 200),
    "pruned": (120, 120, 120),
}
LABELS = {
    "seed": "seeds",
    "ivc": "IVC tokens",
    "foreground": "foreground",
    "random": "drawn at random",
    "attended": "most attended",
    "pruned": "pruned",
}
SHORT_SIDE, LONG_SIDE = 560, 1680
LEGEND = 34


def kinds(step: Step) -> list[str]:
    """What each visual token of a run is, one of its method's kinds."""
    kept, own = np.isin(step.run.visual_index, step.keep_index), step.run.method.record.kinds
    found: list[str] = np.where(kept, np.where(step.run.ivc_priority > 0, own[0], own[-1]), "pruned").tolist()
    for seed in step.prefix.get("seed_index", ()):
        if kept[seed]:
            found[seed] = "seed"
    return found


def count_kinds(step: Step) -> dict[str, int]:
    """How many visual tokens a run had of each kind that its method has; all zero without a picture."""
    found = kinds(step) if step.run.grids else []
    return {kind: found.count(kind) for kind in step.run.method.record.all_kinds}


def overlay(images: Sequence[PIL.Image.Image], step: Step) -> PIL.Image.Image:
    """Draw the pictures of a run side by side, each with its tokens, thumbnails beside them, and a legend below.

    images: RGB, of each picture the part that its tokens cover.
    """
    found = kinds(step)
    panels, start = [], 0
    for image, grid in zip(images, step.run.grids, strict=True):
        own = found[start : start + grid.visual]
        panels.append(panel(image, grid, own))
        thumbnail = own[grid.rows * grid.columns :]
        if thumbnail:
            panels.append(panel(image, Grid(grid.tile, grid.tile), thumbnail))
        start += grid.visual
    width = sum(p.width for p in panels) + 8 * (len(panels) - 1)
    canvas = PIL.Image.new("RGB", (max(width, SHORT_SIDE), max(p.height for p in panels) + LEGEND), "white")
    left = 0
    for drawn in panels:
        canvas.paste(drawn, (left, 0))
        left += drawn.width + 8
    draw_legend(canvas, count_kinds(step))
    return canvas


def panel(image: PIL.Image.Image, grid: Grid, found: Sequence[str]) -> PIL.Image.Image:
    """One picture at a whole number of pixels a token; `found` may go on with its thumbnail's tokens."""
    cell = max(4, round(min(SHORT_SIDE / min(grid[:2]), LONG_SIDE / max(grid[:2]))))
    drawn = image.resize((grid.columns * cell, grid.rows * cell), PIL.Image.Resampling.BICUBIC)
    draw = PIL.ImageDraw.Draw(drawn, "RGBA")
    for (row, column), kind in zip(grid.cells.tolist(), found, strict=False):
        box = (column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1)
        if kind == "pruned":
            draw.rectangle(box, fill=(245, 245, 245, 200))
        else:
            draw.rectangle(box, outline=COLOURS[kind], width=max(1, cell // 14))
    return drawn


def draw_legend(canvas: PIL.Image.Image, counts: dict[str, int]) -> None:
    """Names, colours and counts in the strip at the bottom."""
    draw, left, top = PIL.ImageDraw.Draw(canvas), 8, canvas.height - LEGEND + 9
    font = PIL.ImageFont.load_default(15)
    for kind, count in counts.items():
        label = f"{LABELS[kind]} {count}"
        draw.rectangle((left, top, left + 15, top + 15), fill=COLOURS[kind])
        draw.text((left + 22, top - 1), label, fill="black", font=font)
        left += 40 + round(draw.textlength(label, font=font))
