"""`optimum-cli export ivc`, in an environment with optimum that `make optimum` sets up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.exporter.test_export import files

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-optimum" / "bin"
OURS, THEIRS = "ivc-export", "optimum-cli export ivc"

pytestmark = pytest.mark.skipif(not (BIN / "optimum-cli").is_file(), reason="make optimum sets up optimum")


def run(folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    name, *first = command.split()
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([BIN / name, *first, *arguments], cwd=folder, env=clean, capture_output=True, text=True)


def test_the_installed_command_is_this_one() -> None:
    (copy,) = BIN.parent.glob("lib/python*/site-packages/optimum/commands/register/ivc.py")
    assert copy.read_bytes() == (ROOT / "ivc_export" / "cli" / "optimum.py").read_bytes()


def test_the_bundles_are_the_same_to_the_byte(sample_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--ratio", "0.3", "--layer", "2", "--dtype", "fp16", "--quiet")
    bundles = []
    for command in (OURS, THEIRS):
        output = tmp_path / command.split()[0]
        done = run(tmp_path, command, "--model", str(sample_checkpoint), *options, "--output", str(output))
        assert done.returncode == 0, done.stderr
        bundles.append(files(output))
    assert bundles[0] == bundles[1] and "manifest.json" in bundles[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        [],
        ["--modell", "x"],
        ["--model", "--", "x"],
        ["--model=xyz", "--ratio=-1"],
    ],
)
def test_options_help_and_errors_are_ivc_exports(arguments: list[str], tmp_path: Path) -> None:
    ours, theirs = (run(tmp_path, command, *arguments) for command in (OURS, THEIRS))
    assert theirs.returncode == ours.returncode
    assert "Traceback" not in theirs.stderr
    for mine, other in ((ours.stdout, theirs.stdout), (ours.stderr, theirs.stderr)):
        assert " ".join(other.split()).replace(THEIRS, OURS) == " ".join(mine.split())


def test_optimum_lists_the_command_without_loading_the_export(tmp_path: Path) -> None:
    done = run(tmp_path, "optimum-cli", "export", "--help")
    assert done.returncode == 0 and "ivc Export a vision-language model" in " ".join(done.stdout.split())
    code = "import sys, optimum.commands.register.ivc; print('onnx_ir' in sys.modules)"
    assert run(tmp_path, "python", "-c", code).stdout == "False\n"
