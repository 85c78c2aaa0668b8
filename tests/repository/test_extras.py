"""What works where an extra was not installed, and the sentence where it does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.runtime.onnxruntime.loading import load_onnxruntime

EVERYTHING = """
import sys
for name in ("onnxruntime", "torch", "transformers", "matplotlib", "tensorrt", "tensorrt_rtx"):
    sys.modules[name] = None
import importlib, pkgutil, ivc_export
for module in pkgutil.walk_packages(ivc_export.__path__, "ivc_export."):
    try:
        importlib.import_module(module.name)
        print(module.name)
    except ModuleNotFoundError as error:
        print(error.name.partition(".")[0], module.name, file=sys.stderr)
from ivc_export import *
"""


@pytest.fixture
def no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    load_onnxruntime.cache_clear()
    yield
    load_onnxruntime.cache_clear()


def test_every_module_is_imported_without_onnxruntime() -> None:
    done = subprocess.run([sys.executable, "-c", EVERYTHING], capture_output=True, text=True, check=True)
    others = {"torch", "transformers", "matplotlib", "optimum", "accelerate"}
    assert {line.split()[0] for line in done.stderr.splitlines()} <= others
    for name in ("cli.run", "cli.check", "cli.bench", "cli.build", "runtime.onnxruntime.cuda", "bench.roofline"):
        assert f"ivc_export.{name}" in done.stdout.split()


@pytest.mark.usefixtures("no_onnxruntime")
def test_a_model_is_exported_without_onnxruntime(sample_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(sample_checkpoint), "--output", str(tmp_path / "bundle")]
    assert cli.ivc_export([*arguments, "--quiet"]) == 0
    assert Bundle.load(tmp_path / "bundle")
    assert cli.ivc_check([str(tmp_path / "bundle"), "--weights"]) == 0


@pytest.mark.usefixtures("no_onnxruntime")
@pytest.mark.parametrize(
    "command",
    [
        "ivc-run BUNDLE --prompt Why?",
        "ivc-check BUNDLE --against CHECKPOINT",
        "ivc-bench BUNDLE --visual 16",
        "ivc-export --model CHECKPOINT --output NEW --testdata",
    ],
)
def test_what_needs_onnxruntime_names_both_extras(
    command: str, sample_checkpoint: Path, sample_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BUNDLE": str(sample_bundle.folder), "CHECKPOINT": str(sample_checkpoint), "NEW": str(tmp_path / "new")}
    name, *arguments = [places.get(word, word) for word in command.split()]
    assert getattr(cli, name.replace("-", "_"))(arguments) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: onnxruntime cannot be imported (")
    assert line.endswith("install ivc-export[cpu], or ivc-export[cuda] instead if there is an NVIDIA GPU")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_onnxruntime")
def test_tensorrt_does_not_ask_for_onnxruntime(sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.ivc_run([str(sample_bundle.folder), "--prompt", "Why?", "--backend", "tensorrt"]) == 2
    said = capsys.readouterr().err
    assert "install tensorrt" in said and "onnxruntime" not in said
