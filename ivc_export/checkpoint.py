"""A checkpoint folder in Hugging Face's layout: its JSON files and its tensors, read lazily."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ivc_export.errors import UserError
from ivc_export.files import check_regular, parse_json, read_object, read_text

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED_NAMES = {ours: stored for stored, ours in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `length` bytes at byte `offset` of `file`, row-major."""

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


HEADER_BYTES = 100_000_000
"""Of a safetensors header at most, as the format's own library has it."""


def header_bytes(file: Path) -> bytes:
    """The JSON header of a safetensors file, as stored; less than it says where the file, or the limit, ends before."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(min(size, file.stat().st_size, HEADER_BYTES))


def header_sha256(file: Path) -> str:
    """SHA-256 of the header: names, dtypes, shapes and offsets of every tensor, but not their values."""
    return hashlib.sha256(header_bytes(file)).hexdigest()


def read_index(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file by name.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file.
    """
    check_regular(file, "download the whole checkpoint")
    try:
        with safe_open(file, framework="numpy"):  # checks lengths, overlaps and the end of the file
            stored = header_bytes(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): download it again, or check the disk") from error
    header, start = parse_json(stored, f"the header of {file}", "download it again"), 8 + len(stored)
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            name,
            file,
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            _DTYPES.get(entry["dtype"], entry["dtype"]),
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
            UserError: it is no folder, or has no config.json.
        """
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder: give a checkpoint folder with config.json and safetensors files"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json: give a checkpoint folder in Hugging Face's layout")
        return Checkpoint(folder)

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
    def weight_files(self) -> list[Path]:
        """The safetensors files: one, or else the shards that the index names."""
        single, index = self.folder / "model.safetensors", self.json("model.safetensors.index.json")
        if index is None or single.is_file():
            return [single]
        weight_map = index.get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not shards or not all(isinstance(name, str) for name in shards):
            raise UserError(f"{self.folder / 'model.safetensors.index.json'} names no shards: download it again")
        return [self.folder / Path(name).name for name in sorted(shards)]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the checkpoint by its stored name."""
        return {name: tensor for file in self.weight_files for name, tensor in read_index(file).items()}
