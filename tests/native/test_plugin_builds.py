"""Kernels and custom operators compile and link with the machine's nvcc, warnings as errors. Nothing runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.kernels import PLUGIN

MISSING = [name for name in ("cmake", "nvcc") if shutil.which(name) is None]
CACHE = "CMakeCache.txt"


def cmake(*arguments: object) -> None:
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build(folder: Path, architecture: str, name: str = "ivc_kernels") -> Path:
    """Build a library for one architecture ("86") and return its file."""
    if MISSING:
        pytest.skip(f"there is no {' and no '.join(MISSING)}")
    cmake("-S", PLUGIN, "-B", folder, f"-DCMAKE_CUDA_ARCHITECTURES={architecture}")
    if name.startswith("ivc_onnxruntime") and "OnnxRuntime_INCLUDE_DIR-NOTFOUND" in (folder / CACHE).read_text():
        pytest.skip("onnxruntime's headers are not installed (ONNXRUNTIME_ROOT names them)")
    if name in ("ivc_onnxruntime", "ivc_plugin") and "CublasLt_INCLUDE_DIR-NOTFOUND" in (folder / CACHE).read_text():
        pytest.skip("cuBLAS's headers are not installed (CUBLAS_ROOT names their folder)")
    cmake("--build", folder, "--target", name, "-j", "1")
    return folder / f"lib{name}.so"


def exports(library: Path) -> str:
    return subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True).stdout


def test_the_sanitizers_program_calls_every_kernel() -> None:
    text = (PLUGIN / "tests" / "sanitize.cu").read_text()
    functions = set(re.findall(r"IVC_API \w+ (ivc\w+)\(", (PLUGIN / "kernels" / "ivc_kernels.h").read_text()))
    assert len(functions) > 15 and functions == {name for name in functions if f"{name}(" in text}


def test_kernels_compile_and_link(tmp_path: Path) -> None:
    exported = exports(build(tmp_path, "86"))
    for name in (
        "ivcSelectTokens",
        "ivcTokenScores",
        "ivcKeptRows",
        "ivcCacheIndex",
        "ivcCompactGather",
        "ivcCompactGatherInto",
        "ivcAppendRows",
        "ivcAttendInPlace",
        "ivcEncodeAttend",
        "ivcTurnHeads",
        "ivcAttendJoined",
        "ivcFusedPacked",
        "ivcUnpack",
        "ivcFusedLinear",
        "ivcNormRows",
        "ivcActivate",
    ):
        assert f" T {name}\n" in exported


def test_custom_operators_compile_and_link(tmp_path: Path) -> None:
    assert " T RegisterCustomOps\n" in exports(build(tmp_path, "86", "ivc_onnxruntime"))


def test_kernels_for_sm_90_alone_compile(tmp_path: Path) -> None:
    build(tmp_path, "90", "ivc_kernels_90a")
    (compiled,) = tmp_path.rglob("attend_groups.cu.o")
    assert b"GroupedShape" in compiled.read_bytes() and b"sm_90a" in compiled.read_bytes()
