"""ivc-check: its report, stored runs, and weight files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.integrity import verify_files
from ivc_export.contract.names import GRAPH_NAMES, MANIFEST
from tests.conftest import SHAPES


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(sample_bundle.folder, tmp_path / "bundle")


class Page(HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_holds_everything_it_shows(bundle: Path, sample_checkpoint: Path) -> None:
    question = ["--image", str(SHAPES), "--image", str(SHAPES), "--prompt", "Compare.", "--steps", "2"]
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), *question]) == 0
    page = Page((bundle / "report" / "parity.html").read_text(encoding="utf-8"))
    assert all(re.match(r"#|data:image/png;base64,", target) for target in page.loads)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert page.tags.count("svg") == 2 and page.tags.count("img") == 1
    assert "url(http" not in page.text
    report = json.loads((bundle / "report" / "parity.json").read_text())
    for comparison in report["comparisons"]:
        assert comparison["name"] in page.text
    for words in ("192 of 384", "onnxruntime-cpu in float32", "layer 3", "boundary", "summation", "transformers"):
        assert words in page.text, words
    assert "FAILED" not in page.text


def test_a_text_prompt_has_a_report_too(bundle: Path, sample_checkpoint: Path) -> None:
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), "--prompt", "Hello?", "--steps", "0"]) == 0
    page = Page((bundle / "report" / "parity.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 1 and "img" not in page.tags


def damage(bundle: Path, name: str) -> None:
    """Change one stored value of tensor `name`, and no length."""
    path = bundle / "weights" / "model.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = 8 + size + json.loads(content[8 : 8 + size])[name]["data_offsets"][0]
    content[start + 3] ^= 0x02  # the exponent
    path.write_bytes(content)


def test_a_failure_is_told_in_the_report(
    bundle: Path, sample_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), "--steps", "1"]) == 0
    damage(bundle, "model.layers.3.mlp.down_proj.weight")
    assert cli.ivc_check([str(bundle), "--onnx-only"]) == 1
    assert "FAILED; the report is" in capsys.readouterr().out
    page = Page((bundle / "report" / "parity.html").read_text(encoding="utf-8"))
    assert "Out of tolerance" in page.text and "FAILED" in page.text
    assert json.loads((bundle / "report" / "parity.json").read_text())["passed"] is False


def test_a_stored_run_gives_the_same_report(bundle: Path, sample_checkpoint: Path) -> None:
    question = ["--image", str(SHAPES), "--prompt", "Where?", "--ratio", "0.3", "--steps", "2"]
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), *question]) == 0
    first = (bundle / "report" / "parity.json").read_bytes()
    assert cli.ivc_check([str(bundle), "--onnx-only"]) == 0
    assert (bundle / "report" / "parity.json").read_bytes() == first


def test_a_stored_run_of_another_export_is_refused(
    bundle: Path, sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), "--steps", "0"]) == 0
    other = tmp_path / "other"
    assert cli.ivc_export(["--model", str(sample_checkpoint), "--layer", "1", "--output", str(other)]) == 0
    shutil.copytree(bundle / "report", other / "report")
    assert cli.ivc_check([str(other), "--onnx-only"]) == 2
    assert "the stored run is not a run of" in capsys.readouterr().err


def test_weight_files_are_verified(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.ivc_check([str(bundle), "--weights"]) == 0
    assert "1 weight file and 3 graphs, 1.1 MB: sha256 as in the manifest" in capsys.readouterr().out
    damage(bundle, "model.layers.3.mlp.down_proj.weight")
    assert cli.ivc_check([str(bundle), "--weights"]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"error: {bundle}/weights/model.safetensors is not the file that was exported: export the model again\n"
    )


def test_a_missing_hash_is_added(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / MANIFEST
    content = json.loads(path.read_text())
    content["weights"][0]["sha256"] = None
    path.write_text(json.dumps(content))
    seen: list[tuple[int, int]] = []
    verify_files(Bundle.load(bundle), lambda done, total: seen.append((done, total)))
    weights = bundle / "weights" / "model.safetensors"
    files = [weights, *(bundle / f"{name}.onnx" for name in GRAPH_NAMES)]
    assert seen[-1] == (sum(file.stat().st_size for file in files),) * 2
    found = json.loads(path.read_text())["weights"][0]["sha256"]
    assert found == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert not [*bundle.glob(".*")]
    content["weights"][0].pop("sha256")
    path.write_text(json.dumps(content))
    assert cli.ivc_check([str(bundle), "--weights"]) == 0
    assert "sha256 added to the manifest for weights/model.safetensors" in capsys.readouterr().out
    assert json.loads(path.read_text())["weights"][0]["sha256"] == found


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "there is nothing to check: give --against CHECKPOINT, --onnx-only or --weights"),
        (["--onnx-only", "--against", "x"], "leave out --against"),
        (["--onnx-only", "--ratio", "0.5", "--steps", "2"], "leave out --ratio and --steps"),
        (["--onnx-only"], "holds no stored run: run ivc-check --against"),
        (["--against", "nowhere"], "nowhere is not a folder"),
        (["--against", "{checkpoint}", "--steps", "-1"], "-1 decode steps"),
        (["--against", "{checkpoint}", "--ratio", "2"], "ratio 2.0 is out of range"),
        (["--against", "{checkpoint}", "--precision", "float16"], "cannot compute a float32 bundle in float16"),
        (["--against", "{checkpoint}", "--image", str(SHAPES)], "there is a picture but no question"),
    ],
)
def test_a_mistake_is_one_sentence(
    bundle: Path, sample_checkpoint: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [option.format(checkpoint=sample_checkpoint) for option in options]
    assert cli.ivc_check([str(bundle), *filled]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (bundle / "report").exists()


def test_a_report_that_cannot_be_written_is_told_first(
    bundle: Path, sample_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ivc_export.verify.oracle.record", lambda *_: pytest.fail("it runs the checkpoint"))
    (bundle / "report").write_text("a file")
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint)]) == 2
    (bundle / "report").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle)
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint)]) == 2
    assert capsys.readouterr().err.count("error: the report cannot be written to") == 2
