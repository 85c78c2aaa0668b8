"""POST /v1/chat/completions: reads a request, queues it, and answers it whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ivc_export.errors import UserError
from ivc_export.runtime.processor import Processor
from ivc_export.selection.method import Method
from ivc_export.serve.errors import RequestError
from ivc_export.serve.images import fetch, read_data_url
from ivc_export.serve.protocol import (
    END,
    AssistantMessage,
    Completion,
    ImagePart,
    Reply,
    SystemMessage,
    event,
    read_completion,
)
from ivc_export.serve.worker import Done, Event, Failed, Job, Piece, Worker
from ivc_export.text.sampling import Sampling
from ivc_export.text.template import Message, answer_message, parts_message

LINGER = 1.0
"""For how many seconds the rest of a too large body is read and dropped."""


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows.

    name: of the model. queue: how many requests may wait. keys: of the API; none leaves it open. loopback: whether only
    this machine may send requests, so that pages of other sites cannot. most_body: bytes. body_seconds: within which a
    body must arrive. most_tokens: of an answer; `tokens` if a request names none.
    """

    name: str
    queue: int = 16
    keys: tuple[str, ...] = ()
    loopback: bool = True
    remote_images: bool = False
    most_body: int = 32 << 20
    body_seconds: float = 30
    most_tokens: int = 1024
    tokens: int = 128


def check_model(name: str, settings: ServerSettings) -> None:
    """Check that a model is served.

    Raises:
        RequestError: it is not.
    """
    if name != settings.name:
        sentence = f"there is no model {name[:100]}: this server has {settings.name}"
        raise RequestError(sentence, 404, param="model", code="model_not_found")


class Completions:
    """POST /v1/chat/completions, as an ASGI application."""

    def __init__(self, worker: Worker, settings: ServerSettings) -> None:
        self._worker, self._settings = worker, settings
        self._admitted = 0
        self._special = steering_texts(worker.processor)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse a request."""
        request, metrics = Request(scope, receive), self._worker.metrics
        try:
            if request.method != "POST":
                raise RequestError("this path takes POST requests only: send the request with POST", 405)
            if self._admitted > self._settings.queue:
                raise RequestError("too many requests are waiting: try again in a moment", 429, code="queue_full")
            self._admitted += 1
            metrics.queue.set(self._admitted)
            outcome = await self._admit(request, receive, send)
        except RequestError as error:
            outcome = "busy" if error.status == 429 else "refused" if error.status < 500 else "failed"
            headers = {"Retry-After": "1"} if error.status == 429 else {}
            await JSONResponse(error.body, error.status, {**headers, "Connection": "close"})(scope, receive, send)
        except ClientDisconnect:
            outcome = "left"
        metrics.requests.labels(outcome).inc()

    def _leave(self) -> None:
        self._admitted -= 1
        self._worker.metrics.queue.set(self._admitted)

    async def _admit(self, request: Request, receive: Receive, send: Send) -> str:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        queued = False
        try:
            body = await read_body(request, self._settings)
            asked, make = await anyio.to_thread.run_sync(self._prepare, body)
            job = make(lambda found: hand_over(loop, events.put_nowait, found), lambda: hand_over(loop, self._leave))
            self._worker.put(job)
            queued = True
        finally:
            if not queued:
                self._leave()
        outcome, refused = "left", None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(watch, receive, group.cancel_scope)
                try:
                    outcome = await self._reply(asked, events, send)
                except RequestError as error:  # here, because a task group would wrap it
                    refused = error
                group.cancel_scope.cancel()
        finally:
            job.cancelled.set()
        if refused is not None:
            raise refused
        return outcome

    def _prepare(self, body: bytes) -> tuple[Completion, Callable[[Callable[[Event], None], Callable[[], None]], Job]]:
        """A request, read and checked in its own thread, and a function that makes a job from `emit` and `finished`."""
        settings, asked = self._settings, read_completion(body)
        check_model(asked.model, settings)
        tokens = asked.max_completion_tokens or asked.max_tokens or min(settings.tokens, settings.most_tokens)
        if tokens > settings.most_tokens:
            raise RequestError(
                f"the request asks for {tokens} tokens, but this server's limit is {settings.most_tokens}: ask for "
                "fewer",
                param="max_tokens",
            )
        try:
            messages, pictures = self._messages(asked)
            sampling = Sampling(asked.temperature, asked.top_p, asked.drawn_seed, tokens)
            method = None if asked.method is None else Method(asked.method, asked.method_seed)
        except UserError as error:
            raise RequestError(str(error)) from error
        made = partial(Job, messages, pictures, sampling, asked.stops, asked.ratio, method, asked.explain)
        return asked, made

    def _messages(self, asked: Completion) -> tuple[list[Message], list[bytes]]:
        """The conversation in the form of chat templates, and its pictures' files."""
        messages, pictures = list[Message](), list[bytes]()
        for number, message in enumerate(asked.messages):
            parts: list[object] = []
            content = [message.content] if isinstance(message.content, str) else message.content
            for place, part in enumerate(content):
                where = f"messages[{number}].content[{place}]"
                if isinstance(part, ImagePart):
                    pictures.append(self._file(part.image_url.url, f"{where}.image_url.url"))
                    parts.append(None)
                    continue
                text = part if isinstance(part, str) else part.text
                special = self._special.search(text)
                if special:
                    raise RequestError(
                        f"{where} contains the special token {special[0]}: remove it from the text", param=where
                    )
                parts.append(text)
            texts = [part for part in parts if isinstance(part, str)]
            if not isinstance(message, AssistantMessage) and not "".join(texts).strip():
                raise RequestError(
                    f"messages[{number}] has no text: add some text", param=f"messages[{number}].content"
                )
            if isinstance(message, SystemMessage):
                messages.append(self._worker.processor.system_message("".join(texts)))
            else:
                messages.append(
                    answer_message("".join(texts)) if isinstance(message, AssistantMessage) else parts_message(parts)
                )
        return messages, pictures

    def _file(self, url: str, where: str) -> bytes:
        if url[:5].lower() == "data:":
            return read_data_url(url, where)
        if not self._settings.remote_images:
            raise RequestError(
                f"{where} is not a data URL, and this server does not fetch pictures: send the picture as a data URL",
                param=where,
            )
        return fetch(url, where)

    async def _reply(self, asked: Completion, events: asyncio.Queue[Event], send: Send) -> str:
        """Send the results of a job."""
        reply, found = Reply(self._settings.name), await events.get()
        if isinstance(found, Failed):
            raise found.error
        if not asked.stream:
            texts = []
            while isinstance(found, Piece):
                texts.append(found.text)
                found = await events.get()
            if isinstance(found, Failed):
                raise found.error
            more = {"ivc": found.details} if asked.explain else {}
            await send_start(send, "application/json")
            await send_body(
                send, json.dumps(reply.whole("".join(texts), found.finish, found.usage, more)).encode(), False
            )
            return "answered"
        await send_start(send, "text/event-stream")
        await send_body(send, reply.chunk({"role": "assistant", "content": ""}))
        outcome = "answered"
        while isinstance(found, Piece):
            await send_body(send, reply.chunk({"content": found.text}))
            found = await events.get()
        if isinstance(found, Done):
            more = {"ivc": found.details} if asked.explain else {}
            await send_body(send, reply.chunk({}, found.finish, **more))
            if asked.stream_options.include_usage:
                await send_body(send, reply.usage(found.usage))
        else:
            await send_body(send, event(found.error.body))
            outcome = "failed"
        await send_body(send, END, False)
        return outcome


def steering_texts(processor: Processor) -> re.Pattern[str]:
    """A pattern of the tokenizer's special tokens. Such a text would pass for another's turn, or for a picture."""
    tokens = processor.tokenizer.get_added_tokens_decoder().values()
    image = processor.tokenizer.id_to_token(processor.bundle.manifest.tokens.image) or ""
    names = {str(token.content) for token in tokens if token.special} | {*processor.template.tokens.values(), image}
    longest_first = sorted(names - {""}, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in longest_first) or r"(?!)")


def hand_over(loop: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    """Call a function in the loop's thread, unless the loop has ended."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)


async def watch(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancel when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """Read the body of a request.

    Raises:
        RequestError: it is not JSON, is too large, or arrives too slowly. ClientDisconnect: the client leaves.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site cannot send this without a preflight request
        raise RequestError("the body is not JSON: send JSON with Content-Type application/json", 415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("the body is compressed: send it uncompressed", 415)
    body, left = bytearray(), settings.most_body
    stream = request.stream()
    with anyio.move_on_after(settings.body_seconds) as scope:
        if int(request.headers.get("content-length", "0")) <= left:
            async for piece in stream:
                left -= len(piece)
                if left < 0:
                    break
                body += piece
            else:
                return bytes(body)
        with anyio.move_on_after(LINGER):  # a client that is cut off while it sends does not read the answer
            async for _ in stream:
                pass
        raise RequestError(f"the body has more than {settings.most_body:,} bytes: send smaller pictures", 413)
    assert scope.cancelled_caught
    raise RequestError("the body arrives too slowly: send the request again", 408)


async def send_start(send: Send, media_type: str) -> None:
    """The head of an answer."""
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def send_body(send: Send, body: bytes, more: bool = True) -> None:
    """A part of an answer. It is the last part if there is no more."""
    await send({"type": "http.response.body", "body": body, "more_body": more})
