"""The C++ runtime's builds, and its test program, which answers commands line by line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

RUNTIME = Path(__file__).parents[2] / "runtime" / "cpp"
HEADERS = {  # what a build includes, and Debian's package of it
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "jpeglib.h": "libjpeg-dev",
    "png.h": "libpng-dev",
    "utf8proc.h": "libutf8proc-dev",
    "pcre2.h": "libpcre2-dev",
}


def missing(*tools: str) -> list[str]:
    """What a build needs and this machine lacks."""
    folders = [Path("/usr/include"), Path("/usr/local/include"), Path("/opt/homebrew/include")]
    packages = [
        package for header, package in HEADERS.items() if not any((folder / header).exists() for folder in folders)
    ]
    return [*(tool for tool in tools if shutil.which(tool) is None), *packages]


def shared(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that every process of one run of the tests has in common."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def build(folder: Path, *options: str, tools: Sequence[str] = ("cmake", "g++"), target: str = "all") -> Path:
    """A build of runtime/cpp in `folder`; skips the test where this machine cannot build.

    tools: programs that it takes. Of several processes one builds, and the others wait for it.
    """
    lacks = missing(*tools)
    if lacks:
        pytest.skip(f"the C++ runtime is not built without {', '.join(lacks)} (see .ci/packages)")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make(folder, options, target)
    return folder


def make(folder: Path, options: Sequence[str], target: str) -> None:
    """Configure and build."""
    jobs = str(os.cpu_count() or 1)
    configure = ["cmake", "-S", str(RUNTIME), "-B", str(folder), "-DIVC_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug", *options]
    for command in (configure, ["cmake", "--build", str(folder), "-j", jobs, "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


class HostProgram:
    """The running test program. command: what starts it."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def answer(self, what: str, **arguments: Any) -> dict[str, Any]:
        """What it says to a command: its `answer`, or an `error`."""
        return self.exchange({"do": what, **arguments})

    def exchange(self, line: Any) -> dict[str, Any]:
        """What it says to one line."""
        assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline()
        assert said, self.process.stderr.read()[-4000:]
        found: dict[str, Any] = json.loads(said)
        return found

    def ask(self, what: str, **arguments: Any) -> Any:
        """Its answer, which is no error."""
        found = self.answer(what, **arguments)
        assert "error" not in found, found["error"]
        return found["answer"]

    def refusal(self, what: str, **arguments: Any) -> str:
        """The sentence of its error."""
        found = self.answer(what, **arguments)
        assert "error" in found, f"{what} is answered: {str(found)[:200]}"
        return str(found["error"])

    def close(self) -> None:
        """End it, and see that it did so in peace."""
        assert self.process.stdin is not None and self.process.stderr is not None
        with self.process:
            self.process.stdin.close()
            said = self.process.stderr.read()
        assert self.process.returncode == 0, said[-4000:]


def digest(values: npt.NDArray[Any]) -> str:
    """SHA-256 over values as they lie in memory."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
