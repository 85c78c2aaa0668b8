"""One thread that answers requests one after another, on one session."""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from ivc_export.errors import TooLongError, UserError
from ivc_export.report.overlay import count_kinds, kinds
from ivc_export.runtime.chat import Chat, FollowUp
from ivc_export.runtime.interface import Picture, Seen, Session
from ivc_export.selection.method import Method
from ivc_export.serve.errors import RequestError
from ivc_export.serve.images import decode
from ivc_export.serve.metrics import Metrics
from ivc_export.text.sampling import Sampler, Sampling
from ivc_export.text.stops import StopTexts
from ivc_export.text.template import Message

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Text of an answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer. details: of its pictures, cache and times, for clients that want them."""

    finish: str
    usage: dict[str, int]
    details: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """There is no answer, or it broke off."""

    error: RequestError


Event = Piece | Done | Failed


@dataclass
class Job:
    """A request on its way through the worker.

    pictures: their files, in the order of the messages. emit: gets the results, in the worker's thread. finished: is
    called once, when the worker no longer holds anything of the job.
    """

    messages: Sequence[Message]
    pictures: Sequence[bytes]
    sampling: Sampling
    stops: Sequence[str]
    ratio: float | None
    method: Method | None
    explain: bool
    emit: Callable[[Event], None]
    finished: Callable[[], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class KeptPictures:
    """Pictures with vision's outputs, by the hash of their files. The least recently used are dropped first.

    most: the most bytes of embeddings.
    """

    def __init__(self, most: int) -> None:
        self._most, self.nbytes = most, 0
        self._held: OrderedDict[bytes, tuple[Seen, tuple[int, int]]] = OrderedDict()

    def get(self, key: bytes) -> tuple[Seen, tuple[int, int]] | None:
        """A picture, and its width and height."""
        with suppress(KeyError):
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: bytes, seen: Seen, size: tuple[int, int]) -> None:
        """Keep a picture, if it fits."""
        if key in self._held or seen.nbytes > self._most:
            return
        self._held[key] = seen, size
        self.nbytes += seen.nbytes
        while self.nbytes > self._most:
            self.nbytes -= self._held.popitem(last=False)[1][0].nbytes


class Worker:
    """Answers jobs in the order of their arrival.

    follow_up: "compacted" continues over the last answer's cache if a request continues that conversation. most_pixels:
    of a picture. most_prompt: tokens of a conversation. kept_bytes: of pictures' embeddings.

    Raises:
        UserError: the session's bundle has no tokenizer or chat template.
    """

    def __init__(
        self,
        session: Session,
        metrics: Metrics,
        follow_up: FollowUp = "again",
        most_pixels: int = 40_000_000,
        most_prompt: int = 32_768,
        kept_bytes: int = 256 << 20,
    ) -> None:
        self.session, self.metrics, self.follow_up = session, metrics, follow_up
        self.most_pixels, self.most_prompt = most_pixels, most_prompt
        self.kept = KeptPictures(kept_bytes)
        self.processor = Chat(session).processor
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._last: tuple[Chat, list[bytes], tuple[Any, ...]] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ivc-worker", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether its thread is running."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, job: Job) -> None:
        """Add a job to the queue."""
        self._jobs.put(job)

    def close(self) -> None:
        """Stop the current answer, refuse waiting jobs, and wait for the thread."""
        self._closing.set()
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._closing.is_set():
                    job.emit(Failed(RequestError("the server is shutting down: try again later", 503)))
                elif not job.cancelled.is_set():
                    job.emit(self._answered(job))
            finally:
                job.finished()
                del job  # and what it holds, while this waits

    def _answered(self, job: Job) -> Event:
        try:
            return self._answer(job)
        except RequestError as error:
            return Failed(error)
        except TooLongError as error:
            return Failed(RequestError(str(error), param="messages", code="context_length_exceeded"))
        except UserError as error:
            return Failed(RequestError(str(error)))
        except Exception:
            LOG.exception("an answer failed")
            return Failed(RequestError("the server failed: see its log for the reason", 500))

    def _answer(self, job: Job) -> Event:
        keys = [hashlib.sha256(data).digest() for data in job.pictures]
        chat, fresh = self._chat(job, keys)
        timings = chat.conversation.timings
        timings.seconds.clear()
        with timings.stage("pictures"):
            shown = [self._picture(key, job.pictures[i]) for i, key in enumerate(keys)]
        pictures: list[Picture] = [picture for picture, _ in shown[fresh:]]
        with closing(chat.answer(job.messages, pictures)) as pieces:  # type: ignore[type-var]
            texts = StopTexts(pieces, job.stops)
            for text in texts:
                if text:
                    job.emit(Piece(text))
                if job.cancelled.is_set() or self._closing.is_set():
                    break
        assert chat.step is not None
        for key, seen, (_, size) in zip(keys[fresh:], chat.step.seen, shown[fresh:], strict=True):
            self.kept.put(key, seen, size)
        if self.follow_up == "compacted":
            self._last = chat, keys, (job.ratio, job.method)
        if self._closing.is_set():
            return Failed(RequestError("the server is shutting down: try again later", 503))
        return self._done(job, chat, texts.hit, [size for _, size in shown[fresh:]])

    def _chat(self, job: Job, keys: list[bytes]) -> tuple[Chat, int]:
        """A chat for the job, and how many of its pictures are in the chat's cache."""
        if self._last is not None and self.follow_up == "compacted":
            chat, seen, choices = self._last
            if choices == (job.ratio, job.method) and chat.messages == [*job.messages[:-1]]:
                pictures = sum(part["type"] == "image" for part in job.messages[-1]["content"])
                self._last = None  # until this answer is complete
                if seen == keys[: len(keys) - pictures]:
                    chat.sampler = Sampler(job.sampling)
                    return chat, len(seen)
        self._last = None
        chat = Chat(
            self.session,
            job.ratio,
            sampling=job.sampling,
            method=job.method,
            follow_up=self.follow_up,
            most_prompt=self.most_prompt,
        )
        return chat, 0

    def _picture(self, key: bytes, data: bytes) -> tuple[Picture, tuple[int, int]]:
        found = self.kept.get(key)
        self.metrics.lookups.labels("no" if found is None else "yes").inc()
        if found is not None:
            return found
        image = decode(data, self.most_pixels)
        return self.processor.picture(image), image.size

    def _done(self, job: Job, chat: Chat, hit: bool, sizes: Sequence[tuple[int, int]]) -> Done:
        assert chat.step is not None
        counts, cache = count_kinds(chat.step), chat.conversation.cache
        visual = sum(counts.values())
        usage = {
            "prompt_tokens": chat.step.run.rows,
            "completion_tokens": len(chat.tokens),
            "total_tokens": chat.step.run.rows + len(chat.tokens),
            "visual_tokens": visual,
            "kept_tokens": visual - counts["pruned"],
        }
        seconds = chat.conversation.timings.seconds
        tokens = {"prompt": usage["prompt_tokens"], "completion": len(chat.tokens), "kept": usage["kept_tokens"]}
        self.metrics.answered(seconds, tokens | {"pruned": counts["pruned"]}, cache.bytes_used)
        self.metrics.pictures.set(self.kept.nbytes)
        finish = "stop" if hit else chat.finish
        return Done(finish, usage, self._details(chat, sizes) if job.explain else {})

    def _details(self, chat: Chat, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Details for the page. cells: the kind of each visual token, row by row."""
        step, conversation = chat.step, chat.conversation
        assert step is not None
        found, pictures, start = kinds(step) if step.run.grids else [], [], 0
        for size, grid in zip(sizes, step.run.grids, strict=True):
            cells = [""] * (grid.rows * grid.columns)
            for (row, column), token in zip(grid.cells.tolist(), grid.detail, strict=False):
                cells[row * grid.columns + column] = found[start + token]
            pictures.append({**self.processor.extents(size, grid), "cells": cells})
            start += grid.visual
        return {
            "ratio": conversation.ratio,
            **conversation.method.facts,
            "counts": count_kinds(step),
            "cache": {"rows": conversation.cache.length, "bytes": conversation.cache.bytes_used},
            "milliseconds": {stage: round(1000 * value, 3) for stage, value in conversation.timings.seconds.items()},
            "pictures": pictures,
        }
