"""The plugin's code for the host: kernels and cuBLASLt are stand-ins that programs under graphs/plugin/tests hold."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.kernels import PLUGIN
from tests.native.test_cpp_tensorrt import CUDA, HEADERS

CUBLAS = [Path(os.environ.get("CUBLAS_ROOT", "/usr/local/cuda")) / "include", CUDA]


def run(folder: Path, *sources: str, includes: tuple[Path, ...] = ()) -> None:
    """Compile a program, warnings as errors, and run it: it says nothing."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    system = [word for path in includes for word in ("-isystem", str(path))]
    files = [str(PLUGIN / source) for source in sources]
    for command in (["g++", *flags, *system, *files, "-o", str(folder / "test"), "-ldl"], [str(folder / "test")]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_the_last_keys_are_remembered_and_others_forgotten(tmp_path: Path) -> None:
    run(tmp_path, "tests/remembered.cpp")


def test_products_are_checked_and_their_ways_remembered(tmp_path: Path) -> None:
    found = next((folder for folder in CUBLAS if (folder / "cublasLt.h").exists()), None)
    if found is None:
        pytest.skip("cuBLAS's headers are not installed (CUBLAS_ROOT names their folder)")
    run(tmp_path, "tests/cublas_lt.cpp", "kernels/cublas_lt.cpp", includes=(found, CUDA))


@pytest.mark.parametrize("headers", HEADERS or [Path("TensorRT's headers")], ids=str)
def test_operators_refuse_tensors_that_do_not_fit(tmp_path: Path, headers: Path) -> None:
    lacks = [str(path) for path in (headers, CUDA) if not path.exists()]
    if lacks:
        pytest.skip(f"there is no {', '.join(lacks)}")
    run(tmp_path, "tests/operators.cpp", includes=(headers, CUDA))
