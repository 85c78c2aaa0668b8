"""A picture's visual tokens in the reference, and the reference's selection in pictures of two views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ivc_export.contract.manifest import SelectionRule


@dataclass(frozen=True)
class ReferencePicture:
    """A picture or a video as transformers takes it, and its visual tokens.

    inputs: for get_image_features or get_video_features, by name, with pictures along the first axis. rows, columns: of
    visual tokens. tile: 0, or the tokens along a side of a tile: tokens come tile by tile, and behind several tiles
    comes a thumbnail of one tile. content: None, or for a picture in two views, each row of which ends with a
    separator, the rows and columns of the first view that show it: the first row and column, and those behind the last.
    time: frames of so many tokens, one after another.
    """

    inputs: Mapping[str, torch.Tensor]
    rows: int
    columns: int
    tile: int = 0
    content: tuple[int, int, int, int] | None = None
    time: int = 1

    @property
    def video(self) -> bool:
        """Whether it is a video, or a part of one."""
        return "pixel_values_videos" in self.inputs

    @property
    def first_view(self) -> int:
        """Tokens of the first of two views."""
        return self.tile * (self.tile + 1)

    @property
    def candidates(self) -> list[int]:
        """Tokens of the first of two views that may be seeds."""
        if self.content is None:
            return []
        top, left, bottom, right = self.content
        return [row * (self.tile + 1) + column for row in range(top, bottom) for column in range(left, right)]

    @property
    def separators(self) -> list[int]:
        """Tokens that end rows and views."""
        if self.content is None:
            return []
        ends = [(row + 1) * (self.tile + 1) - 1 for row in range(self.tile)]
        return [*ends, self.first_view, *(self.first_view + (row + 1) * (self.columns + 1) for row in range(self.rows))]

    def blocks_of(self, rule: SelectionRule) -> list[tuple[int, float]]:
        """Numbers of tokens within which IVC tokens are chosen, with the fraction of each."""
        if self.content is None:
            return [(tokens, rule.ivc_fraction) for tokens in self.blocks]
        return [(tokens, rule.ivc_fraction if i == 0 else rule.row_fraction) for i, tokens in enumerate(self.blocks)]

    @property
    def blocks(self) -> list[int]:
        """Numbers of tokens within which IVC tokens are chosen."""
        if self.content is not None:
            return [self.first_view, 1, *[self.columns + 1] * self.rows]
        if not self.tile:
            return [self.rows * self.columns] * self.time
        tiles = (self.rows // self.tile) * (self.columns // self.tile)
        return [self.tile * self.tile] * (tiles if tiles == 1 else tiles + 1)

    @property
    def shown(self) -> list[int]:
        """For each token of a picture with a thumbnail, the thumbnail's token that shows the same place, or ends the
        row."""
        if self.content is not None:
            across, down = self.columns // self.tile, self.rows // self.tile
            second = [
                row // down * (self.tile + 1) + column // across
                for row in range(self.rows)
                for column in range(self.columns + 1)
            ]
            return [*range(self.first_view), 0, *second]
        side, high, wide = self.tile, self.rows // self.tile, self.columns // self.tile
        thumbnail = sum(self.blocks) - side * side
        found = [thumbnail + token for token in range(side * side)]
        if high * wide == 1:
            return found
        tiles = []
        for tile in range(high * wide):
            for token in range(side * side):
                row = tile // wide * side + token // side  # on the canvas that the tiles make up
                column = tile % wide * side + token % side
                tiles.append(thumbnail + row // high * side + column // wide)
        return tiles + found


def joined(pictures: Sequence[ReferencePicture]) -> dict[str, torch.Tensor]:
    """The inputs of several pictures, or of several videos, one after another."""
    return {name: torch.cat([p.inputs[name] for p in pictures]) for p in pictures[:1] for name in p.inputs}


def features(model: Any, pictures: Sequence[ReferencePicture], hidden: int) -> list[torch.Tensor]:
    """Rows [visual, hidden] of all pictures and videos in order, and those added after each of the first layers.

    model: transformers' model for them.
    """
    found: dict[bool, Any] = {}
    for video, see in ((False, "get_image_features"), (True, "get_video_features")):
        own = [picture for picture in pictures if picture.video == video]
        if own:
            inputs = {name: tensor for name, tensor in joined(own).items() if name != "second_per_grid_ts"}
            outputs = getattr(model, see)(**inputs)
            layers = [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or ())]
            rows = [torch.cat([part.reshape(-1, hidden) for part in layer]) for layer in layers]
            sizes = [sum(picture.blocks) for picture in own]
            found[video] = [iter(torch.split(layer, sizes)) for layer in rows]
    depth = len(next(iter(found.values())))
    return [torch.cat([next(found[picture.video][layer]) for picture in pictures]) for layer in range(depth)]


def scores_of_views(
    values: torch.Tensor,
    visual: torch.Tensor,
    queries: torch.Tensor,
    seed_divisor: int,
    shown: Sequence[int],
    candidates: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [L] and seeds of the visual tokens of pictures in two views. values: [kv_heads, S, value_dim].

    shown: see `fill_views`; only the first views' tokens share votes. candidates: tokens that may be seeds; there may
    be none.
    """
    thumbnails = [token for token in range(len(shown)) if shown[token] == token]
    place = {token: number for number, token in enumerate(thumbnails)}

    def votes(queries: torch.Tensor) -> torch.Tensor:
        keys = values[:, visual[thumbnails]]
        return torch.softmax(values[:, queries] @ keys.mT / values.shape[-1] ** 0.5, dim=-1).mean(dim=0)

    by_text = votes(queries)
    order = torch.argsort(by_text.mean(dim=0), descending=True, stable=True).tolist()
    allowed = [thumbnails[number] for number in order if thumbnails[number] in candidates]
    seeds = torch.tensor(allowed[: round(len(candidates) / seed_divisor)], dtype=torch.long)
    score = torch.cat([by_text, votes(visual[seeds])]).mean(dim=0)
    return score[[place[token] for token in shown]], seeds


def fill_views(
    score: torch.Tensor,
    seeds: list[int],
    coordinates: list[int],
    budget: int,
    shown: Sequence[int],
    candidates: Sequence[int],
    separators: Sequence[int],
) -> torch.Tensor:
    """The first `budget` visual tokens of: separators, seeds, IVC tokens, then places by score.

    shown: for each token, the first view's token that shows the same place; a first view's token shows itself. A place
    is such a token and all tokens that show the same. Seeds' places come first, then those of candidates that are not
    IVC tokens.
    """
    ranked = [token for token in torch.argsort(score, descending=True, stable=True).tolist() if shown[token] == token]
    free = {*candidates} - {*coordinates}
    places = dict.fromkeys([*[t for t in ranked if t in seeds], *[t for t in ranked if t in free], *ranked])
    members: dict[int, list[int]] = {place: [] for place in places}
    for token, place in enumerate(shown):
        members[place].append(token)
    rest = [token for place in places for token in members[place]]
    return torch.tensor(list(dict.fromkeys([*separators, *seeds, *coordinates, *rest]))[:budget])
