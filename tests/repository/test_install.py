"""What a user gets from `pip install .`, in an environment of its own without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ivc_export import cli
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from tests.conftest import SHAPES
from tests.repository.test_face import EXAMPLE

ROOT = Path(__file__).parents[2]
NOT_ITS_OWN = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
"""Variables of the tests, which the environment does without: it compiles what it imports, and pip compiles nothing."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("install") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run(
        [folder / "bin" / "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", f"{ROOT}[cpu]"],
        check=True,
    )
    return folder


def shell(environment: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = [str(environment / "bin" / command[0]), *map(str, command[1:])]
    clean = {name: value for name, value in os.environ.items() if name not in NOT_ITS_OWN}
    return subprocess.run(arguments, cwd=environment, env=clean, capture_output=True, text=True)


def test_the_commands_work_without_torch(environment: Path, sample_checkpoint: Path) -> None:
    assert shell(environment, "python", "-c", "import torch").returncode == 1
    bundle = environment.parent / "bundle"
    exported = shell(environment, "ivc-export", "--model", sample_checkpoint, "--ratio", "0.5", "--output", bundle)
    assert exported.returncode == 0, exported.stderr
    question = ("--image", SHAPES, "--prompt", "Where is the ring?", "--max-tokens", "4", "--show", bundle / "kept.png")
    answered = shell(environment, "ivc-run", bundle, *question)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip() and (bundle / "kept.png").is_file()
    checked = shell(environment, "ivc-check", bundle, "--against", sample_checkpoint)
    assert checked.returncode == 2
    assert (
        checked.stderr == "error: ivc-check --against needs torch and transformers: install ivc-export[check], "
        "or use --onnx-only on a bundle that was checked on another machine\n"
    )


def test_a_bundle_checked_elsewhere_is_checked_without_torch(
    environment: Path, sample_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    export(ExportRecipe(sample_checkpoint, bundle))
    checked = shell(environment, "ivc-check", bundle, "--onnx-only")
    assert checked.returncode == 2 and "holds no stored run: run ivc-check --against" in checked.stderr
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), "--steps", "2"]) == 0
    checked = shell(environment, "ivc-check", bundle, "--onnx-only", "--weights")
    assert checked.returncode == 0, checked.stderr
    assert "logits of decode step 2" in checked.stdout and "install matplotlib" in checked.stdout
    assert json.loads((bundle / "report" / "parity.json").read_text())["passed"] is True


def test_a_program_is_checked_against_the_installed_types(environment: Path, tmp_path: Path) -> None:
    """The example of getting started, with a mistake behind it that mypy sees only where it sees our types."""
    (program,) = EXAMPLE.findall((ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8"))
    (tmp_path / "program.py").write_text(f"{program}reveal_type(bundle)\nwrong: int = chat\n", encoding="utf-8")
    options = ["--strict", "--python-executable", str(environment / "bin" / "python"), "--cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mypy", *options, "program.py"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert 'Revealed type is "ivc_export.bundle.bundle.Bundle"' in told
    (error,) = [line for line in told.splitlines() if ": error: " in line]
    assert error.endswith('has type "Chat", variable has type "int")  [assignment]'), told
