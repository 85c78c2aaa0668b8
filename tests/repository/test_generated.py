from __future__ import annotations

from pathlib import Path

import pytest

from tools.cpp_doc import undocumented
from tools.generate import ROOT, generated

FILES = generated()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_files_are_true(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == FILES[path], "run `make generate`, and read what changed"


def test_no_listing_is_left_over() -> None:
    assert {*(ROOT / "graphs" / "listings").iterdir()} <= {*FILES}


def test_every_function_of_the_headers_says_what_it_does() -> None:
    assert undocumented() == []
