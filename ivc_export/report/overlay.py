"""Draws kept tokens over the picture. Pruned tokens are dimmed; IVC tokens, seeds and foreground are framed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps

from ivc_export.families.pictures import Grid
from ivc_export.runtime.interface import Step
from ivc_export.selection.ivc_prune import SEPARATOR_PRIORITY

COLOURS = {
    "seed": (230, 57, 70),
    "ivc": (29, 132, 255),
    "foreground": (46, 174, 92),
    "random": (240, 150, 30),
    "attended": (150, 80, 200),
    "separator": (150, 90, 190),
    "pruned": (120, 120, 120),
}
LABELS = {
    "seed": "seeds",
    "ivc": "IVC tokens",
    "foreground": "foreground",
    "random": "drawn at random",
    "attended": "most attended",
    "separator": "ends of rows",
    "pruned": "pruned",
}
SHORT_SIDE, LONG_SIDE = 560, 1680
LEAST_SIDE = 112
"""The smallest side of a frame, if there are many."""
FEW = 4
"""How many pictures are side by side. More pictures, such as a video's frames, are smaller and make several lines."""
GAP = 8
LEGEND = 34


def kinds(step: Step) -> list[str]:
    """The kind of each visual token of a run: one of its method's kinds, or "separator"."""
    kept, own = np.isin(step.run.visual_index, step.keep_index), step.run.method.record.kinds
    found: list[str] = np.where(kept, np.where(step.run.ivc_priority > 0, own[0], own[-1]), "pruned").tolist()
    for seed in step.prefix.get("seed_index", ()):
        if kept[seed]:
            found[seed] = "seed"
    for separator in separators(step):
        if kept[separator]:
            found[separator] = "separator"
    return found


def separators(step: Step) -> list[int]:
    """The visual tokens of a run that end rows and views, if the method keeps them before all others."""
    found: list[int] = np.flatnonzero(step.run.ivc_priority >= SEPARATOR_PRIORITY).tolist()
    return found


def count_kinds(step: Step) -> dict[str, int]:
    """How many visual tokens of each kind a run had. All are zero without a picture."""
    found = kinds(step) if step.run.grids else []
    ends = ("separator",) if separators(step) else ()
    return {kind: found.count(kind) for kind in (*step.run.method.record.all_kinds, *ends)}


def overlay(images: Sequence[PIL.Image.Image], step: Step) -> PIL.Image.Image:
    """Draw the pictures of a run side by side, each with its tokens, with thumbnails beside them and a legend below.

    A video is a strip of frames, one for each temporal patch. images: RGB; of each picture the part that its tokens
    cover, of a video its frames.
    """
    found = kinds(step)
    panels, start = list[PIL.Image.Image](), 0
    side = SHORT_SIDE if len(images) <= FEW else max(LEAST_SIDE, SHORT_SIDE * FEW // len(images))
    frames = [frame for grid in step.run.grids for frame in grid.frames]
    for image, grid in zip(images, frames, strict=True):
        ends = [start + end for end in row_ends(grid)]
        detail, thumbnail = ([found[start + token] for token in part] for part in (grid.detail, grid.thumbnail))
        panels.append(panel(image, grid, detail, [found[end] for end in ends[-grid.rows :]], side))
        if thumbnail:
            square = grid._replace(rows=grid.tile, columns=grid.tile)
            panels.append(panel(image, square, thumbnail, [found[end] for end in ends[: grid.tile]], side))
        start += grid.visual
    lines = strips(panels, len(panels) if side == SHORT_SIDE else max(1, 4 * SHORT_SIDE // panels[0].width))
    width = max(sum(p.width + GAP for p in line) - GAP for line in lines)
    height = sum(max(p.height for p in line) + GAP for line in lines) - GAP
    canvas, top = PIL.Image.new("RGB", (max(width, SHORT_SIDE), height + LEGEND), "white"), 0
    for line in lines:
        left = 0
        for drawn in line:
            canvas.paste(drawn, (left, top))
            left += drawn.width + GAP
        top += max(p.height for p in line) + GAP
    draw_legend(canvas, count_kinds(step))
    return canvas


def strips(panels: Sequence[PIL.Image.Image], count: int) -> list[Sequence[PIL.Image.Image]]:
    """Lines of at most so many panels."""
    return [panels[i : i + count] for i in range(0, len(panels), count)]


def row_ends(grid: Grid) -> npt.NDArray[np.int32]:
    """The separators behind rows, without the one between views."""
    return np.setdiff1d(grid.separators, [grid.tile * (grid.tile + 1)]) if grid.content else grid.separators


def panel(
    image: PIL.Image.Image, grid: Grid, found: Sequence[str], ends: Sequence[str] = (), side: int = SHORT_SIDE
) -> PIL.Image.Image:
    """One picture, with a whole number of pixels for each token.

    ends: of the separators behind its rows, if there are any. side: pixels of its shorter side, if a token has 4.
    """
    cell = max(4, round(min(side / min(grid[:2]), LONG_SIDE * side / SHORT_SIDE / max(grid[:2]))))
    size = (grid.columns * cell, grid.rows * cell)
    if grid.content is None:
        drawn = image.resize(size, PIL.Image.Resampling.BICUBIC)
    else:  # a view keeps the aspect ratio; separators have their own strip
        view = PIL.ImageOps.pad(image, size, PIL.Image.Resampling.BICUBIC, (127, 127, 127))
        drawn = PIL.Image.new("RGB", (size[0] + cell // 2, size[1]), "white")
        drawn.paste(view)
    draw = PIL.ImageDraw.Draw(drawn, "RGBA")
    for row, kind in enumerate(ends):
        draw.rectangle((size[0] + 2, row * cell, drawn.width - 1, (row + 1) * cell - 2), fill=COLOURS[kind])
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
