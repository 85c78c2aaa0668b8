"""A conversation over one compacted cache: prefill, decode steps and later turns are the same two calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import GraphName
from ivc_export.contract.ratio import check_ratio
from ivc_export.dtypes import FloatName
from ivc_export.families.pictures import Picture
from ivc_export.runtime.cache import KVCache
from ivc_export.runtime.plan import Run, check_kept, check_picture, plan_run

T = TypeVar("T")

HEADROOM = 128
"""Tokens of an answer, where nobody says how many are wanted."""


class Fetched(Mapping[str, npt.NDArray[Any]], Generic[T]):
    """Arrays by name, each made of a tensor by `fetch` when it is first looked at."""

    def __init__(self, tensors: Mapping[str, T], fetch: Callable[[T], npt.NDArray[Any]]) -> None:
        self._tensors, self._fetch = tensors, fetch
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = self._fetch(self._tensors[name])
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Step:
    """What one run gave.

    vision: the graph's outputs by name, for each picture. prefix, decoder: the graphs' outputs by name. Floats in
    float32.
    replayed: int32 [M], the rows that went on, if the caller chose them.
    """

    run: Run
    vision: tuple[Mapping[str, npt.NDArray[Any]], ...]
    prefix: Mapping[str, npt.NDArray[Any]]
    decoder: Mapping[str, npt.NDArray[Any]]
    replayed: npt.NDArray[np.int32] | None = None

    @property
    def image_embeds(self) -> tuple[npt.NDArray[np.float32], ...]:
        """float32 [visual, hidden], one for each picture, the tokens of its tiles one behind the other."""
        return image_rows(self.vision)

    @property
    def keep_index(self) -> npt.NDArray[np.int32]:
        """int32 [M], the rows that went on."""
        return self.prefix["keep_index"] if self.replayed is None else self.replayed

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Next-token logits of the last row, float32 [vocab]."""
        logits: npt.NDArray[np.float32] = self.decoder["logits"][0, 0]
        return logits


def image_rows(vision: Iterable[Mapping[str, npt.NDArray[Any]]]) -> tuple[npt.NDArray[np.float32], ...]:
    """The visual tokens of each run of the vision graph, [visual, hidden], its frames one behind the other."""
    frames = (outputs["image_embeds"] for outputs in vision)
    return tuple(embeds.reshape(-1, embeds.shape[-1]) for embeds in frames)


class Rows(Protocol):
    """What a conversation's cache says of itself."""

    @property
    def length(self) -> int:
        """Valid rows of every layer but those kept whole."""
        ...

    @property
    def room(self) -> int | None:
        """Rows that every layer still takes; None where caches grow."""
        ...

    @property
    def bytes_used(self) -> int:
        """Bytes of the valid rows."""
        ...


class AnySession(Protocol):
    """A bundle opened in some runtime.

    One run at a time: a run holds the session's lock, so that runs of conversations in other threads wait for it. A
    conversation is one thread's: two would mix their turns.
    """

    bundle: Bundle
    lock: AbstractContextManager[Any]
    """Held by whatever uses what conversations share; the thread that holds it may take it again."""
    backend: str
    """What runs the graphs, by the name that parity's tolerances know."""
    dtype: FloatName
    """What they compute in."""
    versions: Mapping[str, str]
    """Of the libraries that run them, by name."""

    def converse(self, ratio: float | None = None, capacity: int | None = None) -> AnyConversation:
        """Begin a conversation with a cache of its own.

        ratio: fraction of visual tokens kept; None takes the bundle's default. capacity: rows of the cache.
        """
        ...


class AnyConversation(Protocol):
    """Runs that share a cache, wherever that lies."""

    ratio: float
    headroom: int
    """Rows that are likely to follow the next run's, an answer's, for which a cache that grows leaves room."""
    next_position: int
    timings: Timings

    @property
    def session(self) -> AnySession:
        """What runs the graphs."""
        ...

    @property
    def cache(self) -> Rows:
        """What the runs share."""
        ...

    def run(self, tokens: Sequence[int] | npt.NDArray[Any], pictures: Sequence[Picture] = ()) -> Step:
        """As Conversation.run."""
        ...


C = TypeVar("C", bound=AnyConversation)
P = ParamSpec("P")


def one_at_a_time(run: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], T]:
    """A method of a conversation that holds its session's lock."""

    @wraps(run)
    def locked(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.session.lock:
            return run(self, *args, **kwargs)

    return locked


def planned(
    conversation: AnyConversation, tokens: Sequence[int] | npt.NDArray[Any], pictures: Sequence[Picture]
) -> Run:
    """What every runtime does before a run.

    Raises:
        UserError: see check_picture and plan_run.
    """
    manifest = conversation.session.bundle.manifest
    for picture in pictures:
        check_picture(manifest, picture)
    grids = [picture.grid for picture in pictures]
    return plan_run(manifest, tokens, grids, conversation.next_position, conversation.ratio)


class OpenConversation(AnyConversation, Protocol):
    """A conversation whose steps hold every tensor that passes between the graphs, and that can replay a choice."""

    def run(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        pictures: Sequence[Picture] = (),
        keep_index: npt.NDArray[np.int32] | None = None,
    ) -> Step:
        """As Conversation.run."""
        ...


class OpenSession(AnySession, Protocol):
    """A session that can be compared with another, tensor by tensor."""

    def converse(self, ratio: float | None = None, capacity: int | None = None) -> OpenConversation:
        """As AnySession's."""
        ...


class Session(OpenSession, Protocol):
    """The three graphs of a bundle, each to be run on arrays in host memory."""

    def run(self, name: GraphName, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run graph `name`; inputs and outputs by the contract's names, floats in float32."""
        ...


@dataclass
class Timings:
    """Seconds by stage, summed over its runs, and how many these were."""

    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.runs[name] = self.runs.get(name, 0) + 1


class Conversation:
    """Runs of one session that share a cache, for one thread; see AnySession.

    What an earlier turn pruned is gone: a later question about the same picture sees the tokens that the first
    question kept.

    ratio: fraction of visual tokens kept; None takes the bundle's default.
    capacity: rows of fixed cache buffers, or None for caches of exact length.

    Raises:
        UserError: the ratio or the capacity is out of range.
    """

    def __init__(self, session: Session, ratio: float | None = None, capacity: int | None = None) -> None:
        manifest = session.bundle.manifest
        self.session = session
        self.ratio = check_ratio(manifest.default_ratio if ratio is None else ratio)
        self.headroom = HEADROOM
        self.cache = KVCache(manifest.decoder, capacity, manifest.selection.whole_layers)
        self.next_position = 0
        self.timings = Timings()

    @one_at_a_time
    def run(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        pictures: Sequence[Picture] = (),
        keep_index: npt.NDArray[np.int32] | None = None,
    ) -> Step:
        """Run `tokens`, image tokens included, over the cache, and append the kept rows to it.

        keep_index: rows to keep instead of those that the prefix graph chooses, to replay another run.

        Raises:
            UserError: see planned, check_kept and KVCache.append.
        """
        bundle, m = self.session.bundle, self.session.bundle.manifest
        plan = planned(self, tokens, pictures)
        if keep_index is not None:
            keep_index = check_kept(keep_index, plan.rows)
        vision = []
        for picture in pictures:
            with self.timings.stage("vision"):
                vision.append(self.session.run("vision", picture.inputs))
        embeds = bundle.embed(plan.tokens)
        if pictures:
            embeds[plan.visual_index] = np.concatenate(image_rows(vision))
        both = {"position_ids": plan.position_ids}
        stage = plan.stage(self.cache.length)
        with self.timings.stage(f"{stage}.prefix"):
            feeds = {
                "inputs_embeds": embeds[None],
                "keep_count": np.array([plan.keep_count], np.int32),
                **plan.selection_inputs,
            }
            prefix = self.session.run("prefix", both | feeds | self.cache.inputs(range(m.selection_layer)))
        chosen = prefix["keep_index"] if keep_index is None else keep_index
        with self.timings.stage(f"{stage}.decoder"):
            feeds = {
                "hidden_states": prefix["hidden_states"],
                "keep_index": chosen,
                "logit_index": np.array([len(chosen) - 1], np.int32),
            }
            names = {name: TensorName.of(name) for name in prefix}
            compacted = [n for n, of in names.items() if of.role == "new" and of.layer not in self.cache.whole]
            feeds |= {name: prefix[name] for name in compacted}
            above = range(m.selection_layer, m.decoder.layers)
            decoder = self.session.run("decoder", both | feeds | self.cache.inputs(above))
        self.cache.append(prefix | decoder)
        self.next_position = plan.next_position
        return Step(plan, tuple(vision), prefix, decoder, keep_index)
