"""origin.json: the model from which a bundle was made, for people. No run depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from ivc_export.contract.records import Frozen, first_problem
from ivc_export.errors import UserError
from ivc_export.files import read_object

ORIGIN = "origin.json"
ADVICE = "export the model again"

Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


class Origin(Frozen):
    """A model on the hub, and its card's statements. None for what is not known."""

    repo: Annotated[str, Field(max_length=200, pattern=r"^\w[\w.-]*/\w[\w.-]*$")] | None = None
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    license: Line | None = None
    license_name: Line | None = None
    license_link: Line | None = None
    """What `license: other` means."""
    tags: tuple[Line, ...] = Field(default=(), max_length=50)


def read_origin(folder: Path) -> Origin:
    """Read the origin of the bundle in `folder`. It is empty if the bundle has none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / ORIGIN
    if not path.exists():
        return Origin()
    try:
        return Origin.model_validate(read_object(path, ADVICE))
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}): {ADVICE}") from error
