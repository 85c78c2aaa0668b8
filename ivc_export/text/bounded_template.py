"""Runs Jinja templates with limits on time and output, because others wrote these programs."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

MOST_SOURCE = 1 << 20
"""The most characters of a template: several times the longest published."""
MOST_TEXT = 8 << 20
"""The most characters of a rendered conversation, and of each text that a template makes on the way."""
MOST_SECONDS = 2.0
"""The most processor time of one rendering. Templates take milliseconds."""
MOST_POWER = 64
"""The largest exponent."""
MOST_NUMBER = 100_000
"""The largest number that a template gives to a filter, a method or a format: widths and counts decide how much is
made."""

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


class TemplateLimitError(Exception):
    """A template went beyond a limit."""


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose templates always end.

    These are limited: the length of the source; the time of a rendering, which every turn of a loop and every call
    checks; the length of its output; the length of each text or list that an operator, a filter, a call or a block
    gives, with its contents; and the numbers that filters and methods get. Not limited is the result of one filter or
    method on texts within these limits, because it is checked afterwards: `replace` can take gigabytes.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)  # so that no constant is computed without a deadline
        self.globals.pop("lipsum")
        self.filters = {name: self._limited(function) for name, function in self.filters.items()}
        self.filters["_checked"] = self.checked

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        if len(source) > MOST_SOURCE:
            raise TemplateLimitError(f"it has {len(source):,} characters, and the limit is {MOST_SOURCE:,}")
        template = super()._parse(source, name, filename)
        bodies = [loop.body for loop in template.find_all(jinja2.nodes.For)]
        for body in (*bodies, *(macro.body for macro in template.find_all(jinja2.nodes.Macro))):
            body.insert(0, jinja2.nodes.ExprStmt(self._call("tick", [], template.lineno), lineno=template.lineno))
        for block in template.find_all(jinja2.nodes.AssignBlock):
            block.filter = jinja2.nodes.Filter(block.filter, "_checked", [], [], None, None, lineno=block.lineno)
        self._check_literals(template)
        template.set_environment(self)
        return template

    def _check_literals(self, node: jinja2.nodes.Node) -> None:
        """Send every `a ~ b` through `joined`, and every list, tuple and dict through `checked`."""
        for child in node.iter_child_nodes():
            self._check_literals(child)
        for field, value in node.iter_fields():
            if isinstance(value, jinja2.nodes.Node):
                setattr(node, field, self._literal_checked(value))
            elif isinstance(value, list):
                value[:] = [self._literal_checked(part) for part in value]

    def _literal_checked(self, value: Any) -> Any:
        if isinstance(value, jinja2.nodes.Concat):
            return self._call("joined", value.nodes, value.lineno)
        loaded = getattr(value, "ctx", "load") == "load"  # a tuple can also be the target of an assignment
        if isinstance(value, jinja2.nodes.List | jinja2.nodes.Tuple | jinja2.nodes.Dict) and loaded:
            return self._call("checked", [value], value.lineno)
        return value

    @staticmethod
    def _call(method: str, arguments: list[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Call:
        attribute = jinja2.nodes.EnvironmentAttribute(method, lineno=line)
        return jinja2.nodes.Call(attribute, arguments, [], None, None, lineno=line)

    def tick(self) -> None:
        """Check the time.

        Raises:
            TemplateLimitError: the time is over.
        """
        if time.thread_time() > _deadline.get():
            raise TemplateLimitError(f"it takes longer than {MOST_SECONDS:.0f} seconds")

    def joined(self, *parts: Any) -> str:
        """The texts of `parts`, one after another."""
        texts = [str(part) for part in parts]
        self.check_length(sum(map(len, texts)))
        return "".join(texts)

    def checked(self, value: Any) -> Any:
        """`value`, if it is not too long."""
        self.tick()
        self.check_length(total_length(value, {}))
        return value

    @staticmethod
    def check_numbers(arguments: Iterable[Any]) -> None:
        """Check numbers that decide how much is made.

        Raises:
            TemplateLimitError: one is too large.
        """
        for number in arguments:
            if isinstance(number, int) and abs(number) > MOST_NUMBER:
                raise TemplateLimitError(f"it uses the number {number}, and the limit is {MOST_NUMBER:,}")

    @staticmethod
    def check_length(length: int) -> None:
        """Check the length of a value.

        Raises:
            TemplateLimitError: it is too long.
        """
        if length > MOST_TEXT:
            raise TemplateLimitError(f"it writes {length:,} characters, and the limit is {MOST_TEXT:,}")

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # with the marks of what jinja2 passes to it
        def limited(*arguments: Any, **options: Any) -> Any:
            self.check_numbers((*arguments[1:], *options.values()))
            return self.checked(function(*arguments, **options))

        return limited

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, within the limits."""
        self.filters[name] = self._limited(function)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result can be much larger than its inputs."""
        self.tick()
        sized = [len(part) for part in (left, right) if isinstance(part, str | bytes | list | tuple)]
        if operator == "+" and len(sized) == 2:
            self.check_length(sum(sized))
        elif operator == "*" and sized:
            count = next((part for part in (left, right) if isinstance(part, int)), 0)
            self.check_length(sized[0] * max(0, count))
        elif operator == "**" and isinstance(right, int | float) and abs(right) > MOST_POWER:
            raise TemplateLimitError(f"it uses the exponent {right}, and the limit is {MOST_POWER}")
        elif operator == "%" and isinstance(left, str):
            self.check_numbers(map(int, re.findall(r"\d{6,}", left)))
            self.check_numbers(right if isinstance(right, tuple) and "*" in left else ())
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            self.check_length(left.bit_length() + right.bit_length())
        return self.checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call a function, a method or a macro."""
        self.tick()
        if isinstance(getattr(function, "__self__", None), str | bytes):
            self.check_numbers((*arguments, *options.values()))
        return self.checked(super().call(context, function, *arguments, **options))

    def render(self, template: jinja2.Template, names: Mapping[str, Any]) -> str:
        """Render a template of this environment.

        Raises:
            TemplateLimitError: it goes beyond a limit. Its program may raise any other exception.
        """
        pieces, length = [], 0
        with deadline():
            for piece in template.generate(names):
                length += len(piece)
                self.check_length(length)
                self.tick()
                pieces.append(piece)
        return "".join(pieces)


def total_length(value: Any, known: dict[int, int]) -> int:
    """Characters and entries of a value with its contents. Contents that are there twice count twice.

    known: results for other values, by id.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 1
    if id(value) not in known:
        inner = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
        known[id(value)] = len(value) + sum(total_length(part, known) for part in inner)
    return known[id(value)]


@contextmanager
def deadline() -> Iterator[None]:
    """The time at which a rendering must end."""
    token = _deadline.set(time.thread_time() + MOST_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)
