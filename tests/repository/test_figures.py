"""Figures in sentences of pages are those of the results files."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ivc_export.checkpoint.formats.nbits import Packing
from tests.checkpoint.test_rounding import rounded
from tests.repository.pages import ROOT, read
from tools.figures import result


def page(name: str) -> str:
    """A page's text on one line."""
    return " ".join(read(ROOT / name).split())


@pytest.mark.parametrize(("zero_points", "least", "most"), [(False, 8, 9), (True, 4, 5)])
def test_the_search_saves_what_is_said_on_normal_values(zero_points: bool, least: int, most: int) -> None:
    values = np.random.default_rng(0).standard_normal((512, 1536)).astype(np.float32)
    for group in (32, 64, 128):
        packing = Packing(4, group, zero_points)
        plain, found = (np.linalg.norm(rounded(values, packing, None, search) - values) for search in (False, True))
        assert least <= round(100 * (1 - found / plain)) <= most
    said = (
        "the search leaves 8 to 9% less error in int4 than rounding to the nearest, and 4 to 5% less with zero points"
    )
    assert said in page("docs/weights.md")


def test_what_accuracy_level_4_costs_is_what_was_measured() -> None:
    variants = result("spatial-vl-quantised")["variants"]
    exact, fast = (variants[f"int4, groups of 32{level}"]["ratios"] for level in ("", ", level 4"))
    found = {
        round(100 * (exact[ratio]["accuracy"]["all"]["accuracy"] - fast[ratio]["accuracy"]["all"]["accuracy"]), 3)
        for ratio in ("1.0", "0.5")
    }
    (said,) = re.findall(r"Level 4 costs ([\d.]+) points more than level 0, at both ratios", page("docs/weights.md"))
    assert found == {float(said)}
    assert {
        round(exact["0.5"]["kept_rows"]["mean_overlap"], 2),
        round(fast["0.5"]["kept_rows"]["mean_overlap"], 2),
    } == {0.93}
