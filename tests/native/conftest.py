"""What tests of native code share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.native.kernels import PLUGIN, Kernels


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


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our custom operators for onnxruntime, over emulated kernels."""
    from tests.native.test_plugin_builds import build  # a module of tests, which pytest itself must import first

    return build(tmp_path_factory.mktemp("operators"), "86", "ivc_onnxruntime_emulated")


@pytest.fixture(scope="module", params=[0, 1], ids=["forwards", "backwards"])
def kernels(emulation: Path, request: pytest.FixtureRequest) -> Kernels:
    """Threads, warps and blocks in rising or falling order: an algorithm that depends on it would race on a GPU.

    Copies are done at once, or, backwards, when they are awaited.
    """
    return Kernels(emulation, np.ascontiguousarray, lambda a: a, lambda a: a.ctypes.data, request.param)
