"""Conversations whose tensors are in host memory, for any runtime that takes arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ivc_export.contract.names import GraphName
from ivc_export.runtime.cache import KVCache
from ivc_export.runtime.interface import Conversation, Seen, Session, Step, Turn, image_rows
from ivc_export.selection.method import Method


class HostSession(Session, Protocol):
    """The three graphs of a bundle, which run on arrays in host memory."""

    def run(self, name: GraphName, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run graph `name`. Inputs and outputs have the contract's names; floats are in float32."""
        ...


class HostConversation(Conversation):
    """Runs of one session that share a cache in host memory; see Conversation.

    capacity: rows of fixed cache buffers, or None for caches of exact length.

    Raises:
        UserError: the ratio or the capacity is out of range.
    """

    session: HostSession
    cache: KVCache

    def __init__(
        self,
        session: HostSession,
        ratio: float | None = None,
        capacity: int | None = None,
        method: str | Method | None = None,
    ) -> None:
        super().__init__(session, ratio, method)
        m = session.bundle.manifest
        self.cache = KVCache(m.decoder, capacity, m.selection.whole_layers)

    def _clear(self) -> None:
        self.cache.clear()

    def _go(self, turn: Turn) -> Step:
        session, cache, m = self.session, self.cache, self.session.bundle.manifest
        vision = []
        for picture in turn.pictures:
            if isinstance(picture, Seen):
                vision.append(dict(picture.outputs))
                continue
            with self.timings.stage("vision"):
                vision.append(session.run("vision", picture.inputs))
        embeds = session.bundle.embed(turn.plan.tokens)
        added = turn.added(m.decoder)
        if vision:
            embeds[turn.plan.visual_index] = np.concatenate(image_rows(vision))
            added = {name: np.concatenate(image_rows(vision, name))[None] for name in added}
        inputs = turn.inputs
        with self.timings.stage(f"{turn.stage}.prefix"):
            names = ("position_ids", "keep_count", *turn.plan.selection_inputs)
            feeds = {name: inputs[name] for name in names} | {"inputs_embeds": embeds[None]} | added
            prefix = session.run("prefix", feeds | cache.inputs(range(m.selection_layer)))
        with self.timings.stage(f"{turn.stage}.decoder"):
            feeds = {tensor.name: prefix[tensor.name] for tensor in m.graphs["decoder"].inputs if tensor.name in prefix}
            feeds |= {name: inputs[name] for name in ("position_ids", "logit_index")}
            if turn.keep_index is not None:
                feeds["keep_index"] = turn.keep_index
            decoder = session.run("decoder", feeds | cache.inputs(range(m.selection_layer, m.decoder.layers)))
        cache.append(prefix | decoder)
        return Step(turn.plan, tuple(vision), prefix, decoder, turn.keep_index)
