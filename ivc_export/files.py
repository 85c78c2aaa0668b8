"""Files that others may have written: regular ones, of limited size, and a sentence where they are not as they should.

advice, throughout: what the user can do, which ends the sentence.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from ivc_export.errors import UserError

MOST_BYTES = 16 << 20
"""The most bytes of a file that is read whole: many times the largest config.json or index, but few enough to parse
anywhere."""
MOST_DEPTH = 64
"""The deepest nesting of objects and lists."""
HALVES = re.compile(r"\\u[dD][89a-fA-F]")
"""Escapes that are halves of a character."""


def check_regular(path: Path, advice: str) -> int:
    """Check that `path` is a regular file, so that reading ends, and return its size in bytes.

    Raises:
        UserError: there is nothing, or a folder, a pipe or a device, or it cannot be read.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} is missing: {advice}") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise UserError(f"{path} cannot be read ({error}): {advice}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file: {advice}")
    return status.st_size


def confined(folder: Path, name: str, advice: str) -> Path:
    """The path of the file `name` of a bundle in `folder`, whether or not it exists.

    Raises:
        UserError: the name, or a link on the way, leaves the folder.
    """
    path = folder / name
    try:
        real = path.resolve()
        inside = (
            real.is_relative_to(folder.resolve()) and not real.is_symlink()
        )  # links in circles, from Python 3.13 on
    except (OSError, ValueError, RuntimeError):  # the same before, and zero bytes
        inside = False
    if not inside:
        raise UserError(
            f"{folder} names {name!r}, which is outside the bundle or a link to a place outside it: {advice}"
        )
    return path


def read_bytes(path: Path, advice: str, most: int = MOST_BYTES) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        UserError: it is not such a file, is larger, or cannot be read.
    """
    size = check_regular(path, advice)
    if size > most:
        raise UserError(f"{path} has {decimal(size)}, but the limit for this file is {decimal(most)}: {advice}")
    try:
        with path.open("rb") as stream:
            return stream.read(most)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}") from error


def read_text(path: Path, advice: str, most: int = MOST_BYTES) -> str:
    """Read a regular file of UTF-8 text.

    Raises:
        UserError: see read_bytes; or it is not UTF-8.
    """
    try:
        return read_bytes(path, advice, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged (it is not UTF-8 text): {advice}") from error


def read_json(path: Path, advice: str, most: int = MOST_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        UserError: see read_text and parse_json.
    """
    return parse_json(read_text(path, advice, most), str(path), advice)


def read_object(path: Path, advice: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON file with an object.

    Raises:
        UserError: see read_json; or it has another value.
    """
    content = read_json(path, advice, most)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it should hold a JSON object): {advice}")
    return content


def parse_json(text: str | bytes, what: str, advice: str) -> Any:
    """Parse JSON, with NaN and Infinity as Python writes them, nested at most MOST_DEPTH deep.

    what: names the text in errors.

    Raises:
        UserError: it is not JSON, is nested deeper, has halves of characters, or does not fit into memory.
    """
    try:
        content = json.loads(text)
        if HALVES.search(text if isinstance(text, str) else text.decode(json.detect_encoding(text))):
            json.dumps(content, ensure_ascii=False).encode()  # unpaired halves are not text: a ValueError
    except ValueError as error:
        raise UserError(f"{what} is damaged (it is not valid JSON: {error}): {advice}") from error
    except RecursionError as error:
        raise UserError(f"{what} is damaged (it is nested too deep): {advice}") from error
    except MemoryError as error:
        raise UserError(f"{what} does not fit into memory: {advice}") from error
    level = [content]
    for _ in range(MOST_DEPTH):
        level = [part for whole in level for part in parts(whole)]
        if not level:
            return content
    raise UserError(f"{what} is damaged (it is nested too deep): {advice}")


def parts(value: Any) -> list[Any]:
    """The values of a list or an object that are lists or objects themselves."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in inner if isinstance(part, dict | list)]


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step. It replaces `path` itself, never the target of a link, and is never half-written.

    Raises:
        OSError: nothing can be written there.
    """
    descriptor, staged = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            os.fchmod(descriptor, 0o666 & ~current_umask())
        Path(staged).replace(path)
    except BaseException:
        Path(staged).unlink()
        raise


def current_umask() -> int:
    """The process's mask of permissions, which can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
