"""The C++ runtime's host library, compiled for aarch64, passes the same tests under qemu-user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.cpp_runtime import RUNTIME, build, shared

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
CROSS = Path("/usr/aarch64-linux-gnu")
"""Debian's libraries of the compiler."""


@pytest.fixture(scope="session")
def sysroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lacks = [tool for tool in (COMPILER, "qemu-aarch64", "apt-get", "dpkg") if shutil.which(tool) is None]
    if lacks:
        pytest.skip(f"nothing is compiled for aarch64 without {', '.join(lacks)} (see .ci/packages)")
    folder = shared(tmp_path_factory, "arm64")
    done = subprocess.run([ROOT / ".ci" / "arm64", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"the packages for aarch64 cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def test_the_host_library_passes_its_tests_on_aarch64(sysroot: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = (f"-DCMAKE_TOOLCHAIN_FILE={RUNTIME}/cmake/aarch64.cmake", f"-DIVC_SYSROOT={sysroot}")
    folder = build(
        shared(tmp_path_factory, "cpp-arm64"),
        *(*options, "-DCMAKE_CXX_FLAGS=-O1", "-DIVC_PROGRAMS=OFF"),
        tools=("cmake", COMPILER),
    )
    libraries = ":".join(f"{sysroot}/{place}/aarch64-linux-gnu" for place in ("usr/lib", "lib"))
    command = f"qemu-aarch64 -L {CROSS} -E LD_LIBRARY_PATH={libraries} {folder}/ivc_host_test"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/native/test_cpp_host.py"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        | {"IVC_HOST_TEST": command},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
