"""The pages of the repository, and the blocks of commands and programs that stand on them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("samples/*/README.md")),
]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {
    "bash": "commands that tests run",
    "python": "programs that tests run, those of a page one after the other in one namespace",
    "output": "lines that the block before prints, `...` for what differs between runs",
    "console": "commands behind `$ ` whose options tests parse (a GPU, a Jetson, the hub); the rest is output",
    "py": "Python that tests compile, and whose imports of ivc_export they resolve",
    "yaml": "tests load it, and parse the commands of a workflow",
    "json": "tests load it",
    "c": "tests compile those of docs/cpp.md, where there is a compiler",
    "cpp": "the same; in docs/cpp-api.md they are declarations of headers",
    "cmake": "",
    "text": "",
}
"""What a block's language means for tests."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    printed: str | None = None
    """What it prints, if the next block is `output`."""


def read(page: Path) -> str:
    """A page's text."""
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """A page's blocks in order, an `output` one with the block before it."""
    found: list[Block] = []
    for language, inside in FENCE.findall(text):
        content = textwrap.dedent(inside)
        if language == "output":
            assert found and found[-1].printed is None, f"no block prints this: {content}"
            found[-1] = Block(found[-1].language, found[-1].text, content)
        else:
            found.append(Block(language, content))
    return found


def commands(text: str) -> list[str]:
    """The whole command lines of a block, without comments on lines of their own; backslashes join lines."""
    joined = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in joined if line.strip() and not line.lstrip().startswith("#")]


def prompted(text: str) -> list[str]:
    """The command lines of a `console` block, behind their prompts."""
    return [line.removeprefix("$ ") for line in commands(text) if line.startswith("$ ")]


def missing(wanted: str, printed: str) -> Iterator[str]:
    """Lines of an `output` block that were not printed, or not in this order."""
    left = iter(printed.splitlines())
    for line in wanted.splitlines():
        pattern = re.compile(".*".join(map(re.escape, line.strip().split("..."))))
        if line.strip() and not any(pattern.fullmatch(one.strip()) for one in left):
            yield line
