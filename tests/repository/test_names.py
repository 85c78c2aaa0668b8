"""Nobody takes tensors' names apart but the contract: a pass or a runtime asks for a name's role, kind and layer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APART = frozenset(("contract", "graph"))
"""Folders of the package that may know how names are made."""

CACHE = r"""["'](past|new|compact|present)(_|["'])"""
PATTERNS = (
    rf"\.(startswith|removeprefix|replace|partition|split|index|find|count)\(\(?{CACHE}",
    r"""\.(endswith|removesuffix|replace)\(\(?["']_?(key|value)["']""",
    r"""["'](past|new|compact|present)_\w*\.?["'] (not )?in """,
    r"\blayer_of\b",
    r"""name\.r?(partition|split)\(["']\.["']""",
    r"""re\.\w+\(r?["'].*(past|compact|present)_""",
)


def sources() -> list[Path]:
    package = [p for p in (ROOT / "ivc_export").rglob("*.py") if p.relative_to(ROOT).parts[1] not in APART]
    return [*package, *(ROOT / "benchmarks").rglob("*.py")]


def taken_apart(text: str) -> list[str]:
    return [line for line in text.splitlines() if any(re.search(pattern, line) for pattern in PATTERNS)]


def test_names_of_tensors_are_not_taken_apart() -> None:
    found = {str(path.relative_to(ROOT)): taken_apart(path.read_text(encoding="utf-8")) for path in sources()}
    assert len(found) > 100
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        'if value.name.startswith("past_key"):',
        'if name.startswith(("compact_", "new_")):',
        'return [t.name for t in outputs if "compact_" in t.name]',
        'name.replace("new_", "past_", 1)',
        'suffix = name.removeprefix("past_")',
        'if stem.endswith(("_key", "_value")):',
        "start = lengths[layer_of(name)]",
        'layer = int(name.rpartition(".")[2])',
        'layer = int(name.split(".")[1])',
        're.fullmatch(r"past_key\\.(\\d+)", name)',
    ],
)
def test_the_test_of_names_finds_what_it_looks_for(line: str) -> None:
    assert taken_apart(line) == [line]
