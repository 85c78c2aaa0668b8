"""The fields of requests and answers, by OpenAI's protocol of chat completions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ivc_export.errors import UserError
from ivc_export.files import parse_json
from ivc_export.serve.errors import RequestError

WITHOUT_EFFECT: Mapping[str, Any] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), 0),
    **dict.fromkeys(("logprobs", "store"), False),
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
}
"""Parameters that are not supported, with the values that have no effect."""
SUPPORTED = "text and image_url parts, of the roles system, user and assistant"


class Strict(BaseModel):
    """Accepts only values of the JSON type, without conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """The place of a picture: a data URL, or an address if the server allows it."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    """A part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Strict):
    """The system message."""

    role: Literal["system"]
    content: str | list[TextPart]


class UserMessage(Strict):
    """A question."""

    role: Literal["user"]
    content: str | list[Part]


class AssistantMessage(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | list[TextPart]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class Completion(Strict):
    """A request for a completion. ratio, method, method_seed, explain: our own fields, which clients send as
    extra_body."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0, ge=0, le=2)
    top_p: float = Field(default=1, gt=0, le=1)
    stop: str | list[str] = Field(default_factory=list, max_length=4)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    n: Literal[1] = 1
    user: str = ""
    ratio: float | None = Field(default=None, gt=0, le=1)
    method: str | None = None
    method_seed: int = Field(default=0, ge=0, lt=2**31)
    explain: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def drawn_seed(self) -> int:
        """The seed of the random draws. A request without a seed gets a new one."""
        return secrets.randbits(31) if self.seed is None and self.temperature else self.seed or 0


def read_completion(body: bytes) -> Completion:
    """Read a request's body.

    Raises:
        RequestError: it is not JSON, or has a parameter that is not supported.
    """
    try:
        content = parse_json(body, "the body", "send a JSON object")
    except UserError as error:
        raise RequestError(str(error)) from error
    if not isinstance(content, dict):
        raise RequestError("the body is not a JSON object: send an object with model and messages")
    given = {key: value for key, value in without_nulls(content).items() if WITHOUT_EFFECT.get(key, ...) != value}
    try:
        found = Completion.model_validate(given)
    except ValidationError as error:
        raise refusal(error) from error
    if found.messages[-1].role != "user":
        raise RequestError("the last message is not from the user: end messages with a user message", param="messages")
    for number, message in enumerate(found.messages):
        if message.role == "system" and number:
            raise RequestError(
                "a system message is not the first message: put it first, or leave it out",
                param=f"messages[{number}].role",
            )
    if "" in found.stops:
        raise RequestError("stop contains an empty text: remove it", param="stop")
    return found


def without_nulls(value: Any) -> Any:
    """JSON without nulls in objects. Clients send null for missing values."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def refusal(error: ValidationError) -> RequestError:
    """The first mistake of a request, with the name of its parameter. Of alternatives, the one that matched furthest
    counts."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = max(found, key=lambda mistake: len(mistake["loc"]))
    names = [name for name in first["loc"] if not (isinstance(name, str) and name in KINDS)]
    param = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")
    shown = param if len(param) < 100 else f"{param[:100]}..."
    if first["type"] == "extra_forbidden":
        return RequestError(f"{shown} is not supported: leave it out", param=shown, code="unsupported_parameter")
    if first["type"].startswith("union_tag"):
        return RequestError(f"{shown} is not supported: give {SUPPORTED}", param=shown, code="unsupported_value")
    return RequestError(f"{shown} is not valid: {first['msg'][0].lower()}{first['msg'][1:]}", param=shown)


KINDS = {"system", "user", "assistant", "text", "image_url", "str"} | {
    f"list[{name}]" for name in ("TextPart", "str", "tagged-union[TextPart,ImagePart]")
}
"""Names that pydantic puts into a place besides the parameters' own names."""


class Reply:
    """The answer to a completion, whole or as chunks of a stream."""

    def __init__(self, model: str) -> None:
        self._frame = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str, usage: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        choice |= {"logprobs": None}
        return {**self._frame, "object": "chat.completion", "choices": [choice], "usage": usage, **more}

    def chunk(self, delta: Mapping[str, str], finish: str | None = None, **more: Any) -> bytes:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return event({**self._frame, "object": "chat.completion.chunk", "choices": [choice], **more})

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The event after the last chunk, for clients that want it."""
        return event({**self._frame, "object": "chat.completion.chunk", "choices": [], "usage": usage})


def event(content: Mapping[str, Any]) -> bytes:
    """A server-sent event of JSON."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


END = b"data: [DONE]\n\n"
