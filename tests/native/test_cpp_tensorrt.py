"""The C++ runtime's TensorRT part compiles, warnings as errors, and says what it lacks. Nothing of it runs here.

IVC_TENSORRT_HEADERS names folders of TensorRT's headers, with colons between them; without it those that a build finds
are taken. `ivc_device_test`, which is built along, is run by hand on a machine with a GPU and engines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ivc_export.bundle.bundle import Bundle
from tests.native.cpp_runtime import RUNTIME, missing

SAMPLE = Path(__file__).parents[2] / "samples" / "cpp"
ROOTS = [os.environ.get("TENSORRT_ROOT", ""), "/usr/local/tensorrt", "/opt/tensorrt", "/usr"]
FOUND = [Path(root) / "include" / triplet for root in ROOTS if root for triplet in ("", "x86_64-linux-gnu")]
NAMED = os.environ.get("IVC_TENSORRT_HEADERS")
HEADERS = [*map(Path, NAMED.split(":"))] if NAMED else [path for path in FOUND if (path / "NvInfer.h").exists()][:1]
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
PICTURE = Path(__file__).parents[2] / "samples" / "pictures" / "scene-1.png"


def compiled(compiler: str, source: Path, *includes: Path) -> None:
    """Compile a file, and throw away what comes of it."""
    lacks = [*missing(compiler), *(str(path) for path in includes if not path.exists())]
    if lacks:
        pytest.skip(f"there is no {', '.join(lacks)}")
    system = [word for path in includes for word in ("-isystem", str(path))]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{RUNTIME / 'include'}", *system]
    done = subprocess.run([compiler, *options, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_what_calls_cuda_compiles(compiler: str) -> None:
    for name in ("tensorrt/cuda.cpp", "tests/device_test.cpp"):
        compiled(compiler, RUNTIME / name, CUDA)


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_copies_are_right_on_a_device_that_does_nothing_before_it_must(compiler: str, tmp_path: Path) -> None:
    """Compiled and run with sanitizers over a stand-in for CUDA."""
    sources = [RUNTIME / name for name in ("tests/cuda_test.cpp", "tensorrt/cuda.cpp")]
    lacks = [*missing(compiler), *([] if CUDA.exists() else [str(CUDA)])]
    if lacks:
        pytest.skip(f"there is no {', '.join(lacks)}")
    sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME / 'include'}", "-isystem", str(CUDA)]
    done = subprocess.run(
        [compiler, *options, *sanitized, *map(str, sources), "-o", str(tmp_path / "test")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "test"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("headers", HEADERS or [Path("TensorRT's headers")], ids=str)
def test_what_calls_tensorrt_compiles(compiler: str, headers: Path) -> None:
    compiled(compiler, RUNTIME / "tensorrt" / "tensorrt.cpp", headers, CUDA)


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_sample_is_thirty_lines_that_compile(compiler: str) -> None:
    compiled(compiler, SAMPLE / "main.cpp")
    assert len((SAMPLE / "main.cpp").read_text().splitlines()) <= 30


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, where it can be linked."""
    lacks = missing("cmake", "g++", "nvcc")
    if lacks:
        pytest.skip(f"there is no {', '.join(lacks)}")
    folder = tmp_path_factory.mktemp("sample")
    done = subprocess.run(["cmake", "-S", SAMPLE, "-B", folder], capture_output=True, text=True)
    if "TensorRT or the CUDA toolkit is not found" in done.stderr:
        pytest.skip("TensorRT is not installed (TENSORRT_ROOT names it)")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", folder, "--target", "ivc_sample"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "ivc_sample"


def test_a_machine_without_a_gpu_or_engines_is_told_so(sample: Path, sample_bundle: Bundle, tmp_path: Path) -> None:
    bundle = shutil.copytree(sample_bundle.folder, tmp_path / "bundle")
    for words, message in (
        ([], "usage: ivc_sample BUNDLE PICTURE QUESTION"),
        ([bundle, PICTURE, "What is it?"], ("error: there is no GPU that CUDA can use", "has no engines for")),
        ([tmp_path, PICTURE, "What is it?"], "manifest.json is missing"),
    ):
        done = subprocess.run([sample, *map(str, words)], capture_output=True, text=True)
        wanted = (message,) if isinstance(message, str) else message
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert any(one in done.stderr for one in wanted), done.stderr
