"""The kernels compile and link with the machine's nvcc, warnings as errors. Nothing runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels import PLUGIN

MISSING = [name for name in ("cmake", "nvcc") if shutil.which(name) is None]


def build(folder: Path, architecture: str) -> Path:
    """Build the kernels for one architecture ("86") and return their shared library."""
    if MISSING:
        pytest.skip(f"there is no {' and no '.join(MISSING)}")
    for command in (
        ["cmake", "-S", str(PLUGIN), "-B", str(folder), f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"],
        ["cmake", "--build", str(folder), "-j", "1"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libivc_kernels.so"


def test_kernels_compile_and_link(tmp_path: Path) -> None:
    library = build(tmp_path, "86")
    exported = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True).stdout
    for name in ("ivcSelectTokens", "ivcTokenScores", "ivcKeptRows", "ivcCompactGather", "ivcAppendRows"):
        assert f" T {name}\n" in exported
