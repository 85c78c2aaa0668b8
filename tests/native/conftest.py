"""What tests of native code share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.kernels import PLUGIN


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' algorithms as a library for the host."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("emulation") / "emulation.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(PLUGIN / "tests" / "emulation.cpp"), "-o", str(path)], check=True)
    return path
