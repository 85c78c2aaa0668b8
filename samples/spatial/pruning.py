"""Ways to choose which visual tokens stay, as ranks for `held_out.Pruning`: IVC-Prune, its parts, and its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ivc_export.contract.manifest import RotarySizes, SelectionRule
from ivc_export.selection.ivc_prune import ivc_priority, seed_count
from samples.spatial.held_out import Evidence
from samples.spatial.network import CONFIG

RULE = SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=2)
ROTARY = RotarySizes(theta=CONFIG["rope_theta"], sections=tuple(CONFIG["rope_scaling"]["mrope_section"]))
HEAD_DIM = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
SEED = 3e38


@functools.cache
def coordinates(rows: int, columns: int, start: int) -> Tensor:
    """Priorities of the implicit visual coordinates of one picture, 0 for all other tokens, [L]."""
    row, column = (part.ravel() for part in np.indices((rows, columns)))
    positions = np.stack([np.zeros_like(row), row, column]).astype(np.int32) + np.int32(start)
    return torch.from_numpy(ivc_priority(positions, ROTARY, HEAD_DIM, RULE))


def priorities(evidence: Evidence) -> Tensor:
    """Priorities of the implicit visual coordinates, [B, 256]."""
    found = torch.zeros(evidence.is_visual.shape)
    for row, grid in zip(found, evidence.grids.tolist(), strict=True):
        row[: grid[0] * grid[1]] = coordinates(*grid, evidence.start)
    return found.to(evidence.is_visual.device)


def foreground(evidence: Evidence) -> Tensor:
    """Seeds first, then the score by value similarity, [B, 256]. Source: arXiv 2602.03060, section 3.3."""
    assert evidence.values is not None
    visual = evidence.values[:, :, evidence.visual]

    def votes(queries: Tensor) -> Tensor:
        scores = queries @ visual.mT / visual.shape[-1] ** 0.5
        hidden = ~evidence.is_visual[:, None, None]
        return cast(Tensor, scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(1))

    by_text, voting = votes(evidence.values), evidence.votes[:, :, None]
    text = (by_text * voting).sum(1)
    lengths = evidence.is_visual.sum(1)
    counts = [seed_count(length, RULE.seed_divisor) for length in lengths.tolist()]
    ranked = (text / voting.sum(1)).masked_fill(~evidence.is_visual, -1).argsort(dim=1, descending=True, stable=True)
    seeds = ranked[:, : max(counts)]
    is_seed = torch.arange(max(counts), device=seeds.device) < torch.tensor(counts, device=seeds.device)[:, None]
    rows = torch.take_along_dim(visual, seeds[:, None, :, None], dim=2)
    total = text + (votes(rows) * is_seed[:, :, None]).sum(1)
    score = total / (voting.sum(1) + is_seed.sum(1, keepdim=True))
    return score.scatter(1, seeds, torch.where(is_seed, SEED, torch.take_along_dim(score, seeds, 1)))


def ivc_prune(evidence: Evidence) -> Tensor:
    """Seeds, implicit visual coordinates, then the foreground."""
    return torch.maximum(foreground(evidence), priorities(evidence))


def drawn(evidence: Evidence) -> Tensor:
    """Seeded uniform numbers, [B, 256]."""
    generator = torch.Generator().manual_seed(int(evidence.grids.sum()))
    return torch.rand(evidence.is_visual.shape, generator=generator).to(evidence.is_visual.device)


def ivc_and_random(evidence: Evidence) -> Tensor:
    """Implicit visual coordinates, then at random."""
    return torch.maximum(drawn(evidence), priorities(evidence))


def attention(evidence: Evidence) -> Tensor:
    """What the prompt's last token attends to below the cut. Source: FastV, arXiv 2403.06764, section 4."""
    assert evidence.attention is not None
    return evidence.attention[:, evidence.visual]


def unlike_pivots(evidence: Evidence) -> Tensor:
    """Embeddings least like a few pivots, the pivots first. Source: DART, arXiv 2502.11494, section 3.

    Pivots are the eight tokens with the longest embeddings; it needs no layer of the decoder.
    """
    unit = torch.nn.functional.normalize(evidence.image, dim=-1)
    length = evidence.image.norm(dim=-1).masked_fill(~evidence.is_visual, -1)
    pivots = length.topk(8, dim=1).indices
    likeness = (unit @ torch.take_along_dim(unit, pivots[:, :, None], 1).mT).amax(-1)
    return (-likeness).scatter(1, pivots, 2.0)


METHODS: dict[str, Callable[[Evidence], Tensor]] = {
    "IVC-Prune": ivc_prune,
    "foreground only": foreground,
    "IVC tokens and random": ivc_and_random,
    "random": drawn,
    "attention (FastV)": attention,
    "embeddings (DART)": unlike_pivots,
}
BEFORE_THE_DECODER = ("embeddings (DART)",)
"""Methods that prune before layer 0 whatever the cut."""
