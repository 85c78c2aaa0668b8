"""A backend is one record: with it, every command has the backend, its options, its notes and its tolerances."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_bench, ivc_check, ivc_run
from ivc_export.errors import UserError
from ivc_export.runtime.backend import Backend
from ivc_export.runtime.backends import BACKENDS, open_session
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.plan import Run
from ivc_export.runtime.probes import Ceilings, SelectionTimes
from ivc_export.runtime.tolerances import FLOAT32

OPENED: list[dict[str, object]] = []


class ToySession(OnnxSession):
    backend = "toy"


def open_toy(bundle: Bundle, **options: object) -> Session:
    OPENED.append(options)
    return ToySession(bundle, threads=1)


def time_toy(session: Session, plan: Run, rows: int) -> SelectionTimes:
    assert isinstance(session, ToySession) and rows > plan.rows
    return SelectionTimes(1e-3, 2e-3, 0.0)


TOY = Backend(
    name="toy",
    open=open_toy,
    device="cpu",
    tolerances={"float32": replace(FLOAT32, measured=False)},
    libraries={"toy_library": "what the toy loads"},
    before=lambda bundle: "the toy is about to open",
    after=lambda session: "the toy has opened",
    needs_capacity=True,
    time_selection=time_toy,
    ceilings=lambda session: Ceilings(1e12, 1e12, session.dtype, "the toy's own"),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "toy", TOY)
    OPENED.clear()


def test_ivc_run_takes_a_toy(sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [str(sample_bundle.folder), "--prompt", "Hello", "--max-tokens", "3", "--json"]
    assert ivc_run([*asked, "--backend", "toy", "--toy-library", "lib.so"]) == 0
    found, said = capsys.readouterr()
    assert "the toy is about to open" in said and "the toy has opened" in said
    assert [{"toy_library": Path("lib.so")}] == OPENED
    assert ivc_run(asked) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == json.loads(found)["tokens"]


def test_ivc_check_takes_a_toy(
    sample_bundle: Bundle, sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(sample_bundle.folder, tmp_path / "bundle")
    assert ivc_check([str(bundle), "--backend", "toy", "--against", str(sample_checkpoint), "--steps", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "errors of a correct bundle on toy in float32 have not been measured yet" in said
    report = json.loads((bundle / "report" / "parity.json").read_text())
    assert (report["backend"], report["passed"]) == ("toy", True)


def test_ivc_bench_takes_a_toy(sample_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    quick = ["--visual", "20", "--text", "16", "--tokens", "2", "--rounds", "1", "--warmups", "0", "--json", str(file)]
    assert ivc_bench([str(sample_bundle.folder), "--backend", "toy", *quick]) == 0
    content = json.loads(file.read_text())
    assert {row["side"] for row in content["rows"]} == {"toy"} and content["sides"] == {"toy": "the toy has opened"}
    assert all((row["selection"]["select"], row["selection"]["compact"]) == (1, 2) for row in content["rows"])
    assert [one["source"] for one in content["ceilings"]] == ["the toy's own"]
    sizes = sample_bundle.manifest.decoder
    assert content["rows"][0]["cache_bytes"] == 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * 4 * 36


def test_a_toys_options_are_its_own(sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    for command, more in ((ivc_run, ["--prompt", "x"]), (ivc_check, ["--onnx-only"]), (ivc_bench, [])):
        assert command([str(sample_bundle.folder), *more, "--toy-library", "lib.so"]) == 2
        assert "--toy-library is for toy: use it with --backend toy, or leave it out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"toy takes no plugin: leave it out \(its options: toy_library\)"):
        open_session(sample_bundle, "toy", plugin="lib.so")
    assert not OPENED


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"])
def test_records_stand_under_their_names(name: str) -> None:
    assert BACKENDS[name].name == name
