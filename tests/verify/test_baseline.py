"""What has grown since a baseline: ivc-check's errors and ivc-bench's times."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ivc_export import cli
from ivc_export.bench.baseline import compare_times, read_times
from ivc_export.bench.measure import Bench, Row
from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.verify.baseline import compare_errors, read_errors
from ivc_export.verify.parity import Comparison, ParityReport

REPORT = ParityReport(
    bundle="bundle",
    reference="checkpoint",
    model={"family": "a"},
    backend="onnxruntime-cpu",
    dtype="float32",
    ratio=0.5,
    method="ivc-prune",
    method_seed=None,
    visual_tokens=10,
    kept_tokens=5,
    comparisons=(
        Comparison("logits", 2e-5, 1e-4, True),
        Comparison("token_score", 1e-9, 1e-6, True),
        Comparison("keep_index", None, None, True, "7 rows, equal"),
    ),
    versions={},
)
ROW = Row(
    side="onnxruntime-cpu",
    dtype="float32",
    device="cpu",
    ratio=1.0,
    visual_tokens=20,
    kept_tokens=20,
    text_tokens=16,
    stages={"vision": 1.0, "prefix": 2.0, "decoder": 2.0, "host": 0.5},
    prefill=4.0,
    first_token=6.0,
    decode=2.0,
    decode_mean=2.0,
    selection=None,
    ideal={"vision": 1.0, "prefill": 1.0, "decode": 1.0},
    roofline={"vision": 1.0, "prefill": 1.0, "decode": 1.0},
    cache_bytes=1,
    visual_cache_bytes=1,
    host_bytes=1,
    device_bytes=None,
    tokens=[1],
    agreement=None,
)
QUICK = ["--visual", "20", "--text", "16", "--tokens", "2", "--rounds", "1", "--warmups", "0", "--ratio", "0.5"]


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def errors(**changes: float | None) -> ParityReport:
    """The report with other errors."""
    found = tuple(replace(one, error=changes.get(one.name, one.error)) for one in REPORT.comparisons)
    return replace(REPORT, comparisons=found)


@pytest.mark.parametrize(
    ("factor", "now", "grown"),
    [
        (None, {"logits": 4e-5}, []),
        (None, {"logits": 4.1e-5}, ["logits"]),
        (3.0, {"logits": 5.9e-5}, []),
        (1.0, {}, []),
        (1.0, {"logits": 1e-5}, []),
        (None, {"token_score": 1.9e-8}, []),  # a hundredth of its tolerance is where counting begins
        (None, {"token_score": 2.1e-8}, ["token_score"]),
    ],
)
def test_an_error_grows_beyond_the_factor_alone(
    factor: float | None, now: dict[str, float], grown: list[str], tmp_path: Path
) -> None:
    baseline = read_errors(write(tmp_path / "parity.json", REPORT.to_dict()), factor)
    assert list(compare_errors(baseline, errors(**now)).grown) == grown


def test_comparisons_that_appear_or_go_are_told(tmp_path: Path) -> None:
    baseline = read_errors(write(tmp_path / "parity.json", REPORT.to_dict()))
    other = replace(REPORT, comparisons=(*REPORT.comparisons[:2], Comparison("image_embeds", 1e-6, 1e-4, True)))
    changes = compare_errors(baseline, other)
    assert (dict(changes.grown), changes.new, changes.missing) == ({}, ("image_embeds",), ("keep_index",))
    said = changes.sentences(baseline)
    assert "is new" in said["image_embeds"] and "not in this run" in said["keep_index"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": {"family": "b"}}, "another model: give"),
        ({"backend": "tensorrt"}, r"another backend \(tensorrt, not onnxruntime-cpu\): give"),
        ({"dtype": "float16"}, r"another dtype \(float16, not float32\): give"),
        ({"ratio": 0.3}, r"another ratio \(0.3, not 0.5\): give"),
        ({"visual_tokens": 11}, r"another number of visual tokens \(11, not 10\): give"),
        ({"comparisons": []}, "has none of this run's figures"),
    ],
)
def test_the_errors_of_another_run_are_refused(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    baseline = read_errors(write(tmp_path / "parity.json", REPORT.to_dict() | changes))
    with pytest.raises(UserError, match=what):
        compare_errors(baseline, REPORT)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"comparisons": [{"name": "logits", "error": float("nan"), "tolerance": 1.0}]}, "comparisons.0.error"),
        ({"comparisons": [{"name": "logits", "error": -1.0, "tolerance": 1.0}]}, "comparisons.0.error"),
        ({"comparisons": "none"}, "comparisons"),
        ({"ratio": None}, "ratio"),
        ({"model": "a"}, "model"),
    ],
)
def test_a_damaged_report_is_no_baseline(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"is damaged or another kind of file \({sentence}.*written by ivc-check --against"
    ):
        read_errors(write(tmp_path / "parity.json", REPORT.to_dict() | changes))


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.99, float("nan"), float("inf")])
def test_a_factor_that_means_nothing_is_refused(factor: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out of range: give 1 or more"):
        read_errors(tmp_path / "nowhere.json", factor)


def test_ivc_check_fails_where_an_error_grew(
    sample_bundle: Bundle, sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(sample_bundle.folder, tmp_path / "bundle")
    report, stored, found = bundle / "report" / "parity.json", tmp_path / "parity.json", tmp_path / "junit.xml"
    options = [str(bundle), "--onnx-only", "--baseline", str(stored), "--junit", str(found)]
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), "--steps", "1"]) == 0
    content = json.loads(report.read_text())
    write(stored, content)
    assert cli.ivc_check(options) == 0
    assert 'failures="0"' in found.read_text()
    lowered = [one | {"error": one["error"] and one["error"] / 1e6} for one in content["comparisons"]]
    write(stored, content | {"comparisons": [*lowered[:-1], {"name": "what has gone", "error": 1.0}]})
    capsys.readouterr()
    assert cli.ivc_check([*options, "--baseline-factor", "1"]) == 1
    out = capsys.readouterr().out
    assert "grew from" in out and "FAILED; the report is" in out and "what has gone is in" in out
    assert f"{content['comparisons'][-1]['name']} is new" in out
    assert "more than 1 times the value in" in found.read_text()
    assert json.loads(report.read_text())["passed"] is True  # within its tolerances it still is
    assert cli.ivc_check([*options, "--baseline-factor", "100"]) == 0
    before = report.read_bytes()
    write(stored, content | {"ratio": 0.9})
    assert cli.ivc_check(options) == 2
    assert "another ratio (0.9, not 0.5)" in capsys.readouterr().err
    assert report.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--weights", "--junit", "TMP/junit.xml"], "--junit is for a comparison"),
        (["--weights", "--baseline", "TMP/x.json"], "--baseline is for a comparison"),
        (["--onnx-only", "--junit", "TMP/no/junit.xml"], "does not exist: create it"),
        (["--onnx-only", "--junit", "TMP"], "is a folder: name a file in it"),
        (["--onnx-only", "--baseline", "TMP/x", "--junit", "TMP/x"], "x: give two different files"),
        (["--onnx-only", "--baseline-factor", "2"], "--baseline-factor needs a report to compare with"),
        (["--onnx-only", "--baseline", "TMP/nowhere.json"], "nowhere.json is missing: give a file that"),
        (["--onnx-only", "--baseline", "TMP"], "is not a regular file"),
        (["--onnx-only", "--baseline", "TMP/x.json", "--baseline-factor", "0"], "--baseline-factor 0 is out of range"),
    ],
)
def test_mistakes_of_ivc_check_are_one_sentence(
    sample_bundle: Bundle, options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.ivc_check([str(sample_bundle.folder), *(option.replace("TMP", str(tmp_path)) for option in options)]) == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """What ivc-bench measures, from now on."""
    rows = [ROW, replace(ROW, ratio=0.5)]
    monkeypatch.setattr(Bench, "measure", lambda self, contestants, prompt: rows)
    return rows


def test_ivc_bench_fails_where_a_time_grew(
    sample_bundle: Bundle, measured: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    options = [str(sample_bundle.folder), *QUICK]
    assert cli.ivc_bench([*options, "--json", str(file)]) == 0
    assert cli.ivc_bench([*options, "--baseline", str(file)]) == 0
    measured[1] = replace(measured[1], decode=3.1)
    capsys.readouterr()
    assert cli.ivc_bench([*options, "--baseline", str(file)]) == 1
    grown = "20 visual and 16 text tokens, ratio 0.5: decode step grew from 2.00 ms to 3.10 ms, more than 1.5 times"
    assert grown in capsys.readouterr().out
    assert cli.ivc_bench([*options, "--baseline", str(file), "--baseline-factor", "1.6"]) == 0
    measured[0] = replace(measured[0], side="another")
    assert cli.ivc_bench([*options, "--baseline", str(file), "--baseline-factor", "1.6"]) == 0
    out = capsys.readouterr().out
    assert "another in float32, 20 visual and 16 text tokens, ratio 1: vision is new" in out
    assert "not in this run" in out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bundle": {"family": "another"}}, "another bundle: give"),
        ({"cpu": "another, 2 cores"}, "another CPU (another, 2 cores, not "),
        ({"gpu": {"name": "another"}}, "another GPU (another, not none): give"),
        ({"settings": {}}, "another kind of run"),
        ({"rows": [{"side": "a"}]}, "is damaged or another kind of file (rows.0.dtype"),
        ({"rows": None}, "is damaged or another kind of file (rows"),
    ],
)
def test_the_times_of_another_run_are_refused(
    sample_bundle: Bundle,
    measured: list[Row],
    changes: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, again = tmp_path / "bench.json", tmp_path / "again.json"
    options = [str(sample_bundle.folder), *QUICK]
    assert cli.ivc_bench([*options, "--json", str(file)]) == 0
    write(file, json.loads(file.read_text()) | changes)
    capsys.readouterr()
    assert cli.ivc_bench([*options, "--baseline", str(file), "--json", str(again)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1
    assert not again.exists()


def test_times_of_other_sizes_are_no_baseline(sample_bundle: Bundle, measured: list[Row], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert cli.ivc_bench([str(sample_bundle.folder), *QUICK, "--json", str(file)]) == 0
    with pytest.raises(UserError, match="has none of this run's figures"):
        compare_times(read_times(file), [replace(ROW, visual_tokens=21)])
