"""Writes a check's comparisons as JUnit XML, for servers that run tests."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping

from ivc_export.verify.parity import Comparison, ParityReport


def junit(report: ParityReport, grown: Mapping[str, str] | None = None) -> str:
    """One test suite with a test case for each comparison.

    grown: sentences by the names of comparisons that fail because they grew since a baseline.
    """
    title = f"{report.backend}, {report.dtype}, ratio {report.ratio:g}"
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(suites, "testsuite", name=f"ivc-check, {title}")
    failures = 0
    for comparison in report.comparisons:
        case = ElementTree.SubElement(suite, "testcase", name=comparison.name, classname=f"ivc-check.{report.backend}")
        sentence = failure(comparison) or (grown or {}).get(comparison.name)
        if sentence:
            failures += 1
            ElementTree.SubElement(case, "failure", message=plain(sentence), type="parity").text = plain(sentence)
        elif comparison.note or comparison.error is not None:
            ElementTree.SubElement(case, "system-out").text = plain(said(comparison))
    counts = {"tests": str(len(report.comparisons)), "failures": str(failures), "errors": "0", "skipped": "0"}
    for element in (suites, suite):
        element.attrib |= counts
    properties = ElementTree.Element("properties")
    for name, value in {"bundle": report.bundle, "reference": report.reference, **report.versions}.items():
        ElementTree.SubElement(properties, "property", name=plain(name), value=plain(value))
    suite.insert(0, properties)
    ElementTree.indent(suites)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(suites, encoding="unicode")}\n'


def failure(comparison: Comparison) -> str | None:
    """A failed comparison in words, with error and tolerance. None if it passed."""
    return None if comparison.passed else f"out of tolerance: {said(comparison)}"


def said(comparison: Comparison) -> str:
    """Error, tolerance and note of a comparison, as far as it has them."""
    parts = {"error": comparison.error, "tolerance": comparison.tolerance}
    words = [f"{name} {value:.3e}" for name, value in parts.items() if value is not None]
    return ", ".join([*words, *([comparison.note] if comparison.note else [])])


def plain(text: str) -> str:
    """Text without characters that XML does not allow: control characters, and bytes that were not text."""
    return "".join(character if character.isprintable() else "?" for character in text)
