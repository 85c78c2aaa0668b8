"""The commands and the program in README do what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ivc_export import cli
from samples.make_sample import make_checkpoint

ROOT = Path(__file__).parent.parent
COMMANDS = {"ivc-export": cli.ivc_export, "ivc-run": cli.ivc_run, "ivc-check": cli.ivc_check}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_commands_and_the_program_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    make_checkpoint(tmp_path / "demo" / "checkpoint")
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        name, *arguments = shlex.split(line)
        assert COMMANDS[name](arguments) == 0, line
    assert (tmp_path / "demo" / "shown.png").is_file()
    capsys.readouterr()
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
