"""The commands and programs in README and docs do what they say, and the site builds without a warning."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ivc_export import cli
from samples.make_sample import make_checkpoint
from tests.repository.pages import PAGES, ROOT, Block, blocks, commands, missing, read

RUN = ("bash", "python")
CODE = re.compile(r"# exit code (\d+)$")


def examples(page: Path) -> list[Block]:
    """A page's blocks that tests run, in order."""
    return [block for block in blocks(read(page)) if block.language in RUN]


def run(line: str) -> int:
    """A command line, as the shell would run it."""
    name, *arguments = shlex.split(line, comments=True)
    if name == "cp":
        shutil.copy(*arguments)
        return 0
    if name == "python":
        module, *arguments = arguments[1:]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *arguments])
            runpy.run_module(module, run_name="__main__")
        return 0
    code: int = getattr(cli, name.replace("-", "_"))(arguments)
    return code


def run_block(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run a block's program, or its commands, and look for the lines that the page says it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
        else:
            for line in commands(block.text):
                code = CODE.search(line)
                assert run(line) == (int(code[1]) if code else 0), f"{line}\n{printed.getvalue()}"
    assert printed.getvalue().strip() or block.language == "bash"
    assert [*missing(block.printed or "", printed.getvalue())] == [], printed.getvalue()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if examples(page)], ids=lambda page: str(page.relative_to(ROOT))
)
@pytest.mark.filterwarnings("ignore:.*samples.make_sample.*:RuntimeWarning")  # runpy: it is imported already
def test_every_command_and_program_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    make_checkpoint(tmp_path / "demo" / "checkpoint")
    names: dict[str, Any] = {}
    for block in examples(page):
        run_block(block, page, names)
    for name in re.findall(r"--show (\S+)", "".join(block.text for block in examples(page))):
        assert (tmp_path / name).is_file()


def test_readme_and_getting_started_have_examples() -> None:
    counts = {page.name: len(examples(page)) for page in PAGES if page.parent.name != "spatial-vl"}
    assert counts["README.md"] >= 1 and counts["getting-started.md"] >= 7


@pytest.mark.parametrize(
    ("wanted", "printed"), [("b\na", "a\nb"), ("a ... c", "a b"), ("kept ... of 4", "kept 2 of 43"), ("a", "")]
)
def test_a_line_that_is_not_printed_is_seen(wanted: str, printed: str) -> None:
    assert [*missing(wanted, printed)]


def test_lines_that_are_printed_are_found() -> None:
    assert [*missing("answer\n\nkept ... of 64", "first\n answer\nmore\nkept 32 of 64")] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "docs"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_what_a_page_outside_of_the_site_links_to_exists(page: Path) -> None:
    """Links of the site's own pages are checked when it is built."""
    for target, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", read(page)):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
            assert not anchor or anchor in anchors(page.parent / target), anchor


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "What it buys, honestly" in home and "fonts.googleapis" not in home
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "Turn a checkpoint into a bundle of three graphs." in api
