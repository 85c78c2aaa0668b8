"""Whatever is wrong with a file, a command answers or says so in one sentence; see tests/cli/fuzz.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cli.fuzz import prepare

MUTANTS = 500
PROCESSES = 2


def test_mutants_of_all_files_are_answered_or_refused(tmp_path: Path) -> None:
    """In processes of their own, which a crash or a hang in native code ends."""
    prepare(tmp_path)
    share = MUTANTS // PROCESSES
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.cli.fuzz",
                str(tmp_path),
                "--seed",
                str(number * share),
                "--count",
                str(share),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for number in range(PROCESSES)
    ]
    for process in running:
        said, _ = process.communicate()
        faults = [line for line in said.splitlines() if line.startswith("FAULT")]
        assert not faults, "\n".join(faults)
        assert process.returncode == 0, said[-4000:]
        assert said.count(": ") >= share
