"""What a user gets from `pip install .`, in an environment of its own without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SHAPES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("install") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", "--disable-pip-version-check", str(ROOT)], check=True)
    return folder


def shell(environment: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = [str(environment / "bin" / command[0]), *map(str, command[1:])]
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
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
        checked.stderr
        == "error: ivc-check needs torch and transformers: install ivc-export[check], its extra with both\n"
    )
