"""Makes a report that a user can post. It contains no path of the user's machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.tensorrt.store import FOLDER, RECORD, read_record


def posted(content: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
    """A bench report with the records (build.json) of the bundle's engines, by their folder. Only last names of paths
    are left.

    content: of `entrants.report`. A record that this version cannot read is replaced by a sentence.
    """
    words = shlex.split(content["command"])
    engines: dict[str, Any] = {}
    for path in sorted((bundle.folder / FOLDER).glob(f"*/{RECORD}")):
        try:
            record = json.loads(read_record(path, "build them again").model_dump_json())
        except UserError:
            engines[path.parent.name] = f"{RECORD} cannot be read"
            continue
        recipe = {key: last_name(value) if key in PATHS and value else value for key, value in record["recipe"].items()}
        engines[path.parent.name] = record | {"recipe": recipe}
    return {**content, "command": shlex.join(map(last_name, words)), "engines": engines}


PATHS = ("plugin", "timing_cache")
"""Fields of a recipe that are paths."""


def last_name(word: str) -> str:
    """The last name of a path, also behind `--option=`. Text without a folder stays unchanged."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if "/" in value and value.strip("/") else value)
