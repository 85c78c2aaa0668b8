"""A bundle on onnxruntime's CUDA provider. Caches stay on the device and are written in place."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.graphs import deepstack_names
from ivc_export.errors import TooLongError, UserError
from ivc_export.lowering.onnxruntime.host_steps import ANSWER, NO_TOKEN, TABLE
from ivc_export.runtime.cache import check_capacity
from ivc_export.runtime.failures import SMALLER, told
from ivc_export.runtime.interface import Conversation, Fetched, Seen, Step, Turn, check_numbers, no_numbers
from ivc_export.runtime.onnxruntime.fused_graphs import TURNS
from ivc_export.runtime.onnxruntime.loading import load_onnxruntime
from ivc_export.runtime.onnxruntime.prefill_graphs import PrefillGraphs, calls_of
from ivc_export.runtime.onnxruntime.session_options import CHECK_GPU, GraphOptions, Provider
from ivc_export.runtime.onnxruntime.stream import StageTimes
from ivc_export.runtime.onnxruntime.workspace import (
    Arrays,
    DeviceCache,
    HostStep,
    Inputs,
    PictureRows,
    Values,
    Workspace,
)
from ivc_export.runtime.plan import Run
from ivc_export.selection.method import Method
from ivc_export.tensorrt.memory import available_bytes

if TYPE_CHECKING:
    from onnxruntime import OrtValue

BLOCK = 512
"""The rows of a growing cache are a multiple of it."""


class FusedSession(PrefillGraphs):
    """The graphs of a bundle, and the memory of its conversations.

    Conversations of several threads take turns, one run at a time; see Session. On a GPU so do those of several models.

    provider, cuda_graph, op_library: see GraphOptions.

    Raises:
        UserError: see FusedGraphs.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: Provider = "cuda",
        cuda_graph: bool = True,
        op_library: Path | None = None,
    ) -> None:
        super().__init__(bundle, GraphOptions(provider, cuda_graph, op_library))
        self.lock: AbstractContextManager[Any] = TURNS if provider == "cuda" else threading.RLock()
        self.backend = f"onnxruntime-{provider}"
        self.versions: Mapping[str, str] = {"onnxruntime": load_onnxruntime().__version__}
        self.captures = count(1)
        """Numbers for captured CUDA graphs."""
        self._idle: list[Workspace] = []
        """Workspaces that no conversation uses. Conversations that end add to them, in any thread and at any time."""

    def converse(
        self, ratio: float | None = None, capacity: int | None = None, method: str | Method | None = None
    ) -> FusedConversation:
        """Begin a conversation; see FusedConversation."""
        return FusedConversation(self, ratio, capacity, method)

    def lend(self, capacity: int, least: int | None = None) -> Workspace:
        """Lend a workspace to one conversation, which returns it. The next conversation replays its CUDA graph:
        onnxruntime never frees one.

        capacity: rows of its caches. least: None for exactly so many. Otherwise there may be more, or fewer if memory
            is short, but not fewer than this.

        Raises:
            UserError: the device has no memory for it.
        """
        with self.lock:
            sizes = {number: workspace.cache.capacity for number, workspace in enumerate([*self._idle])}
            fit = [number for number, rows in sizes.items() if rows == capacity or (least and rows > capacity)]
            workspace = self._idle.pop(min(fit, key=sizes.__getitem__)) if fit else self._make(capacity, least)
            if not workspace.give_up():
                return self.lend(capacity, least)
        workspace.cache.clear()
        workspace.cache.grows = least is not None
        return workspace

    def _make(self, capacity: int, least: int | None) -> Workspace:
        if least:  # who grew out of a smaller one leaves it, and none of them is to be captured again for long
            self._idle[:] = [workspace for workspace in self._idle if workspace.cache.capacity > capacity]

        def attempt(rows: int) -> Workspace:
            with told(f"caches of {rows:,} rows cannot be allocated", SMALLER, CHECK_GPU):
                m = self.bundle.manifest
                if not self.host_steps:
                    return Workspace.make(m, rows, self.dtype, self.value)
                hosts = HostStep.make(m, self.dtype, self.reads_table, self.shared)
                stream = self.stream if self.runs_ahead else None
                return Workspace.make_on_host(m, rows, self.dtype, self.value, hosts, stream)

        with suppress(UserError):  # outside this block, everything allocated before memory ran short is freed
            return attempt(capacity)
        self._idle.clear()
        return attempt(least or capacity)

    def rows_that_fit(self) -> int | None:
        """How many rows of a cache the device has memory for, if that is known. For a GPU it is not."""
        free = available_bytes() if self.device == "cpu" else None
        return None if free is None else free // DeviceCache.row_bytes(self.bundle.manifest, self.dtype)

    def take_back(self, workspace: Workspace) -> None:
        """Keep a workspace for the next conversation."""
        self._idle.append(workspace)

    def fetch(self, value: PictureRows | OrtValue) -> npt.NDArray[np.float32]:
        """Copy to host memory, while nothing runs: onnxruntime may be capturing a CUDA graph."""
        with self.lock:
            found: npt.NDArray[np.float32] = value.fetch() if isinstance(value, PictureRows) else value.numpy()
            return found


def blocks(rows: int) -> int:
    """The least multiple of BLOCK that holds so many."""
    return -(-rows // BLOCK) * BLOCK


class FusedConversation(Conversation):
    """Runs of one FusedSession that share a cache; see Conversation. All tensors except logits, kept rows and scores
    stay on the device.

    capacity: rows of the cache. None takes a cache with room for the first run and `headroom`. It grows by half or more
        when it is full, while memory lasts. A finished conversation's memory goes to the next one that fits into it.

    Raises:
        UserError: the ratio or the capacity is out of range, or the device has no memory for the cache.
    """

    session: FusedSession
    cache: DeviceCache

    def __init__(
        self,
        session: FusedSession,
        ratio: float | None = None,
        capacity: int | None = None,
        method: str | Method | None = None,
    ) -> None:
        super().__init__(session, ratio, method)
        self.cache = DeviceCache.empty(session.bundle.manifest)
        self._workspace: Workspace | None = None
        self._give_back: weakref.finalize[..., FusedConversation] | None = None
        if capacity is not None:
            self._take(session.lend(check_capacity(capacity)))

    def _take(self, workspace: Workspace) -> None:
        self.cache, self._workspace = workspace.cache, workspace
        self._give_back = weakref.finalize(self, self.session.take_back, workspace)
        self._give_back.atexit = False

    def _grow(self, needed: int, more: int) -> None:
        """Continue in caches of `needed` rows, with room for `more` behind them if the device has it."""
        self._give_up_ahead()
        old, give_back, most = self.cache, self._give_back, self.session.rows_that_fit()
        wanted, least = blocks(max(needed + more, old.capacity * 3 // 2)), blocks(needed)
        workspace = self.session.lend(least if most is not None and most < wanted else wanted, least)
        if old.length:
            workspace.cache.take_over(old)
        self._take(workspace)
        if give_back is not None:
            give_back()

    def _clear(self) -> None:
        self._give_up_ahead()
        if self._give_back is not None and not self._give_back.alive:
            rows = self.cache.capacity
            self._take(self.session.lend(rows, rows if self.cache.grows else None))
        self.cache.clear()

    def _give_up_ahead(self) -> None:
        """Give up a decode step that ran ahead."""
        if self._workspace is not None and not self._workspace.give_up():
            self._forget()

    def _go(self, turn: Turn) -> Step:
        plan, cache = turn.plan, self.cache
        needed = max(cache.lengths(plan.rows).values())
        if needed > cache.capacity and cache.grows:
            positions = self.session.bundle.manifest.decoder.max_positions
            self._grow(needed, min(self.headroom, positions - plan.next_position))
        if needed > self.cache.capacity:
            raise TooLongError(
                f"the cache has {self.cache.capacity} rows, but {needed} are needed: give it a larger capacity"
            )
        try:
            step = self._decode(plan) if turn.stage == "decode" else self._prefill(turn)
        except BaseException:
            self.session.settle()  # else what the failed run used would stay on the device
            self._give_up_ahead()
            raise
        self.cache.length += len(step.keep_index)
        self.cache.whole_length += plan.rows
        return step

    def _prefill(self, turn: Turn) -> Step:
        session, cache, plan, workspace = self.session, self.cache, turn.plan, self._workspace
        assert workspace is not None  # the cache has rows
        times = StageTimes(session.stream, self.timings)
        embeds, added = self._rows(turn)
        vision = self._see(turn, embeds, added, times)
        host, answer = workspace.host if session.answers else None, Inputs()
        if host:
            answer = {name: workspace.step[name] for name in ANSWER}
            host.wanted[0] = 0  # logits stay on the device until somebody reads them
        calls = calls_of(session.bundle.manifest, turn, cache, {"inputs_embeds": embeds} | added, answer)
        prefix, last = session.prefill(workspace, *calls, times)
        small, logits = {name: prefix[name] for name in plan.method.record.operator.outputs}, {"logits": last}
        found = session.fetched(small if host else {**small, **logits})
        times.finish()
        cache.swap()
        workspace.ahead = None  # its row is overwritten
        best: int | None = None
        outputs: Mapping[str, npt.NDArray[Any]] = Fetched(logits, session.fetch)
        if host:
            best = self._best(host)
        else:
            outputs = {"logits": self._checked(found.pop("logits"))}
        below, above = self._shown(plan, turn.kept, prefix)
        if above:
            outputs = {**outputs, **above}
        return Step(plan, vision, found | below, outputs, turn.keep_index, best)

    def _rows(self, turn: Turn) -> tuple[OrtValue, Values]:
        """`inputs_embeds` of a prefill, and features for pictures' rows. Vision has not written its rows yet."""
        session, plan, sizes = self.session, turn.plan, self.session.bundle.manifest.decoder
        if turn.pictures and not any(isinstance(picture, Seen) for picture in turn.pictures):
            shape = (1, len(plan.visual_index), sizes.hidden_size)
            added = {name: session.memory(shape) for name in deepstack_names(sizes)}
            return session.embedded(plan.tokens, plan.text_index), added
        if not turn.pictures:
            zeros = turn.added(sizes)
            added = {name: session.value(array.astype(session.dtype, copy=False)) for name, array in zeros.items()}
            return session.embedded(plan.tokens, np.arange(plan.rows, dtype=np.int32)), added
        rows = {"image_embeds": session.embed(plan.tokens)} | turn.added(sizes)
        turn.write_seen(rows)
        put = {name: session.value(array.astype(session.dtype, copy=False)) for name, array in rows.items()}
        return put.pop("image_embeds"), put

    def _shown(self, plan: Run, kept: int, prefix: Inputs) -> tuple[Arrays, Arrays]:
        """More tensors of prefix and decoder for a prefill's Step. Caches have their rows, but not yet their
        lengths."""
        return {}, {}

    def _see(
        self, turn: Turn, embeds: OrtValue, added: Values, times: StageTimes
    ) -> tuple[Mapping[str, npt.NDArray[Any]], ...]:
        """Run vision on the pictures. It writes tokens to their rows of `embeds`, [1, S, hidden], and of `added`.

        Returns vision's outputs for each picture, also for those that were seen before, whose rows are there already.
        """
        session, found = self.session, list[Mapping[str, npt.NDArray[Any]]]()
        for picture, place, first in zip(turn.pictures, turn.places, turn.firsts, strict=True):
            if isinstance(picture, Seen):
                found.append(picture.outputs)
                continue
            with times.stage("vision"):
                grid = picture.grid
                targets = {"image_embeds": (embeds, place)} | {name: (rows, first) for name, rows in added.items()}
                rows = {
                    name: PictureRows(target, session.dtype, start, grid.visual, grid.batch)
                    for name, (target, start) in targets.items()
                }
                session.see(picture, rows)
            found.append(Fetched(rows, session.fetch))
        return tuple(found)

    def _decode(self, plan: Run) -> Step:
        assert self._workspace is not None  # since the run before
        if self._workspace.host is not None:
            return self._decode_from_host(plan, self._workspace)
        session, step = self.session, self._workspace.uploaded
        assert step is not None  # there is no HostStep
        with self.timings.stage("decode.decoder"):
            step.arrays["inputs_embeds"][:] = session.embed(plan.tokens)
            step.arrays["position_ids"][:] = plan.position_ids
            for suffix, length in self.cache.lengths(0).items():
                step.arrays[f"seqlens_k{suffix}"][:] = length
            step.upload()
            self._run_step(self._workspace)
            logits = self._workspace.logits.numpy()  # on the CPU it may be the memory to which the next step writes
            found = self._checked(np.require(logits, requirements="O"))
        return Step(plan, (), {"keep_index": np.zeros(1, np.int32)}, {"logits": found})

    def _decode_from_host(self, plan: Run, workspace: Workspace) -> Step:
        """A decode step that reads and writes host memory. Nothing is copied, and the host waits once.

        Where only best tokens are wanted, the next step runs ahead: the device takes its token from this one's answer.
        If the next run gives this token, it only waits. Otherwise that step is void: the next run overwrites its rows.
        """
        token, wanted = int(plan.tokens[0]), self.logits_wanted
        numbers = [*plan.position_ids[:, 0, 0].tolist(), *self.cache.lengths(0).values()]
        with self.timings.stage("decode.decoder"):
            place = None if wanted else workspace.taken(token, numbers)
            void = place is None and workspace.ahead is not None
            if place is None:
                place = workspace.turn() if void else workspace.last
                if place.host is not None and place.host.row is not None:
                    place.host.row[:] = self.session.embed(plan.tokens)
                self._begin_step(place, [token, *numbers], wanted)
            workspace.ahead = None
            if not void and not wanted and self._runs_ahead(plan):
                workspace.ahead = [number + 1 for number in numbers]
                self._begin_step(workspace.turn(), [NO_TOKEN, *workspace.ahead])
            host = place.host
            assert host is not None
            if place.mark and not place.mark.wait():
                raise UserError(f"the GPU cannot finish a run: {CHECK_GPU}")
            best = self._best(host)
            found = {"logits": host.told[None, None].copy()} if wanted else {}
        return Step(plan, (), {"keep_index": np.zeros(1, np.int32)}, found, best=best)

    def _runs_ahead(self, plan: Run) -> bool:
        """Whether another decode step may run before the answer of this one is seen."""
        last = self.session.bundle.manifest.decoder.max_positions
        fits = max(self.cache.lengths(2).values()) <= self.cache.capacity and plan.next_position < last
        return self.session.runs_ahead and self.more != 0 and fits

    def _begin_step(self, place: Workspace, numbers: list[int], wanted: bool = False) -> None:
        """Give a decode step to the device. It may wait for its end."""
        assert place.host is not None
        place.host.step[:] = numbers
        place.host.wanted[0] = wanted
        self._run_step(place, wait=place.mark is None)
        if place.mark:
            place.mark.move()

    def _best(self, host: HostStep) -> int:
        """The best token, which a run has told."""
        best, numbers = host.best.tolist()
        if not numbers:
            self._forget()
            raise UserError(no_numbers(self.session))
        return int(best)

    def _run_step(self, workspace: Workspace, wait: bool = True) -> None:
        """Run a decode step in a workspace. It is bound once, and captured once, for each set of the workspace's
        buffers. wait: see FusedGraphs.run_bound."""
        session, cache, bindings = self.session, workspace.cache, workspace.bindings
        if cache.swapped not in bindings:
            outputs = cache.outputs() | {"logits": workspace.logits}
            inputs = workspace.step | cache.inputs() | ({TABLE: session.table} if session.table else {})
            binding = session.bind("decode", inputs, outputs)
            bindings[cache.swapped] = (binding, next(session.captures))
        session.run_bound("decode", *bindings[cache.swapped], wait=wait)

    def _forget(self) -> None:
        """Do not give these caches to another conversation: their rows may not be finite; see DeviceCache.clear."""
        if self._give_back is not None:
            self._give_back.detach()

    def _checked(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        try:
            check_numbers(self.session, logits)
        except UserError:
            self._forget()
            raise
        return logits
