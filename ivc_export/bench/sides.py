"""The sides of a measurement: a bundle in one of its runtimes, or a peer. Each answers the same prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ivc_export.bench.prompts import Prompt
from ivc_export.contract.manifest import Manifest
from ivc_export.dtypes import FloatName
from ivc_export.runtime.backends import find_backend
from ivc_export.runtime.interface import Conversation, Session


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt: greedy tokens, and times.

    stages: seconds of the prefill by stage: "vision", "prefix" and "decoder", or "vision" and "prefill" for a peer.
    first: seconds from token ids and pixels on the host to the first token. steps: seconds of each decode step, from
    one token to the next. cache_bytes, visual_cache_bytes: bytes of the caches after the prefill, and those of visual
    tokens.
    """

    stages: Mapping[str, float]
    first: float
    steps: list[float]
    tokens: list[int]
    cache_bytes: int
    visual_cache_bytes: int


class Side(Protocol):
    """Something that answers prompts."""

    name: str
    dtype: FloatName
    device: str
    """ "cpu" or "cuda"."""
    prunes: bool
    """Whether it has ratios other than 1."""
    notes: str

    def answer(self, prompt: Prompt, ratio: float, count: int) -> Answer:
        """Answer with `count` tokens after the first."""
        ...


class BundleSide:
    """A bundle in a runtime."""

    prunes = True

    def __init__(self, session: Session) -> None:
        self.session, self.backend = session, find_backend(session.backend)
        self.name, self.dtype = session.backend, session.dtype
        self.device: str = self.backend.device
        self.notes = self.backend.after(session) or ""

    def converse(self, prompt: Prompt, ratio: float, count: int) -> Conversation:
        """Begin a conversation. Some backends want a cache of exactly the rows that the answer takes."""
        capacity = len(prompt.tokens) + count if self.backend.needs_capacity else None
        return self.session.converse(ratio, capacity)

    def answer(self, prompt: Prompt, ratio: float, count: int) -> Answer:
        """As Side.answer."""
        m, conversation = self.session.bundle.manifest, self.converse(prompt, ratio, count)
        start = time.perf_counter()
        step = conversation.run(prompt.tokens, [prompt.picture])
        tokens = [step.token]
        first = time.perf_counter() - start
        stages = {name.removeprefix("prefill."): seconds for name, seconds in conversation.timings.seconds.items()}
        total = conversation.cache.bytes_used
        part = visual_part(m, prompt, step.run.keep_count)
        steps, conversation.logits_wanted = [], False
        start = time.perf_counter()
        for left in reversed(range(count)):
            conversation.more = left
            tokens.append(conversation.run(tokens[-1:]).token)
            end = time.perf_counter()
            steps.append(end - start)
            start = end
        return Answer(stages, first, steps, tokens, total, round(total * part))


def visual_part(m: Manifest, prompt: Prompt, kept: int) -> float:
    """The fraction of the caches' rows that visual tokens take after a prefill that kept `kept` of them."""
    text, whole = len(prompt.tokens) - prompt.visual, len(m.selection.whole_layers)
    visual = (m.decoder.layers - whole) * kept + whole * prompt.visual
    return visual / (visual + m.decoder.layers * text)
