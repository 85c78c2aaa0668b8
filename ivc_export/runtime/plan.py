"""Plans one run of prefix and decoder on the host: visual rows, voting rows, positions, number of kept tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ivc_export import families
from ivc_export.contract.manifest import Manifest, Selection, SelectionRule
from ivc_export.contract.ratio import kept_tokens
from ivc_export.errors import UserError
from ivc_export.families.pictures import Grid, Visual
from ivc_export.selection.ivc_prune import SEPARATOR_PRIORITY, Blocks
from ivc_export.selection.method import IVC_PRUNE, Method, find_method

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Run:
    """The prefix graph's inputs that follow from the prompt alone; names as in the contract."""

    tokens: Ints
    grids: tuple[Grid, ...]
    position_ids: Ints
    visual_index: Ints
    text_index: Ints
    query_index: Ints
    priorities: Callable[[], npt.NDArray[np.float32]]
    """Computes ivc_priority, which prefix is the first to read: vision can begin before."""
    keep_count: int
    tiles: Mapping[str, Ints]
    """thumbnail_index, tile_map and candidate_index, if the graph takes them."""
    next_position: int
    method: Method = IVC_PRUNE
    taken: Sequence[str] = ()
    """Names of the inputs that the bundle's selection takes."""

    @cached_property
    def ivc_priority(self) -> npt.NDArray[np.float32]:
        """float32 [L]; see SelectionMethod.host_plan."""
        return self.priorities()

    @property
    def rows(self) -> int:
        """S, the rows of this run."""
        return len(self.tokens)

    @property
    def kept(self) -> int:
        """M, the rows that the prefix graph chooses, also where the caller keeps others."""
        return len(self.text_index) + self.keep_count

    def stage(self, cached: int) -> Literal["prefill", "decode"]:
        """Whether this run is a prefill or a decode step over caches of `cached` rows. A decode step is one row of text
        behind others."""
        return "decode" if self.rows == 1 and cached and not self.grids else "prefill"

    @property
    def selection_inputs(self) -> dict[str, npt.NDArray[Any]]:
        """Inputs of the selection other than the layer's tensors and keep_count; names as in the contract."""
        found = {
            "visual_index": self.visual_index,
            "text_index": self.text_index,
            "query_index": self.query_index,
            "ivc_priority": self.ivc_priority,
            **self.tiles,
        }
        return {name: found[name] for name in self.taken if name != "keep_count"}


def plan_run(
    manifest: Manifest,
    tokens: Sequence[int] | npt.NDArray[Any],
    grids: Sequence[Grid],
    start: int,
    ratio: float,
    method: Method | None = None,
    question: int = 0,
) -> Run:
    """Plan a run of `tokens` from position `start` on. `grids[i].visual` of them are picture i's visual tokens.

    question: the first row that may vote. Rows vote from there on, but only from query_offset rows behind the last
    picture on. tokens: whole numbers, [S]. Without a picture, the first row counts as a visual token that is kept, so
    that the graphs have the same inputs. A decode step is such a run of one row, over caches that have rows. Without a
    method the bundle's is taken.

    Raises:
        UserError: there is nothing to run, tokens are not ids, an id is beyond the vocabulary, image tokens do not
            match the pictures, or a position is beyond the model's last.
    """
    if len(tokens) == 0:
        raise UserError("the prompt is empty: give some text")
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError("the prompt's tokens are not a list of whole numbers: give token ids of the bundle's tokenizer")
    unknown = tokens[(tokens < 0) | (tokens >= manifest.decoder.vocab_size)]
    if len(unknown):
        raise UserError(
            f"token id {unknown[0]} is beyond the vocabulary of {manifest.decoder.vocab_size} tokens: use the "
            "tokenizer of this bundle"
        )
    tokens = tokens.astype(np.int32)
    # without a picture such a token is an ordinary row: a model may draw one
    shown = np.isin(tokens, manifest.visual_tokens) if grids else np.zeros(0, bool)
    visual = np.flatnonzero(shown).astype(np.int32)
    if len(visual) != sum(grid.visual for grid in grids):
        raise UserError(
            f"the prompt has {len(visual)} image tokens, but its pictures give "
            f"{sum(grid.visual for grid in grids)}: write no image tokens into the text, and name each picture once"
        )
    positions, next_position = families.of(manifest.family).positions(segments(len(tokens), visual, grids), start)
    if next_position > manifest.decoder.max_positions:
        raise UserError(
            f"the conversation reaches position {next_position:,}, but this model has "
            f"{manifest.decoder.max_positions:,} positions: shorten it, or use smaller pictures"
        )
    rows = np.arange(len(tokens), dtype=np.int32)
    method = method or find_method(manifest.selection, None)
    if grids:
        voting = rows[max(question, visual[-1] + 1 + manifest.selection.query_offset) :]
        priorities = partial(picture_priorities, manifest, positions[:, visual], grids, method)
        keep_count = sum(kept_tokens(grid.visual, ratio) for grid in grids)
    else:
        visual, voting, priorities, keep_count = rows[:1], rows[:0], partial(np.zeros, 1, np.float32), 1
    return Run(
        tokens=tokens,
        grids=tuple(grids),
        position_ids=positions[:, None],
        visual_index=visual,
        text_index=np.delete(rows, visual) if grids else rows[1:],
        query_index=voting if len(voting) else rows[-1:],
        priorities=priorities,
        keep_count=keep_count,
        tiles=thumbnail_inputs(grids, manifest.selection),
        next_position=next_position,
        method=method,
        taken=method.record.operator.inputs(manifest.selection),
    )


def picture_priorities(
    manifest: Manifest, positions: Ints, grids: Sequence[Grid], method: Method
) -> npt.NDArray[np.float32]:
    """ivc_priority, float32 [L], of the visual tokens of pictures, at positions int32 [axes, L]."""
    blocks = [block for grid in grids for block in ivc_blocks(grid, manifest.selection)]
    priority = method.record.host_plan(manifest, positions, blocks, method.seed)
    starts = np.cumsum([0, *(grid.visual for grid in grids)])
    for grid, first in zip(grids, starts, strict=False) if manifest.selection.views else ():
        priority[first + grid.separators] = SEPARATOR_PRIORITY
    return priority


def check_inputs(manifest: Manifest, picture: Visual) -> None:
    """Check that a picture fits the vision graph, and that the graph gives as many visual tokens as the picture's grid
    has.

    Raises:
        UserError: it does not fit.
    """
    info, axes = manifest.graphs["vision"], dict[str, int]()
    for tensor in info.inputs:
        shape = picture.shape_of(tensor.name)
        fits = shape is not None and len(shape) == len(tensor.shape)
        for axis, size in zip(tensor.shape, shape or (), strict=False):
            fits &= size > 0 and size == (axes.setdefault(axis, size) if isinstance(axis, str) else axis)
        if not fits:
            found = "missing" if shape is None else f"of shape {list(shape)}"
            raise UserError(
                f"a picture's {tensor.name} is {found}, but this model takes {list(tensor.shape)}: prepare the "
                "picture with this bundle's own settings"
            )
    frames, tokens, _ = info.outputs[0].shape  # numbers, or axes of the inputs
    if isinstance(tokens, str):
        merged = getattr(manifest.preprocessing, "merge_size", 1) ** 2
        tokens = axes[tokens] if tokens in axes else axes["patches"] // merged
    visual = tokens * (axes[frames] if isinstance(frames, str) else frames)
    if visual != picture.grid.visual:
        raise UserError(
            f"a picture has the pixels of {visual} visual tokens, but its grid has {picture.grid.visual}: prepare "
            "the picture with this bundle's own settings"
        )


def check_kept(keep_index: npt.NDArray[Any], rows: int) -> Ints:
    """Check the rows of a run that a caller wants to keep, and return them, int32 [M].

    Raises:
        UserError: there are none, they are not ascending, or are not among the run's.
    """
    kept = np.asarray(keep_index)
    whole = kept.ndim == 1 and kept.size and kept.dtype.kind in "iu"
    if not whole or kept[0] < 0 or kept[-1] >= rows or (kept[1:] <= kept[:-1]).any():
        raise UserError(
            f"the rows to keep are not ascending numbers from 0 to {rows - 1}: give the rows of this same run"
        )
    return kept.astype(np.int32)


def ivc_blocks(grid: Grid, rule: Selection) -> Blocks:
    """Numbers of a picture's tokens within which IVC tokens are chosen, and the fraction of each."""
    if not isinstance(rule, SelectionRule):
        return []
    if grid.content is None:
        return [(tokens, rule.ivc_fraction) for tokens in grid.blocks]
    fractions = [rule.ivc_fraction, *[rule.row_fraction] * (1 + grid.rows)] * grid.time
    return list(zip(grid.blocks, fractions, strict=True))


def thumbnail_inputs(grids: Sequence[Grid], rule: Selection) -> dict[str, Ints]:
    """The thumbnail inputs of the rule's operator, by the contract's names."""
    if not rule.tiles and not rule.views:
        return {}
    make, names = (view_inputs, VIEW_INPUTS) if rule.views else (tile_inputs, TILE_INPUTS)
    # without a picture, a row of text counts as a visual token
    return make(grids) if grids else {name: np.zeros(1, np.int32) for name in names}


TILE_INPUTS = ("thumbnail_index", "tile_map")
VIEW_INPUTS = (*TILE_INPUTS, "candidate_index")


def tile_inputs(grids: Sequence[Grid]) -> dict[str, Ints]:
    """The thumbnails' tokens, and for every visual token the one that shows the same place; names as in the contract.

    A thumbnail token (r, c) covers r h .. r h + h - 1 and c w .. c w + w - 1 of the tokens of h x w tiles.
    """
    thumbnails, maps, start, before = [], [], 0, 0
    for grid in [frame for visual in grids for frame in visual.frames]:
        thumbnail = np.arange(grid.tile**2)
        if len(grid.blocks) > 1:
            row, column = grid.cells.T
            maps.append(before + row * grid.tile // grid.rows * grid.tile + column * grid.tile // grid.columns)
        maps.append(before + thumbnail)
        thumbnails.append(start + grid.visual - len(thumbnail) + thumbnail)
        start, before = start + grid.visual, before + len(thumbnail)
    return {
        "thumbnail_index": np.concatenate(thumbnails).astype(np.int32),
        "tile_map": np.concatenate(maps).astype(np.int32),
    }


def view_inputs(grids: Sequence[Grid]) -> dict[str, Ints]:
    """The same for pictures in two views, whose separators belong to their rows, and the candidates for seeds.

    A separator of the second view stands for the separator of the thumbnail's row that shows the same. The separator
    between the views stands for the thumbnail's first token.
    """
    thumbnails, maps, candidates, start, before = [], [], [], 0, 0
    for grid in [frame for visual in grids for frame in visual.frames]:
        side, whole = grid.tile + 1, grid.tile * (grid.tile + 1)
        row, column = np.mgrid[: grid.rows, : grid.columns + 1]
        shown = row * grid.tile // grid.rows * side + column * grid.tile // grid.columns
        maps += [before + np.arange(whole), [before], before + shown.ravel()]
        assert grid.content is not None
        top, left, bottom, right = grid.content
        row, column = np.mgrid[top:bottom, left:right]
        candidates.append(before + (row * side + column).ravel())
        thumbnails.append(start + np.arange(whole))
        start, before = start + grid.visual, before + whole
    return {
        "thumbnail_index": np.concatenate(thumbnails).astype(np.int32),
        "tile_map": np.concatenate(maps).astype(np.int32),
        "candidate_index": np.concatenate(candidates).astype(np.int32),
    }


def segments(rows: int, visual: Ints, grids: Sequence[Grid]) -> list[int | Grid]:
    """Text lengths and pictures in the order of the rows."""
    found: list[int | Grid] = []
    row = seen = 0
    for grid in grids:
        start = int(visual[seen])
        if visual[seen + grid.visual - 1] != start + grid.visual - 1:
            raise UserError("a picture's image tokens are not next to each other: write no image tokens into the text")
        found += [start - row, grid]
        row, seen = start + grid.visual, seen + grid.visual
    return [*found, rows - row]
