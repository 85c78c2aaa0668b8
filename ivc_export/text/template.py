"""Renders chat templates, the programs of a checkpoint that write a conversation as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from ivc_export.errors import UserError
from ivc_export.text.bounded_template import BoundedEnvironment, TemplateLimitError

Message = Mapping[str, Any]

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json that name a special token, in the order in which transformers adds these."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` around the assistant's text. In training it marks this text; here it only shows it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A template in an environment like transformers', with the names of the tokenizer's special tokens.

    source: the template. config: tokenizer_config.json. where: names both in errors. advice: ends an error's sentence.

    Raises:
        UserError: it cannot be parsed, or a special token is not text.
    """

    def __init__(self, source: str, config: Mapping[str, Any], where: str, advice: str) -> None:
        self._environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
        )
        self._environment.globals |= {"raise_exception": refuse_conversation, "strftime_now": strftime_now}
        self._environment.add_filter("tojson", to_json)
        try:
            self.tokens = named_tokens(config)
            self._template = self._environment.from_string(source)
        except MemoryError as error:
            raise UserError(f"{where} does not fit into memory: {advice}") from error
        except (jinja2.TemplateError, TemplateLimitError, ValueError, RecursionError, SyntaxError) as error:
            raise UserError(f"{where} is damaged ({error}): {advice}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; with `add_generation_prompt` up to the assistant's answer.

        Raises:
            UserError: the template fails, or refuses the conversation.
        """
        names: dict[str, Any] = {**self.tokens, "tools": None, "documents": None}
        try:
            given = {"messages": messages, "add_generation_prompt": add_generation_prompt, **names}
            return self._environment.render(self._template, given)
        except UserError:
            raise
        except Exception as error:  # a template is a program
            raise UserError(
                f"the chat template cannot render the conversation ({error}): change the messages or the template"
            ) from error

    def system_message(self, text: str) -> Message:
        """A system message, in the form that the template takes.

        Raises:
            UserError: it takes none.
        """
        for content in ([{"type": "text", "text": text}], text):
            message: Message = {"role": "system", "content": content}
            try:
                rendered = self.render([message, parts_message(["?"])])
            except UserError:  # it may take the other form, or none
                continue
            if text.strip() in rendered and "{'type'" not in rendered:
                return message
        raise UserError("the chat template of this bundle takes no system message: leave it out")


def parts_message(parts: Iterable[object]) -> Message:
    """A user's message in the form of chat templates: texts, videos, which name their kind, and pictures for everything
    else."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": getattr(part, "kind", "image")}
        for part in parts
    ]
    return {"role": "user", "content": content}


def answer_message(text: str) -> Message:
    """An assistant's message in the form of chat templates."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens in tokenizer_config.json, by their keys: `bos_token` and others.

    Raises:
        ValueError: one is not text.
    """
    found = {}
    for key, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if key in NAMED_TOKENS and token is not None and not isinstance(text, str):
            raise ValueError(f"{key} is not text")
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def refuse_conversation(message: str) -> None:
    """Templates call this if they refuse a conversation."""
    raise UserError(f"the chat template refuses the conversation: {message}")


def strftime_now(form: str) -> str:
    """The time, for templates that write the date."""
    return datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` with transformers' options. jinja2's own writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
