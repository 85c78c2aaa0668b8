"""The interface of every runtime: a session, its conversations, and the results of their steps.

A conversation runs over one compacted cache. A prefill, a decode step and a later turn are the same call.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.graphs import deepstack_names
from ivc_export.contract.manifest import DecoderSizes
from ivc_export.contract.ratio import check_ratio
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.families.pictures import Grid, Visual
from ivc_export.runtime.plan import Ints, Run, check_inputs, check_kept, plan_run
from ivc_export.selection.method import Method, find_method

T = TypeVar("T")

HEADROOM = 128
"""Tokens of an answer, if nobody says how many are wanted."""


class Fetched(Mapping[str, npt.NDArray[Any]], Generic[T]):
    """Arrays by name. Each is made from a tensor by `fetch` when it is first read."""

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
class Seen:
    """A picture with the outputs of vision. A run takes it instead of the picture's Visual, and vision does not run
    again.

    Its arrays are in host memory for every runtime, because the rows of a prompt are uploaded from there anyway.

    outputs: vision's outputs by name, float32 [frames, visual, hidden]. grid, token_id, before, more: as Visual's.
    """

    outputs: Mapping[str, npt.NDArray[np.float32]]
    grid: Grid
    token_id: int
    before: str = ""
    more: int = 0

    @property
    def tokens(self) -> list[int]:
        """What stands for it in the prompt; see Visual."""
        return [self.token_id] * self.grid.visual

    @property
    def nbytes(self) -> int:
        """Size of its arrays in bytes."""
        return sum(array.nbytes for array in self.outputs.values())

    def check(self, sizes: DecoderSizes) -> None:
        """Check that it fits a decoder of these sizes.

        Raises:
            UserError: another bundle's vision made it.
        """
        names, size = {"image_embeds", *deepstack_names(sizes)}, self.grid.visual * sizes.hidden_size
        whole = all(array.size == size and array.shape[-1] == sizes.hidden_size for array in self.outputs.values())
        if names != {*self.outputs} or not whole:
            raise UserError("a picture was prepared by another bundle: prepare it with this bundle")


Picture = Visual | Seen
"""A picture that a run takes."""


@dataclass(frozen=True)
class Step:
    """The result of one run.

    vision: the graph's outputs by name, for each picture. prefix, decoder: the graphs' outputs by name. Floats are in
    float32. replayed: int32 [M], the kept rows, if the caller chose them. best: the best next token (of equal ones the
    first), if the runtime found it; logits are then available only if the conversation wanted them.
    """

    run: Run
    vision: tuple[Mapping[str, npt.NDArray[Any]], ...]
    prefix: Mapping[str, npt.NDArray[Any]]
    decoder: Mapping[str, npt.NDArray[Any]]
    replayed: npt.NDArray[np.int32] | None = None
    best: int | None = None

    @property
    def token(self) -> int:
        """The best next token."""
        return int(self.logits.argmax()) if self.best is None else self.best

    @property
    def seen(self) -> tuple[Seen, ...]:
        """The run's pictures, for another run, instead of their Visuals."""
        firsts = np.cumsum([0, *(grid.visual for grid in self.run.grids)])[:-1]
        ids = self.run.tokens[self.run.visual_index[firsts]].tolist() if self.run.grids else []
        return tuple(Seen({**o}, grid, i) for o, grid, i in zip(self.vision, self.run.grids, ids, strict=True))

    @property
    def image_embeds(self) -> tuple[npt.NDArray[np.float32], ...]:
        """float32 [visual, hidden], one array for each of `vision`, with the tokens of tiles or frames one after
        another."""
        return image_rows(self.vision)

    @property
    def keep_index(self) -> npt.NDArray[np.int32]:
        """int32 [M], the kept rows."""
        return self.prefix["keep_index"] if self.replayed is None else self.replayed

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Next-token logits of the last row, float32 [vocab]."""
        logits: npt.NDArray[np.float32] = self.decoder["logits"][0, 0]
        return logits


def image_rows(
    vision: Iterable[Mapping[str, npt.NDArray[Any]]], name: str = "image_embeds"
) -> tuple[npt.NDArray[np.float32], ...]:
    """The visual tokens of each run of the vision graph, [visual, hidden], with its frames one after another.

    name: an output with a row for each visual token.
    """
    frames = (outputs[name] for outputs in vision)
    return tuple(embeds.reshape(-1, embeds.shape[-1]) for embeds in frames)


class Cache(Protocol):
    """The cache that a conversation's runs share, as far as others may look at it."""

    @property
    def length(self) -> int:
        """Valid rows of every layer, except layers kept whole."""
        ...

    @property
    def room(self) -> int | None:
        """How many rows every layer still takes. None if caches grow."""
        ...

    @property
    def bytes_used(self) -> int:
        """Bytes of the valid rows."""
        ...


class Session(Protocol):
    """A bundle opened in a runtime.

    It does one run at a time. A run holds the session's lock, so runs of conversations in other threads wait. A
    conversation belongs to one thread: two threads would mix their turns.
    """

    bundle: Bundle
    lock: AbstractContextManager[Any]
    """Held while something that conversations share is used. The thread that holds it may take it again."""
    backend: str
    """The runtime's name in runtime.backends."""
    dtype: FloatName
    """The dtype in which the graphs compute."""
    versions: Mapping[str, str]
    """Versions of the libraries that run the graphs, by name."""

    def converse(
        self, ratio: float | None = None, capacity: int | None = None, method: str | Method | None = None
    ) -> Conversation:
        """Begin a conversation with its own cache.

        ratio: fraction of visual tokens kept; None takes the bundle's default. capacity: rows of the cache; None leaves
        this to the runtime. method: how visual tokens are chosen, a name or a Method with a seed; None takes the
        bundle's.

        Raises:
            UserError: one of them is out of range, there is no such method, the bundle's graphs choose in another way,
                or there is no memory for the cache.
        """
        ...


def check_numbers(session: Session, logits: npt.NDArray[np.float32]) -> None:
    """Check that logits are numbers.

    Raises:
        UserError: one of them is none.
    """
    if not np.isfinite(logits.max()):  # NaN if any of them is
        raise UserError(no_numbers(session))


def no_numbers(session: Session) -> str:
    """What to do where logits are no numbers: another dtype if there is a wider one, and never what is done already."""
    if session.dtype == "float32":
        return (
            f"this model gives NaN logits in float32 on {session.backend}, so its weights are damaged: verify them "
            "with ivc-check --weights, or download the checkpoint again and export it"
        )
    leaves = f"this model's activations exceed the range of {session.dtype} on {session.backend}"
    if session.backend == "onnxruntime-cpu":
        return f"{leaves}: compute in float32, which is the default on this backend"
    return f"{leaves}: use --backend onnxruntime-cpu, or build engines with --dtype float32"


@dataclass(frozen=True)
class Turn:
    """One run, planned and checked, before any graph has run.

    keep_index: int32 [M], the rows to keep if the caller chooses them. stage: prefill or decode, for the caches as they
    are.
    """

    plan: Run
    pictures: Sequence[Picture]
    keep_index: Ints | None
    stage: Literal["prefill", "decode"]

    @property
    def kept(self) -> int:
        """M, the number of kept rows."""
        return self.plan.kept if self.keep_index is None else len(self.keep_index)

    @property
    def inputs(self) -> dict[str, npt.NDArray[Any]]:
        """Inputs of the graphs that follow from the plan, int32 except ivc_priority; names as in the contract."""
        return {
            "position_ids": self.plan.position_ids,
            "keep_count": np.array([self.plan.keep_count], np.int32),
            "logit_index": np.array([self.kept - 1], np.int32),
            **self.plan.selection_inputs,
        }

    @property
    def firsts(self) -> list[int]:
        """For each picture, the index of its first visual token among the run's visual tokens."""
        return [int(first) for first in np.cumsum([0, *(picture.grid.visual for picture in self.pictures)])[:-1]]

    @property
    def places(self) -> list[int]:
        """The first row of each picture."""
        return [int(self.plan.visual_index[first]) for first in self.firsts]

    def added(self, sizes: DecoderSizes) -> dict[str, npt.NDArray[np.float32]]:
        """What is added to the pictures' rows, by the inputs' names: zeros [1, L, hidden], to which vision writes."""
        shape = (1, len(self.plan.visual_index), sizes.hidden_size)
        return {name: np.zeros(shape, np.float32) for name in deepstack_names(sizes)}

    def write_seen(self, targets: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write pictures that were seen before to their rows of `targets`, [1, S or L, hidden], by the outputs'
        names."""
        for picture, place, first in zip(self.pictures, self.places, self.firsts, strict=True):
            if isinstance(picture, Seen):
                for name, rows in picture.outputs.items():
                    start = place if name == "image_embeds" else first
                    targets[name][0, start : start + picture.grid.visual] = rows.reshape(-1, rows.shape[-1])


class Conversation(ABC):
    """Runs of one session that share a cache, for one thread; see Session.

    Tokens that an earlier turn pruned are lost: a later question about the same picture uses only the tokens that the
    first question kept.

    ratio: fraction of visual tokens kept; None takes the bundle's default. method: how they are chosen; None takes the
    bundle's.

    Raises:
        UserError: the ratio is out of range, there is no such method, or the bundle's graphs choose in another way.
    """

    session: Session
    cache: Cache

    def __init__(self, session: Session, ratio: float | None, method: str | Method | None = None) -> None:
        self.session = session
        self.ratio = check_ratio(session.bundle.manifest.default_ratio if ratio is None else ratio)
        self.method = find_method(session.bundle.manifest.selection, method)
        self.headroom = HEADROOM
        """How many rows will probably follow the next run, as an answer. A cache that grows leaves room for them."""
        self.logits_wanted = True
        """Whether steps must have logits even if the runtime finds the best token itself."""
        self.more: int | None = None
        """How many decode steps will probably follow the next run, if that is known. Without logits a runtime may begin
        one of them before the caller asks for it."""
        self.next_position = 0
        self.timings = Timings()

    def run(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        pictures: Sequence[Picture] = (),
        keep_index: npt.NDArray[np.int32] | None = None,
        question: int = 0,
    ) -> Step:
        """Run `tokens`, with image tokens, over the cache, and append the kept rows to it.

        question: the first row that may vote for visual tokens; see plan_run. keep_index: rows to keep instead of those
        that the prefix graph chooses, to replay another run.

        Raises:
            UserError: see check_inputs, plan_run and check_kept; or the cache is full, or the runtime fails.
        """
        with self.session.lock:
            manifest = self.session.bundle.manifest
            for picture in pictures:
                if isinstance(picture, Seen):
                    picture.check(manifest.decoder)
                else:
                    check_inputs(manifest, picture)
            grids = [picture.grid for picture in pictures]
            plan = plan_run(manifest, tokens, grids, self.next_position, self.ratio, self.method, question)
            chosen = None if keep_index is None else check_kept(keep_index, plan.rows)
            step = self._go(Turn(plan, pictures, chosen, plan.stage(self.cache.length)))
            self.next_position = plan.next_position
            return step

    def restart(self) -> None:
        """Forget all runs, and reuse the memory."""
        with self.session.lock:
            self._clear()
            self.next_position = 0

    @abstractmethod
    def _clear(self) -> None:
        """Empty the cache. The caller holds the session's lock."""

    @abstractmethod
    def _go(self, turn: Turn) -> Step:
        """Run the graphs, and append to the cache. The caller holds the session's lock."""


@dataclass
class Timings:
    """Seconds by stage, summed over its runs, and the number of these runs."""

    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add a run of so many seconds to `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.runs[name] = self.runs.get(name, 0) + 1
