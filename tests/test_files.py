"""Reading files that others may have written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ivc_export.errors import UserError
from ivc_export.files import MOST_BYTES, MOST_DEPTH, read_json, read_object


def write(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text)


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (sparse, "but the limit for this file is 16.8 MB"),
        (write(b" " * (MOST_BYTES + 1)), "but the limit for this file is 16.8 MB"),
        (write(b"\xff\xfe"), "it is not UTF-8"),
        (write(""), "is not valid JSON"),
        (write('{"a": 1,}'), "is not valid JSON"),
        (write("9" * 5000), "is not valid JSON"),
        (write('["\\ud800"]'), "is not valid JSON"),
        (write('{"\\uDC00\\ud83d": 1}'), "is not valid JSON"),
        (write("[" * 200_000), "is nested too deep"),
        (write("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1)), "is nested too deep"),
        (write('{"a":' * 100 + "1" + "}" * 100), "is nested too deep"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_a_sentence(
    tmp_path: Path, make: Callable[[Path], object], told: str
) -> None:
    make(tmp_path / "file")
    with pytest.raises(UserError, match=told) as caught:
        read_json(tmp_path / "file", "make it again")
    assert str(caught.value).endswith(": make it again")


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": [1, {"b": null}], "c": "\\u00e9\\ud83d\\ude00"}', encoding="utf-8")
    assert read_object(path, "") == {"a": [1, {"b": None}], "c": "é😀"}
    path.write_text("[" * MOST_DEPTH + "]" * MOST_DEPTH, encoding="utf-8")
    assert read_json(path, "")
    with pytest.raises(UserError, match="should hold a JSON object"):
        read_object(path, "make it again")
