"""What the architecture page says was measured is in its results files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ivc_export.lowering import LOWERINGS

ROOT = Path(__file__).parents[2]
TEXT = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def test_the_page_lists_every_lowering() -> None:
    table = TEXT.split("| lowering | for |")[1].split("**Passes.**")[0]
    assert re.findall(r"\| `([\w-]+)` \| ", table) == [*LOWERINGS]


def test_the_growth_of_memory_was_measured() -> None:
    soak = results("soak-cpu.json")
    repeated, varied, words = (soak[kind]["growth"]["rss_bytes"] for kind in ("repeated", "varied", "words_alone"))
    assert f"holds {repeated / 1e3:.0f} kB more (`benchmarks/results/soak-cpu.json`)" in TEXT
    assert f"With four new words in every prompt it holds {varied / 1e6:.1f} MB more" in TEXT
    assert f"about {words / 1e6:.0f} MB for one tokenizer" in TEXT
    assert "After 1,000 chats" in TEXT and soak["repeated"]["readings"][-1]["prompts"] == 1000
