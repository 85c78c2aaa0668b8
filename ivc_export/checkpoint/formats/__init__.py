"""The registry of weight formats. A new format is one file beside this one, and one line in FORMATS."""

from __future__ import annotations

from collections.abc import Callable

from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.checkpoint.formats.floats import FLOAT
from ivc_export.checkpoint.formats.weight_format import WeightFormat

FORMATS: dict[str, Callable[[Checkpoint], WeightFormat | None]] = {}
"""What finds a format in a checkpoint's JSON files, by the name that manifests have for the format."""


def detect_format(checkpoint: Checkpoint) -> WeightFormat:
    """How a checkpoint stores its linear layers, as its JSON files say: as floats where no format knows it.

    Raises:
        UserError: a file is damaged, or a format does not know its settings.
    """
    found = (find(checkpoint) for find in FORMATS.values())
    return next((one for one in found if one is not None), FLOAT)


def has_format(name: str) -> bool:
    """Whether this version has a weight format of this name."""
    return name == FLOAT.name or name in FORMATS
