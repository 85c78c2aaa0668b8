"""Figures of the page for new users are those of the code."""

from __future__ import annotations

import os
import re

import ivc_export  # noqa: F401  (switches onnxruntime's telemetry off)
from ivc_export.calibrate.sweep import RIVALS
from ivc_export.cli import calibrate
from ivc_export.runtime.pictures import PIXELS
from tests.repository.pages import ROOT, read

TEXT = " ".join(read(ROOT / "docs" / "getting-started.md").split())


def test_limits_of_pictures() -> None:
    (megapixels,) = re.findall(r"A picture file may have (\d+) megapixels", TEXT)
    assert int(megapixels) * 10**6 == PIXELS


def test_what_calibration_compares() -> None:
    draws = [rival for rival in RIVALS if rival.name == "random"]
    assert len(draws) == 5 and "five draws at random" in TEXT
    assert 1 + len(RIVALS) == 7 and "takes seven times as long" in TEXT
    assert calibrate.parser().get_default("agreement") == 0.99 and "at which 99% of the answers stay the same" in TEXT


def test_telemetry_is_off() -> None:
    assert "it sets `ORT_DISABLE_TELEMETRY=1`" in TEXT and os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_every_extra_of_the_table_is_declared() -> None:
    declared = read(ROOT / "pyproject.toml").split("[project.optional-dependencies]")[1]
    (table,) = re.findall(r"\| extra \| for \|(.*?)\n\n", read(ROOT / "docs" / "getting-started.md"), re.DOTALL)
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert len(named) >= 7 and all(re.search(rf"^{name} = \[", declared, re.MULTILINE) for name in named)
