"""JUnit's XML of a check: what the servers that run tests read of it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from ivc_export.report.junit import junit
from ivc_export.verify.parity import Comparison
from tests.verify.test_baseline import REPORT


def test_each_comparison_is_a_test_case_and_failures_say_error_and_tolerance() -> None:
    rows = Comparison("keep_index", None, None, False, "7 rows against 8, 1 in one only")
    report = replace(REPORT, comparisons=(*REPORT.comparisons[:2], Comparison("logits 1", 2.5, 1e-4, False), rows))
    root = ElementTree.fromstring(junit(report, {"token_score": "token_score grew"}))
    suite = root.find("testsuite")
    assert suite is not None
    assert [case.get("name") for case in suite.iter("testcase")] == [one.name for one in report.comparisons]
    failed = {
        case.get("name"): case.findtext("failure") for case in suite.iter("testcase") if len(case.findall("failure"))
    }
    assert failed == {
        "logits 1": "out of tolerance: error 2.500e+00, tolerance 1.000e-04",
        "keep_index": "out of tolerance: 7 rows against 8, 1 in one only",
        "token_score": "token_score grew",
    }
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "3", "0")


def test_paths_that_are_no_text_leave_the_file_whole() -> None:
    text = junit(replace(REPORT, bundle="a\x1b\udcff<&>\n"))
    assert ElementTree.fromstring(text.encode()).find(".//property[@value='a??<&>?']") is not None
