"""IVC-Prune's selection: the part of the host, and the operators in NumPy.

Source: IVC-Prune (arXiv 2602.03060), sections 3.2 and 3.3, and its official code (FireRedTeam/IVC-Prune). The order of
equal scores is open there; here the lowest index comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.contract.manifest import Manifest, RotarySizes, SelectionRule

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

IVC_PRIORITY = 2.0**15
"""Priority of a picture's best IVC token; the next has 1 less. The best tokens of several pictures have equal
priorities."""

SEED_PRIORITY = 1e30
"""Priority of the last seed. Each seed before it has so much more."""

SEPARATOR_PRIORITY = 1e36
"""Priority of separators between the rows of views. They come before seeds."""

Blocks = Sequence[tuple[int, float]]
"""Numbers of visual tokens within which IVC tokens are chosen, and the fraction of each."""


@dataclass(frozen=True)
class Selected:
    """What SelectTokens returns: kept rows ascending, score and seeds of the visual tokens."""

    keep_index: Ints
    token_score: Floats
    seed_index: Ints


def descending(score: npt.NDArray[Any]) -> Ints:
    """Indices by falling score, equal scores by rising index."""
    return np.argsort(-score, kind="stable").astype(np.int32)


def ivc_priority(positions: Ints, rotary: RotarySizes, head_dim: int, rule: SelectionRule) -> Floats:
    """Priorities of one picture's implicit-visual-coordinate tokens. They depend only on positions.

    positions: int32 [axes, L]. Returns float32 [L]: 0, or for IVC tokens IVC_PRIORITY and less. IVC tokens are the
    `round(ivc_fraction L)` tokens with the largest mean cosine (rotation near identity) and as many with the largest
    mean sine (near 90 degrees), taken alternately, cosine first. Means are over axes and frequencies, before M-RoPE
    mixes its sections. They are computed in float64 and rounded to 9 decimals: tokens (r, c) and (c, r) tie
    mathematically, and rounding makes them tie exactly.

    Source: arXiv 2602.03060, section 3.2.
    """
    frequencies = rotary.theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    least = positions.min()
    angles = np.arange(least, positions.max() + 1)[:, None] * frequencies  # these are few: a picture's rows and columns
    count = round(rule.ivc_fraction * positions.shape[1])
    best = []
    for part in (np.cos(angles), np.sin(angles)):
        mean = part.mean(axis=1)[positions - least].mean(axis=0)
        best.append(descending(np.round(mean, 9))[:count])
    taken = np.stack(best, axis=1).ravel()
    order = taken[np.sort(np.unique(taken, return_index=True)[1])]  # each token once, at its first place
    priority = np.zeros(positions.shape[1], np.float32)
    priority[order] = IVC_PRIORITY - np.arange(len(order))
    return priority


def ivc_priorities(m: Manifest, positions: Ints, blocks: Blocks, seed: int) -> Floats:
    """Priorities of all of a run's visual tokens, float32 [L]: `ivc_priority` of each block. The seed is not used."""
    rule = m.selection
    assert isinstance(rule, SelectionRule)
    parts = np.split(positions, np.cumsum([tokens for tokens, _ in blocks])[:-1], axis=1)
    rules = [rule.model_copy(update={"ivc_fraction": fraction}) for _, fraction in blocks]
    found = [ivc_priority(part, m.rotary, m.rotary.size, own) for part, own in zip(parts, rules, strict=True)]
    return np.concatenate(found)


def sharers(rule: SelectionRule, text_index: Ints) -> Ints:
    """Rows that share a vote with the visual tokens."""
    return text_index if rule.softmax == "all" else text_index[:0]


def text_votes(
    values: Floats,
    visual_index: Ints,
    text_index: Ints,
    query_index: Ints,
    rule: SelectionRule,
    tiles: Mapping[str, Ints] | None = None,
) -> Floats:
    """The text's votes for each visual token, float32 [L]. With views, a token has the votes of its thumbnail token.

    The arguments are those of `select`.
    """
    if rule.views:
        assert tiles is not None
        places = visual_index[tiles["thumbnail_index"]]
        by_place: Floats = votes(values, places, query_index, text_index[:0]).mean(axis=0)
        return by_place[tiles["tile_map"]]
    by_token: Floats = votes(values, visual_index, query_index, sharers(rule, text_index)).mean(axis=0)
    return by_token


def votes(values: Floats, visual_index: Ints, rows: Ints, others: Ints) -> Floats:
    """How each of `rows` divides its vote over the visual tokens and `others`: float32 [rows, L], the visual part.

    values: float32 [kv_heads, S, value_dim]. Source: arXiv 2602.03060, section 3.3; no rotation, no causal mask.
    """
    keys = values[:, np.concatenate([visual_index, others])]
    scores = values[:, rows] @ keys.transpose(0, 2, 1) / np.sqrt(np.float32(values.shape[-1]))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    by_row: Floats = np.mean(weights / weights.sum(axis=-1, keepdims=True), axis=0)
    return by_row[:, : len(visual_index)]


def seed_count(tokens: int, divisor: int) -> int:
    """Number of seeds among so many visual tokens: one in `divisor`, rounded half to even, at least 1."""
    return max(1, round(tokens / divisor))


def token_scores(
    values: Floats,
    visual_index: Ints,
    query_index: Ints,
    seed_divisor: int,
    others: Ints,
    candidates: Ints,
    seed_index: Ints | None = None,
) -> tuple[Floats, Ints]:
    """Score of each visual token by the value vectors of layer k-1, and the seeds, best first.

    values: float32 [kv_heads, S, value_dim]. others: rows that share a vote with the visual tokens. candidates:
    positions within `visual_index` that may be seeds. seed_index: seeds to take instead of those for which the text
    votes. Returns float32 [L] and int32 [seeds]; seeds are positions within `visual_index` too.
    """
    by_text = votes(values, visual_index, query_index, others)
    if seed_index is None:
        seeds = descending(by_text.mean(axis=0)[candidates])[: seed_count(len(candidates), seed_divisor)]
        seed_index = candidates[seeds]
    by_seeds = votes(values, visual_index, visual_index[seed_index], others)
    return np.concatenate([by_text, by_seeds]).mean(axis=0), seed_index


def tile_scores(
    token_score: Floats, priority: Floats, keep_count: int, thumbnail_index: Ints, tile_map: Ints
) -> Floats:
    """Numbers below 1 that order visual tokens behind the IVC tokens, float32 [L].

    First comes the foreground: the best thumbnail tokens by score, as many as fill the thumbnails' share of the budget
    together with their IVC tokens, and the tiles' tokens in the same places. Then come the thumbnails' others, then the
    tiles' others; each by score. The official code ends with the thumbnail and may keep fewer tokens than the budget.
    """
    length = len(token_score)
    share = keep_count * len(thumbnail_index) // length
    best = descending(np.maximum(token_score, priority)[thumbnail_index])[:share]
    chosen = np.zeros(len(thumbnail_index), bool)
    chosen[best] = priority[thumbnail_index[best]] == 0
    tier = np.zeros(length, np.int32)
    tier[thumbnail_index] = 1
    tier[chosen[tile_map]] = 2
    rank = np.empty(length, np.int32)
    rank[descending(token_score)] = np.arange(length)
    scores: Floats = ((tier + 1) * length - rank).astype(np.float32) / np.float32(4 * length)
    return scores


def view_scores(
    values: Floats,
    visual_index: Ints,
    query_index: Ints,
    seed_divisor: int,
    thumbnail_index: Ints,
    tile_map: Ints,
    candidate_index: Ints,
    seed_index: Ints | None = None,
) -> tuple[Floats, Ints]:
    """Score of each visual token of pictures in two views, and the seeds: one in `seed_divisor` candidates, or none.

    Only thumbnails' tokens share votes. A token of the second view has the score of the thumbnail's token that shows
    its place. The other arguments and the results are those of `token_scores`.
    """
    none, places = thumbnail_index[:0], visual_index[thumbnail_index]
    by_text = votes(values, places, query_index, none)
    if seed_index is None:
        seeds = descending(by_text.mean(axis=0)[candidate_index])[: round(len(candidate_index) / seed_divisor)]
        seed_index = thumbnail_index[candidate_index[seeds]]
    by_seeds = votes(values, places, visual_index[seed_index], none)
    return np.concatenate([by_text, by_seeds]).mean(axis=0)[tile_map], seed_index


def view_order(
    token_score: Floats,
    seed_index: Ints,
    priority: Floats,
    thumbnail_index: Ints,
    tile_map: Ints,
    candidate_index: Ints,
) -> Floats:
    """Numbers below 1 that order visual tokens of pictures in two views behind the IVC tokens, float32 [L].

    A thumbnail's token and the tokens of the second view that show its place stay together. Those of seeds come first,
    then those of candidates that are not IVC tokens, then all others; each by score. So the foreground that the
    official code keeps is a beginning of the order.
    """
    count = len(thumbnail_index)
    tier = np.zeros(count, np.int32)
    tier[candidate_index] = priority[thumbnail_index[candidate_index]] == 0
    tier[np.isin(thumbnail_index, seed_index)] = 2
    rank = np.empty(count, np.int32)
    rank[np.lexsort((-token_score[thumbnail_index], -tier))] = np.arange(count)
    order = (count - rank).astype(np.float32) / np.float32(2 * count)
    return order[tile_map]


def kept_rows(
    token_score: Floats, seed_index: Ints, priority: Floats, visual_index: Ints, text_index: Ints, keep_count: int
) -> Ints:
    """Rows to keep, ascending: all text, and `keep_count` visual tokens: seeds, then IVC tokens, then the rest by
    score."""
    final = np.maximum(token_score, priority)
    final[seed_index] = SEED_PRIORITY * np.arange(len(seed_index), 0, -1, dtype=np.float32)
    return np.sort(np.concatenate([text_index, visual_index[descending(final)[:keep_count]]])).astype(np.int32)


def select(
    values: Floats,
    priority: Floats,
    visual_index: Ints,
    text_index: Ints,
    query_index: Ints,
    keep_count: int,
    rule: SelectionRule,
    tiles: Mapping[str, Ints] | None = None,
    seed_index: Ints | None = None,
) -> Selected:
    """The rule's operator in NumPy. values: float32 [kv_heads, S, value_dim]; the others as in the contract.

    tiles: thumbnail_index and tile_map, for a rule with tiles or views, and candidate_index for one with views.
    seed_index: seeds to take instead of those for which the text votes.
    """
    if rule.views:
        assert tiles is not None
        token_score, seed_index = view_scores(
            values, visual_index, query_index, rule.seed_divisor, **tiles, seed_index=seed_index
        )
        order = view_order(token_score, seed_index, priority, **tiles)
        keep_index = kept_rows(order, seed_index, priority, visual_index, text_index, keep_count)
        return Selected(keep_index, token_score, seed_index)
    others = sharers(rule, text_index)
    candidates = tiles["thumbnail_index"] if tiles else np.arange(len(visual_index), dtype=np.int32)
    token_score, seed_index = token_scores(
        values, visual_index, query_index, rule.seed_divisor, others, candidates, seed_index
    )
    order = tile_scores(token_score, priority, keep_count, **tiles) if tiles else token_score
    keep_index = kept_rows(order, seed_index, priority, visual_index, text_index, keep_count)
    return Selected(keep_index, token_score, seed_index)
