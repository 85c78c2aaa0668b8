"""The base class of all records of the contract, and the bounds of their numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

INT32_MOST = 2**31 - 1
Depth = Annotated[int, Field(gt=0, le=1000)]
"""A number of layers."""
Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Channels of a layer. The bound is many times that of any real model, and products of two fit into 64 bits."""
Heads = Annotated[int, Field(gt=0, le=4096)]
Count = Annotated[int, Field(gt=0, le=INT32_MOST)]
"""A number of tokens, positions or pixels, which graphs and runtimes store in int32."""
SideLength = Annotated[int, Field(gt=0, le=16384)]
"""Pixels along a side."""
Tiles = Annotated[int, Field(gt=0, le=256)]
"""Tiles of a picture. All shapes of so many tiles are tried for each picture."""
Seed = Annotated[int, Field(ge=0, le=INT32_MOST)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MOST)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(ge=1e-9, le=1e9)]
"""A factor or divisor of pixels, neither zero nor infinite in float32."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Level = Annotated[float, Field(ge=-1e9, le=1e9)]
"""A number that is subtracted from pixels."""


class Frozen(BaseModel):
    """Base of every record: immutable, and no field that the schema does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


UNIONS = ("selection", "preprocessing")
"""Fields with one of several records. pydantic writes the record's kind behind the names of such fields."""


def first_problem(error: Exception) -> str:
    """An exception in one line: a validation error's first field and what is wrong with it, or the message."""
    if not isinstance(error, ValidationError):
        return str(error)
    detail = error.errors()[0]
    behind = (None, *detail["loc"])
    names = [str(name) for name, field in zip(detail["loc"], behind, strict=False) if field not in UNIONS]
    return f"{'.'.join(names)}: {detail['msg']}"
