"""The C API is one header of plain C, and the camera loop's example compiles against it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.native.cpp_runtime import RUNTIME


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_camera_loop_compiles_as_plain_c(compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    options = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{RUNTIME / 'include'}"]
    for device in ("-DIVC_ONNXRUNTIME", "-DIVC_TENSORRT"):
        command = [compiler, *options, device, str(RUNTIME / "examples" / "frames.c")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
