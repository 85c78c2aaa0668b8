"""What the pages of docs name is there: files, public names, errors, folders of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ivc_export
from ivc_export import cli

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ivc_export"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("ivc_export", "tests", "samples", "benchmarks", "graphs", "tools", "docs")
FILES = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*")}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def source_files(text: str) -> list[str]:
    """Python files that a page names, and results and tests by their folders."""
    named = re.findall(r"`((?:[\w-]+/)*\w+\.py)`", text)
    return named + re.findall(r"`((?:benchmarks|tests|samples|graphs|tools)/[\w./-]*)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in source_files(read(page)):
        wanted = name.rstrip("/")
        assert any(file == wanted or file.endswith(f"/{wanted}") for file in FILES) or wanted in FOLDERS, name


def test_the_map_has_every_folder_of_the_package() -> None:
    named = set(
        re.findall(r"^\| `(\w+)/` \|", read(ROOT / "docs" / "map.md").split("Beside the package")[0], re.MULTILINE)
    )
    assert named == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}


def test_the_api_page_has_every_public_name() -> None:
    named = re.findall(r"^::: ([\w.]+)$", read(ROOT / "docs" / "api.md"), re.MULTILINE)
    assert sorted(name.rpartition(".")[2] for name in named) == sorted(ivc_export.__all__)
    for name in named:
        assert name.rpartition(".")[0] == getattr(ivc_export, name.rpartition(".")[2]).__module__


def sentences() -> list[str]:
    """Every string of the package, with ... in the place of what is filled in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_errors_of_the_troubleshooting_page_are_what_commands_print() -> None:
    headings = re.findall(r"^### (.+)$", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    known = sentences()
    assert len(headings) >= 25 and len({*headings}) == len(headings)
    assert [heading for heading in headings if not any(heading.strip() in one for one in known)] == []


def test_the_troubleshooting_page_is_by_command() -> None:
    groups = re.findall(r"^## (.+)$", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    named = {name for group in groups for name in re.findall(r"ivc-\w+", group)}
    assert named and named <= {name.replace("_", "-") for name in vars(cli) if name.startswith("ivc_")}


def test_the_page_of_exit_codes_has_every_code() -> None:
    (run,) = (
        node for node in ast.parse(read(PACKAGE / "cli" / "__init__.py")).body if "run_command" in ast.dump(node)[:40]
    )
    given = (node.value for node in ast.walk(run) if isinstance(node, ast.Return))
    codes = {value.value for value in given if isinstance(value, ast.Constant)}
    assert {2, 130, 141} <= codes
    rows = re.findall(r"^\| ([\d, ]+) \|", read(ROOT / "docs" / "exit-codes.md"), re.MULTILINE)
    told = {int(code) for row in rows for code in row.split(", ")}
    assert told == {0, 1} | codes | {128 + number for number in cli.ENDING}


def test_every_page_is_in_the_sites_navigation() -> None:
    named = re.findall(r": ([\w-]+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", ["graphs.svg", "selection.svg"])
def test_figures_are_small_and_take_nothing_from_elsewhere(name: str) -> None:
    figure = read(ROOT / "docs" / name)
    assert len(figure) < 8_000 and "<text" in figure and "<title" in figure
    assert re.findall(r"\w+://[^\"]*", figure) == ["http://www.w3.org/2000/svg"]
    assert "<image" not in figure and f"]({name})" in read(ROOT / "docs" / "how-it-works.md")


def test_the_glossary_is_sorted_and_has_each_term_once() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", read(ROOT / "docs" / "glossary.md"), re.MULTILINE)
    terms = [term.lower() for term, _ in rows]
    assert len(terms) > 50 and terms == sorted(set(terms))
    assert all(meaning.endswith(".") for _, meaning in rows)


def test_readme_and_changelog_name_this_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', read(ROOT / "pyproject.toml"), re.MULTILINE)
    assert f"version = {{{version}}}" in read(ROOT / "README.md")
    assert f"\n## {version}" in read(ROOT / "CHANGELOG.md")
