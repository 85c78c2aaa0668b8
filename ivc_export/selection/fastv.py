"""FastV's selection in NumPy: the tokens to which the last row attends most in layer k-1.

Source: Chen et al. 2024, An Image is Worth 1/2 Tokens After Layer 2 (arXiv 2403.06764), section 4.1. The order of equal
scores is open there; here the lowest index comes first.
"""

from __future__ import annotations

import numpy as np

from ivc_export.contract.manifest import FastVRule, Selection
from ivc_export.selection.ivc_prune import Floats, Ints, Selected, kept_rows

NO_SEEDS: Ints = np.zeros(0, np.int32)


def fastv_rule(rule: Selection) -> FastVRule:
    """The manifest's FastV rule for a model whose family has this rule."""
    return FastVRule(whole_layers=rule.whole_layers)


def attention_of_row(query: Floats, keys: Floats, scale: float) -> Floats:
    """What one row attends to, as the mean over its heads: float32 [rows].

    query: float32 [heads, D], heads of one head of keys side by side; keys: float32 [kv_heads, rows, D], of all rows to
    which it may attend.
    """
    grouped = query.reshape(len(keys), -1, query.shape[-1]) * np.float32(scale)
    scores = grouped @ keys.transpose(0, 2, 1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    found: Floats = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=(0, 1))
    return found


def select_by_score(token_score: Floats, visual_index: Ints, text_index: Ints, keep_count: int) -> Selected:
    """All text, and the visual tokens with the best scores, float32 [L]; there are no seeds."""
    nothing_first = np.zeros(len(token_score), np.float32)
    keep_index = kept_rows(token_score, NO_SEEDS, nothing_first, visual_index, text_index, keep_count)
    return Selected(keep_index, token_score, NO_SEEDS)


def select_attended(
    query: Floats,
    key: Floats,
    past_key: Floats,
    past_length: int,
    visual_index: Ints,
    text_index: Ints,
    keep_count: int,
    scale: float,
) -> Selected:
    """SelectAttended in NumPy.

    query: float32 [heads, S, D]; key, past_key: float32 [kv_heads, S, D] and [kv_heads, P, D]; the
    others as in the contract.
    """
    seen = np.concatenate([past_key[:, :past_length], key], axis=1)
    attended = attention_of_row(query[:, -1], seen, scale)
    return select_by_score(attended[past_length + visual_index], visual_index, text_index, keep_count)
