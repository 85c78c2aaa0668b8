"""The registry of families. Each family is one file, with the name of its config.json's `model_type`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from ivc_export.contract.manifest import Manifest
from ivc_export.errors import UserError
from ivc_export.families.encoder import Preparation
from ivc_export.families.family import Family

SENSES = ("vision", "visual", "image", "img", "mm_", "audio", "video")
"""Parts of the keys of a config.json whose model takes more than text."""


def names() -> tuple[str, ...]:
    """The model types that can be exported; each names its file in this folder."""
    return ("deepseek_vl_v2", "internvl", "internvl_chat", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")


def of(model_type: str | None) -> Family:
    """The family called `model_type`.

    Raises:
        UserError: there is none.
    """
    if model_type not in names():
        near = difflib.get_close_matches(str(model_type), names(), n=3, cutoff=0.5) or names()
        raise UserError(
            f"model type {model_type!r} of config.json is not supported: this version exports {', '.join(near)}"
        )
    family: Family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    return family


def preparation(manifest: Manifest) -> Preparation:
    """The code that prepares pictures for the bundle of this manifest.

    Raises:
        UserError: its family or the kind of its preprocessing is not known.
    """
    return of(manifest.family).pictures(manifest.preprocessing)


def described(config: Mapping[str, Any]) -> Family:
    """The family of the model that a config.json describes.

    Raises:
        UserError: there is none, the model's layout is not supported, or it takes no pictures.
    """
    for name in names():
        if (sentence := of(name).foreign(config)) is not None:
            raise UserError(sentence)
    model_type = config.get("model_type")
    sees = any(mark in key for key in config for mark in SENSES)
    if model_type not in names() and not sees and isinstance(config.get("hidden_size"), int):
        raise UserError(
            f"config.json describes a text-only model of type {model_type!r}, which has no visual tokens to prune: "
            f"give a vision-language model of type {', '.join(names())}"
        )
    return of(model_type)
