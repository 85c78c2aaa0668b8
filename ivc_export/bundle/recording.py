"""Stores the tensors of a run in a folder for programs in any language: raw little-endian files and a JSON index."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ivc_export.contract.manifest import Manifest
from ivc_export.errors import UserError
from ivc_export.files import check_regular, confined, read_object

INDEX = "index.json"
FORMAT = 1
DTYPES = ("float32", "int32")
"""Dtypes of recorded tensors."""


class Key(NamedTuple):
    """Names one tensor: the stage (prefill or decode step), the graph, and the tensor's name in the contract."""

    stage: str
    graph: str
    role: Literal["inputs", "outputs"]
    name: str

    @property
    def file(self) -> str:
        """The tensor's file within the folder."""
        return f"{self.stage}/{self.graph}/{self.role}/{self.name}.bin"


def identity(m: Manifest) -> dict[str, Any]:
    """Facts that a recorded run must share with the bundle that is compared with it."""
    return {
        "family": m.family,
        "dtype": m.dtype,
        "selection_layer": m.selection_layer,
        "method": m.selection.method,
        "weights": {file.file: file.header_sha256 for file in m.weights},
    }


@dataclass(frozen=True)
class Recording:
    """One recorded run. facts: what the index says besides the tensors, as plain data."""

    facts: Mapping[str, Any]
    tensors: Mapping[Key, npt.NDArray[Any]]

    def of(self, stage: str, graph: str, role: Literal["inputs", "outputs"] = "outputs") -> dict[str, npt.NDArray[Any]]:
        """The inputs or outputs of one graph in one stage, by name."""
        return {key.name: array for key, array in self.tensors.items() if key[:3] == (stage, graph, role)}

    def write(self, folder: Path) -> None:
        """Write to `folder`, which may exist. The index is written last, so a folder with an index is complete."""
        entries = []
        for key, array in self.tensors.items():
            path = folder / key.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
            entries.append({**key._asdict(), "dtype": str(array.dtype), "shape": array.shape, "file": key.file})
        facts = {"format": FORMAT, **self.facts}
        lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)},\n" for name, value in facts.items()]
        rows = ",\n".join(f" {json.dumps(entry)}" for entry in entries)
        (folder / INDEX).write_text("{\n" + "".join(lines) + f'"tensors": [\n{rows}\n]\n}}\n', encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Recording:
        """Read a folder that `write` wrote.

        Raises:
            UserError: the folder has no recording, or a damaged one, or one of another format.
        """
        try:
            facts = read_object(folder / INDEX, "record it again")
            if facts["format"] != FORMAT:
                raise UserError(f"{folder} is of another version of ivc-export: record it again")
            tensors = dict(read_tensor(folder, entry) for entry in facts.pop("tensors"))
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, MemoryError) as error:
            raise UserError(f"{folder} holds an incomplete recording ({error}): record it again") from error
        return Recording(facts, tensors)


def read_tensor(folder: Path, entry: Mapping[str, Any]) -> tuple[Key, npt.NDArray[Any]]:
    """Read a tensor of a recording in `folder`. entry: its entry in the index.

    Raises:
        UserError: its file is missing, or outside the folder.
        ValueError, KeyError, TypeError, OverflowError: the entry is damaged, or the file has another size.
    """
    key = Key(entry["stage"], entry["graph"], entry["role"], entry["name"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{key.file} is of dtype {entry['dtype']!r}")
    dtype, shape = np.dtype(entry["dtype"]).newbyteorder("<"), tuple(map(int, entry["shape"]))
    path = confined(folder, key.file, "record it again")
    size, wanted = check_regular(path, "record it again"), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != wanted:
        raise ValueError(f"{key.file} has {size} bytes, but the index says {wanted}")
    return key, np.fromfile(path, dtype).reshape(shape)
