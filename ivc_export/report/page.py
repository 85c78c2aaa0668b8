"""Writes report/parity.html, one file without links to others."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import PIL.Image

from ivc_export.bundle.bundle import Bundle
from ivc_export.report.overlay import count_kinds, overlay
from ivc_export.report.plots import plot_errors, plot_scores
from ivc_export.runtime.backends import find_backend
from ivc_export.runtime.interface import Step
from ivc_export.verify.parity import ParityReport

TEMPLATE = Path(__file__).parent / "parity.html.jinja"


def parity_page(bundle: Bundle, report: ParityReport, step: Step, images: Sequence[PIL.Image.Image]) -> str:
    """The report as HTML. step: the bundle's prefill; images: its pictures, RGB.

    Raises:
        ImportError: matplotlib is not installed.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["error"] = lambda value: "" if value is None else f"{value:.1e}"
    measured = [c for c in report.comparisons if c.error is not None and c.tolerance]
    worst = max(measured, key=lambda c: (c.error or 0.0) / (c.tolerance or 1.0))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        manifest=bundle.manifest,
        name=bundle.folder.resolve().name,
        report=report,
        failed=[c for c in report.comparisons if not c.passed],
        ties=[c for c in report.comparisons if "a tie" in c.note],
        worst=worst,
        kinds=count_kinds(step),
        steps=sum(c.name.startswith("logits of decode") for c in report.comparisons),
        errors=plot_errors(report.comparisons),
        scores=plot_scores(step) if images else None,
        picture=png(overlay(images, step)) if images else None,
        reasons=find_backend(report.backend).tolerances[report.dtype].errors,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def png(image: PIL.Image.Image) -> str:
    """A picture as base64 of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
