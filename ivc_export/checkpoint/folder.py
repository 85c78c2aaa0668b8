"""A checkpoint folder in Hugging Face's layout: its JSON files and its tensors, read lazily."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ivc_export.dtypes import FLOATS, STORED
from ivc_export.errors import UserError
from ivc_export.files import check_regular, parse_json, read_object, read_text

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-(?P<all>\d+)\.safetensors")
STORED_NAMES: dict[str, str] = {name: one.stored for name, one in FLOATS.items()}
_NAMES = {stored: name for name, stored in STORED_NAMES.items()}
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: `length` bytes at byte `offset` of `file`, row-major."""

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    def bytes_of(self, size: int) -> Iterator[bytes]:
        """Its bytes, `size` at a time.

        Raises:
            UserError: the file ends early.
        """
        with self.file.open("rb") as reader:
            reader.seek(self.offset)
            for start in range(0, self.length, size):
                stored = reader.read(min(self.length - start, size))
                if len(stored) != min(self.length - start, size):
                    raise UserError(f"{self.file} became shorter during the export: download it again")
                yield stored

    def rows(self, size: int = 1 << 22) -> Iterator[npt.NDArray[Any]]:
        """Its values in pieces of `size` bytes or one row: [rows, ...]. Its dtype must be one of dtypes.STORED.

        Raises:
            UserError: the file ends early.
        """
        one = max(1, self.length // max(1, math.prod(self.shape[:1])))
        for stored in self.bytes_of(max(1, size // one) * one):
            yield np.frombuffer(stored, STORED[self.dtype].numpy()).reshape(-1, *self.shape[1:])


HEADER_BYTES = 100_000_000
"""The most bytes of a safetensors header, as in the format's own library."""


def header_bytes(file: Path) -> bytes:
    """The JSON header of a safetensors file, as stored. It is shorter than stated if the file, or the limit, ends
    earlier."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(min(size, file.stat().st_size, HEADER_BYTES))


def header_sha256(file: Path) -> str:
    """SHA-256 of the header: names, dtypes, shapes and offsets of every tensor, but not their values."""
    return hashlib.sha256(header_bytes(file)).hexdigest()


def read_index(file: Path, advice: str = "download it again, or check the disk") -> dict[str, StoredTensor]:
    """Tensors of one safetensors file by name. advice: what to do if it is damaged; it ends the error's sentence.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file.
    """
    check_regular(file, "download the whole checkpoint")
    with file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise UserError(f"{file} is a Git LFS pointer, not the file itself: run git lfs pull in its folder")
    try:
        with safe_open(file, framework="numpy"):  # checks lengths, overlaps and the end of the file
            stored = header_bytes(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): {advice}") from error
    header, start = parse_json(stored, f"the header of {file}", "download it again"), 8 + len(stored)
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            name,
            file,
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            _NAMES.get(entry["dtype"], entry["dtype"]),
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint folder."""

    folder: Path

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Open `folder`.

        Raises:
            UserError: it is not a folder, or has no config.json.
        """
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder: give a checkpoint folder with config.json and safetensors files"
            )
        if not (folder / CONFIG).is_file():
            inner = sorted(
                path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/{CONFIG}")
            )
            there = (
                f", but {inner[0]} has one: give that folder"
                if inner
                else ": give a checkpoint folder in Hugging Face's layout"
            )
            raise UserError(f"{folder} has no {CONFIG}{there}")
        return Checkpoint(folder)

    @property
    def place(self) -> str:
        """The name by which the user knows the checkpoint."""
        return str(self.folder)

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the files and folders in it. If it is a file, its own name."""
        found = self.folder.iterdir() if self.folder.is_dir() else [self.folder]
        return frozenset(path.name for path in found)

    def text(self, name: str) -> str | None:
        """The content of a text file of the folder, or None if there is none.

        Raises:
            UserError: see read_text.
        """
        path = self.folder / name
        return read_text(path, "download it again") if path.exists() else None

    def json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file of the folder, or None if there is none.

        Raises:
            UserError: see read_object.
        """
        path = self.folder / name
        return read_object(path, "download it again") if path.exists() else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.json("config.json") or {}

    @cached_property
    def shards(self) -> dict[str, str] | None:
        """For each tensor, the name of its file, from the index. None if all tensors are in one file.

        Raises:
            UserError: the index is damaged, or names something that is not a file beside it.
        """
        index = None if SINGLE in self.names else self.json(INDEX)
        if index is None:
            return None
        weight_map = index.get("weight_map")
        named = weight_map.values() if isinstance(weight_map, dict) else ()
        if not isinstance(weight_map, dict) or not named or not all(isinstance(name, str) for name in named):
            raise UserError(f"{self.place}: {INDEX} names no shards: download it again")
        for name in named:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"{self.place}: {INDEX} names {name[:80]!r}, which is not a safetensors file beside it: "
                    "download it again"
                )
        return weight_map

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files: one file, or the shards that the index names.

        Raises:
            UserError: see shards; or there are shards without an index.
        """
        named = set((self.shards or {}).values())
        numbered = {name: match["all"] for name in self.names | named if (match := _SHARD.fullmatch(name))}
        counts = {numbered[name] for name in named & set(numbered)}
        stray = [name for name, count in numbered.items() if name not in named and (count in counts or not named)]
        if stray and SINGLE not in self.names:
            raise UserError(
                f"{self.place} holds {min(stray)}, and no {INDEX} names it: download both again, into one folder"
            )
        return [self.folder / name for name in sorted(named or {SINGLE})]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the checkpoint by its stored name.

        Raises:
            UserError: see weight_files and read_index; or two files contain the same tensor.
        """
        found: dict[str, StoredTensor] = {}
        for file in self.weight_files:
            for name, tensor in read_index(file).items():
                if name in found:
                    raise UserError(
                        f"{found[name].file.name} and {file.name} of {self.place} both hold {name[:80]!r}: download "
                        "the checkpoint again, into an empty folder"
                    )
                found[name] = tensor
        return found
