"""Reads what a checkpoint's config.json says about its quantisation."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ivc_export.checkpoint.folder import CONFIG, Checkpoint
from ivc_export.errors import UserError

KEY = "quantization_config"
OTHER = "give another checkpoint of the model, or the one that it was made from"


@dataclass(frozen=True)
class Stated:
    """Settings of one quantisation. place, title: names of the checkpoint and the format for users."""

    place: str
    title: str
    settings: Mapping[str, Any]

    def value(self, key: str, known: Collection[Any], default: Any = None) -> Any:
        """One setting, or `default` if it is missing or null.

        Raises:
            UserError: this version does not support the value.
        """
        found = self.settings.get(key)
        found = default if found is None else found
        if not any(type(found) is type(one) and found == one for one in known):
            raise self.unknown(key, found, f"{key} {' or '.join(text(one) for one in known)}")
        return found

    def group(self, key: str = "group_size") -> int | None:
        """How many values of a row share a scale. None for the whole row.

        Raises:
            UserError: it is not such a number.
        """
        found = self.settings.get(key)
        if type(found) is not int or (found < 1 and found != -1):
            raise self.unknown(key, found, f"a {key} of 16 and more, or -1")
        return None if found == -1 else found

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts. Empty if it is missing.

        Raises:
            UserError: it is not a list of texts.
        """
        found = self.settings.get(key)
        found = [] if found is None else found
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise self.unknown(key, found, f"a list of names as {key}")
        return tuple(found)

    def part(self, key: str) -> Stated:
        """The settings within one of them.

        Raises:
            UserError: it is not an object.
        """
        found = self.settings.get(key)
        if not isinstance(found, Mapping):
            raise self.unknown(key, found, f"an object as {key}")
        return Stated(self.place, self.title, found)

    def unknown(self, key: str, found: Any, known: str) -> UserError:
        """The sentence on a setting that this version does not support."""
        return UserError(
            f"{self.place} is quantised ({self.title}, with {key} {text(found)}), but this version reads {self.title} "
            f"with {known}: {OTHER}"
        )


def text(value: Any) -> str:
    """A value as part of a sentence: short, and on one line."""
    shown = "missing" if value is None else repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def stated(checkpoint: Checkpoint, method: str, title: str) -> Stated | None:
    """The settings in config.json, if they name this `quant_method`.

    Raises:
        UserError: config.json describes another quantisation too.
    """
    config = checkpoint.config
    parts = [part.get(KEY) for part in (config, *config.values()) if isinstance(part, Mapping)]
    found = [part for part in parts if isinstance(part, Mapping) and part]
    named = [part for part in found if part.get("quant_method") == method]
    if not named:
        return None
    if any(part != named[0] for part in found):
        raise UserError(
            f"{checkpoint.place} is quantised in two ways, by {KEY} of {CONFIG} and of a part of it, but this version "
            f"reads only one: {OTHER}"
        )
    return Stated(checkpoint.place, title, named[0])


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a layer: its name, a part of it between dots, or `re:` and a regular expression."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error:
            return False
    return f".{pattern}." in f".{name}."


def in_decoder(layer: str, left_out: Iterable[str] = ()) -> bool:
    """Whether a canonical name is that of a decoder layer's product, and is not left out."""
    names = (layer, f"model.language_model.{layer.removeprefix('model.')}", f"language_model.{layer}")
    return layer.startswith("model.layers.") and not any(matches(n, p) for n in names for p in left_out)
