from __future__ import annotations

from pathlib import Path

import pytest

from tools.cpp_doc import undocumented
from tools.figures import REGION, TABLES, filled, opening, pages_with_figures
from tools.generate import ROOT, generated
from tools.manifest_doc import undocumented as undocumented_fields
from tools.results import table

FILES = generated()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_files_are_true(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == FILES[path], "run `make generate`, and read what changed"


def test_no_listing_is_left_over() -> None:
    assert {*(ROOT / "graphs" / "listings").iterdir()} <= {*FILES}


def test_every_function_of_the_headers_says_what_it_does() -> None:
    assert undocumented() == []


def test_every_table_of_figures_is_on_a_page() -> None:
    named = [name for text in pages_with_figures().values() for name in REGION.findall(text)]
    assert {*named} == {*TABLES}


def test_a_table_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "some", lambda: table("a | b", [[1, 2.5]]))
    old = f"before\n{opening('some')}\n\n| a | b |\n\n<!-- end -->\nbehind\n"
    assert (
        filled(old) == f"before\n{opening('some')}\n\n| a | b |\n| --- | --- |\n| 1 | 2.5 |\n\n<!-- end -->\nbehind\n"
    )


def test_a_table_that_nothing_makes_is_seen() -> None:
    with pytest.raises(KeyError):
        filled(f"{opening('nothing')}\n<!-- end -->")


def test_every_field_of_the_manifest_says_what_it_means() -> None:
    assert undocumented_fields() == []
