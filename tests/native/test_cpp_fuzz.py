"""libFuzzer's targets of the C++ runtime, under sanitizers, from the seeds in the repository; built by clang."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.native.cpp_runtime import RUNTIME, build, shared

SECONDS = os.environ.get("IVC_FUZZ_SECONDS", "20")
FLAGS = "-O1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all"
TARGETS = ("manifest", "tokenizer", "pictures", "segments")


@pytest.fixture(scope="session")
def fuzzers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ("-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++", f"-DCMAKE_CXX_FLAGS={FLAGS}")
    folder = shared(tmp_path_factory, "cpp-clang")
    return build(folder, *options, "-DIVC_FUZZERS=ON", "-DIVC_PROGRAMS=OFF", tools=("cmake", "clang", "clang++"))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_that_is_read_does_harm(fuzzers: Path, tmp_path: Path, target: str) -> None:
    found = tmp_path / "found"
    found.mkdir()
    limits = (f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=65536", "-seed=1")
    command = [fuzzers / f"fuzz_{target}", found, RUNTIME / "fuzz" / "seeds" / target, *limits]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
