"""Computes the attention of a run's last row in one layer, by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def attention_of_last_row(attention: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Append, for each run of a layer's eager attention, to what its last row attends: [P + S], the mean over heads.

    transformers gives the weights [1, heads, S, P + S], a softmax over the rows to which each row may attend.

    Source: arXiv 2403.06764, section 4.1.
    """
    found: list[torch.Tensor] = []
    hook = attention.register_forward_hook(lambda module, given, gave: found.append(gave[1][0, :, -1].mean(dim=0)))
    try:
        yield found
    finally:
        hook.remove()
