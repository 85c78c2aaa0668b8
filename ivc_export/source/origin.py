"""Reads a model's card: its licence and tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.contract.origin import Origin
from ivc_export.source.hub import HubCheckpoint

CARD = "README.md"
MOST_CARD = 1 << 20
"""The most bytes of a card."""
SAID = ("license", "license_name", "license_link")


def find_origin(checkpoint: Checkpoint) -> Origin:
    """The model on the hub that a checkpoint is (the hub is asked for details later), or the details in a folder's
    card."""
    if isinstance(checkpoint, HubCheckpoint):
        return Origin(repo=checkpoint.repo, **valid({"commit": checkpoint.folder.name}))
    return Origin(**card_facts(folder_card(checkpoint)))


def completed(origin: Origin) -> Origin:
    """An origin with the details of its model's card on the hub. It stays unchanged if the hub does not tell them."""
    if origin.repo is None or origin.license is not None:
        return origin
    import huggingface_hub

    try:
        data = huggingface_hub.HfApi().model_info(origin.repo, revision=origin.commit).card_data
    except Exception:  # the hub's library and those below it share no base class
        return origin
    return origin.model_copy(update=card_facts({} if data is None else vars(data)))


def folder_card(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The metadata of a checkpoint folder's card. Empty if there is none, or if it cannot be read."""
    path = checkpoint.folder / CARD
    if not path.is_file() or path.stat().st_size > MOST_CARD:
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # YAML can be wrong in many ways, and no model depends on its card
        return {}


def card_facts(card: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a card that an Origin has, as far as they are valid."""
    found = valid({name: card.get(name) for name in SAID})
    tags = card.get("tags")
    if isinstance(tags, list):
        found["tags"] = tuple(tag for tag in tags[:50] if isinstance(tag, str) and valid({"license": tag}))
    return found


def valid(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an Origin whose values are valid, without None."""
    found = {}
    for name, value in fields.items():
        try:
            Origin.model_validate({name: value})
        except ValidationError:
            continue
        found[name] = value
    return {name: value for name, value in found.items() if value is not None}
