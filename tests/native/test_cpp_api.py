"""The C API is one header of plain C. The camera loop's example and the programs of docs/cpp.md compile."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.cpp_runtime import RUNTIME, missing
from tests.repository.pages import ROOT, blocks, read


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_camera_loop_compiles_as_plain_c(compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    options = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{RUNTIME / 'include'}"]
    for device in ("-DIVC_ONNXRUNTIME", "-DIVC_TENSORRT"):
        command = [compiler, *options, device, str(RUNTIME / "examples" / "frames.c")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("language", "command"),
    [
        ("c", ["gcc", "-std=c99", "-Wpedantic", "-Wno-unused-function"]),
        ("cpp", ["g++", "-std=c++17"]),
        ("cpp", ["g++", "-std=c++17", "-include", "ivc/tensorrt.h"]),
    ],
)
def test_the_programs_of_the_page_compile(language: str, command: list[str], tmp_path: Path) -> None:
    lacks = missing(command[0])
    if lacks:
        pytest.skip(f"there is no {', '.join(lacks)}")
    (text,) = (block.text for block in blocks(read(ROOT / "docs" / "cpp.md")) if block.language == language)
    if "ivc/tensorrt.h" in command:
        text = text.replace("openOnnxRuntime", "openTensorrt")
    file = tmp_path / f"page.{language}"
    file.write_text(text, encoding="utf-8")
    options = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{RUNTIME / 'include'}"]
    done = subprocess.run([*command, *options, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
