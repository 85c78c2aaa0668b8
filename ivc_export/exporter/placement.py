"""Places the checkpoint's weight files into a bundle: copies, hard-links or converts them.

Tensors that a weight format derives are computed on the way, one piece at a time. They go into the file of their first
source.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.filesize import decimal

from ivc_export import dtypes
from ivc_export.checkpoint.folder import STORED_NAMES, StoredTensor, header_bytes, header_sha256
from ivc_export.checkpoint.formats.weight_format import DerivedTensor, Source
from ivc_export.checkpoint.weights import FOLDER, Weights
from ivc_export.contract.manifest import WeightFile
from ivc_export.dtypes import FLOATS, STORED, FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.recipe import Placing

ByteProgress = Callable[[int, int], None]
"""Called with the bytes done so far and their total."""

_CHUNK = 1 << 22
_WRITE = 1 << 14
"""How many bytes are written at once. For large writes Linux looks for large pieces of free memory, which takes 5 times
as long."""
_LAG = 64
"""How many pieces hashing may be behind a copy. Neither waits for the other, and the pieces are still in memory."""


@dataclass(frozen=True)
class FileConversion:
    """A weight file with other tensors or dtypes. tensors: the source and the new form of each, in their order."""

    header: bytes
    tensors: tuple[tuple[Source, StoredTensor], ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(after.length for _, after in self.tensors)


def plan_conversions(
    tensors: Iterable[StoredTensor], dtype: FloatName | None, derived: Iterable[DerivedTensor] = ()
) -> dict[Path, FileConversion]:
    """Plan new layouts for the files that contain floats of other dtypes than `dtype`, unless it is None. Other files
    stay.

    derived: tensors that go into the file of their first source, and replace all of their sources.
    """
    derived = list(derived)
    by_file: dict[Path, list[Source]] = {}
    replaced = {(source.file, source.name) for tensor in derived for source in tensor.sources}
    anew = {file for file, _ in replaced}
    for tensor in sorted(tensors, key=lambda t: t.offset):
        kept = by_file.setdefault(tensor.file, [])
        if (tensor.file, tensor.name) not in replaced:
            kept.append(tensor)
        if dtype is not None and tensor.dtype in FLOATS and tensor.dtype != dtype:
            anew.add(tensor.file)
    for one in derived:
        by_file[one.file].append(one)
    return {file: lay_out(file, sources, dtype) for file, sources in by_file.items() if file in anew}


def lay_out(file: Path, sources: Sequence[Source], dtype: FloatName | None) -> FileConversion:
    """The new layout of a file with these tensors, floats in `dtype`, or in their own dtype for None.

    Tensors keep their order, unless some are derived. Then wider numbers come first, so that all are at multiples of
    their size. Source: the safetensors format; its header is padded with spaces to a multiple of 8 bytes.
    """
    if any(isinstance(source, DerivedTensor) for source in sources):
        sources = sorted(sources, key=lambda source: -width(source, dtype))
    after: list[StoredTensor] = []
    start = 0
    for source in sources:
        length, kind = source.length, source.dtype
        if dtype is not None and kind in FLOATS:
            length, kind = math.prod(source.shape) * FLOATS[dtype].bytes, dtype
        after.append(StoredTensor(source.name, file, start, length, kind, source.shape))
        start += length
    header: dict[str, Any] = {
        t.name: {
            "dtype": STORED_NAMES.get(t.dtype, t.dtype),
            "shape": t.shape,
            "data_offsets": (t.offset, t.offset + t.length),
        }
        for t in after
    }
    metadata = json.loads(header_bytes(file)).get("__metadata__")
    content = json.dumps(({"__metadata__": metadata} if metadata else {}) | header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    head = len(content).to_bytes(8, "little") + content
    return FileConversion(
        head, tuple((old, replace(new, offset=new.offset + len(head))) for old, new in zip(sources, after, strict=True))
    )


def width(source: Source, dtype: FloatName | None) -> int:
    """Size in bytes of one of its numbers, floats in `dtype`."""
    if dtype is not None and source.dtype in FLOATS:
        return FLOATS[dtype].bytes
    return source.length // max(1, math.prod(source.shape))


def converted_weights(weights: Weights, conversions: Mapping[Path, FileConversion], dtype: FloatName | None) -> Weights:
    """The same weights at the places that `conversions` gives them, in `dtype`, or in their own dtype for None. Derived
    tensors are stored."""
    moved = {(old.file, old.name): new for conversion in conversions.values() for old, new in conversion.tensors}
    stored = {name: moved.get((t.file, t.name), t) for name, t in weights.tensors.items()}
    written = {name: moved[t.file, t.name] for name, t in weights.derived.items()}
    return Weights(stored | written, dtype or weights.dtype, weights.formats, spare=weights.spare)


def place_weights(
    files: Iterable[Path],
    conversions: Mapping[Path, FileConversion],
    placing: Placing,
    folder: Path,
    progress: ByteProgress,
) -> tuple[WeightFile, ...]:
    """Bring the weight files to `folder`/weights under their own names. They are hashed while they are written.

    Raises:
        UserError: they cannot be linked, the disk is too small, or a value does not fit its new dtype.
    """
    files = [file for file in files if file not in conversions or conversions[file].tensors]
    target = folder / FOLDER
    target.mkdir()
    if placing == "link":
        if any(isinstance(source, DerivedTensor) for one in conversions.values() for source, _ in one.tensors):
            raise UserError(
                "weights in this checkpoint's format must be converted and cannot be linked: leave out --weights link"
            )
        if conversions:
            raise UserError("weights in another dtype cannot be linked: leave out --dtype, or --weights link")
        return tuple(link(file, target / file.name) for file in files)
    sizes = [conversions[file].size if file in conversions else file.stat().st_size for file in files]
    check_space(folder, sum(sizes))
    done, placed = 0, []
    for file, size in zip(files, sizes, strict=True):
        start, placed_file = done, target / file.name

        def advance(written: int, start: int = start) -> None:
            progress(start + written, sum(sizes))

        if file in conversions:
            sha256 = write_hashed(convert(conversions[file]), placed_file, advance)
        else:
            sha256 = copy_hashed(file, placed_file, advance)
        placed.append(weight_file(placed_file, sha256))
        done += size
    return tuple(placed)


def weight_file(file: Path, sha256: str | None) -> WeightFile:
    """A weight file's entry in the manifest."""
    return WeightFile(
        file=f"{FOLDER}/{file.name}", size=file.stat().st_size, header_sha256=header_sha256(file), sha256=sha256
    )


def link(source: Path, target: Path) -> WeightFile:
    """Hard-link the real file behind `source`: onnxruntime refuses external data behind a symbolic link.

    A file of the hub's cache has its SHA-256 as its name. For other files the hash is left out, because nothing is
    read.

    Raises:
        UserError: the file system cannot make hard links.
    """
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            reason = "the output is on another file system"
        elif error.errno == errno.EPERM:
            reason = "the file system has no hard links, or the file is another user's"
        else:
            reason = error.strerror or str(error)
        raise UserError(f"{real} cannot be linked ({reason}): use --weights copy, or another output") from error
    in_cache = real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name)
    return weight_file(target, real.name if in_cache else None)


def check_space(folder: Path, needed: int) -> None:
    """Check before the first byte that the disk has enough space.

    Raises:
        UserError: it is too small.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the weights need {decimal(needed)} and {folder.parent} has {decimal(free)} free: free some space, name "
            "another output, or use --weights link on the checkpoint's file system"
        )


def copy_hashed(source: Path, target: Path, progress: Callable[[int], None]) -> str:
    """Copy a file within the kernel. Return its SHA-256, which a second thread computes piece by piece.

    progress: called with the bytes copied so far.
    """
    digest, done, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))

    def add(descriptor: int, start: int, end: int) -> None:
        while start < end and (count := os.preadv(descriptor, [buffer[: end - start]], start)):
            digest.update(buffer[:count])
            start += count

    with source.open("rb") as reader, target.open("wb") as writer, ThreadPoolExecutor(1) as hashing:
        pending: deque[Future[None]] = deque()
        while count := os.sendfile(writer.fileno(), reader.fileno(), done, _CHUNK):
            pending.append(hashing.submit(add, reader.fileno(), done, done + count))
            if len(pending) > _LAG:
                pending.popleft().result()
            done += count
            progress(done)
        for piece in pending:
            piece.result()
    return digest.hexdigest()


def write_hashed(chunks: Iterator[memoryview], target: Path, progress: Callable[[int], None]) -> str:
    """Write `chunks` to `target` and return their SHA-256, computed in a second thread.

    progress: called with the bytes written so far.
    """
    digest, done = hashlib.sha256(), 0
    with target.open("wb", buffering=0) as writer, ThreadPoolExecutor(1) as hashing:
        pending = hashing.submit(digest.update, b"")
        for chunk in chunks:
            pending.result()
            pending = hashing.submit(digest.update, chunk)
            left = chunk
            while left:
                left = left[writer.write(left[:_WRITE]) :]  # a write may be cut short
            done += len(chunk)
            progress(done)
        pending.result()
    return digest.hexdigest()


def convert(conversion: FileConversion) -> Iterator[memoryview]:
    """The bytes of a file in its new layout, piece by piece.

    Raises:
        UserError: values are too large for float16, or the file ends early.
    """
    yield memoryview(conversion.header)
    for before, after in conversion.tensors:
        if isinstance(before, DerivedTensor):
            done = 0
            for values in before.pieces():
                assert values.dtype == STORED[before.dtype].numpy(), f"{before.name} has a piece of {values.dtype}"
                yield cast_piece(np.ascontiguousarray(values).reshape(-1), before, after)
                done += values.nbytes
            assert done == before.length, f"{before.name} has {done} bytes and not {before.length}"
        elif before.dtype in FLOATS:
            for stored in before.bytes_of(_CHUNK):
                yield cast_piece(np.frombuffer(stored, np.dtype(before.dtype)), before, after)
        else:
            yield from (memoryview(stored) for stored in before.bytes_of(_CHUNK))


def cast_piece(values: npt.NDArray[Any], before: Source, after: StoredTensor) -> memoryview:
    """The bytes of a piece of a tensor in its new dtype. values: one-dimensional.

    Raises:
        UserError: finite values become infinite.
    """
    if before.dtype in FLOATS:
        what = f"{before.name} in {before.file.name}"
        values = dtypes.cast(values, after.dtype, what, "use --dtype bfloat16 or float32")
    return values.view(np.uint8).data
