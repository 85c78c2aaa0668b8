"""Commands in READMEs and docs that no test can run (a GPU, a Jetson, the hub) have options that exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from ivc_export import cli
from ivc_export.errors import UserError
from tests.repository import pages
from tests.repository.pages import FENCE, LANGUAGES, ROOT, blocks, commands, prompted

PAGES = [page for page in pages.PAGES if page.name != "commands.md"]  # which is made of the parsers
SPAN = re.compile(r"`([^`]+)`")
OPTION = re.compile(r"--[a-z][\w-]*")
COMMANDS: dict[str, argparse.ArgumentParser] = {
    name.replace("_", "-"): importlib.import_module(f"ivc_export.cli.{name.removeprefix('ivc_')}").parser()
    for name in tuple(vars(cli))
    if name.startswith("ivc_")
}
PROGRAMS = ROOT / "runtime" / "cpp" / "programs"
NATIVE = {  # programs in C++, and the files that name their options
    "build/ivc_sample": [ROOT / "samples" / "cpp" / "main.cpp"],
    "ivc-cpp": [PROGRAMS / "ivc-cpp.cpp", PROGRAMS / "devices.h"],
    "build/ivc-cpp": [PROGRAMS / "ivc-cpp.cpp", PROGRAMS / "devices.h"],
    "ivc-cpp-bench": [PROGRAMS / "ivc-cpp-bench.cpp", PROGRAMS / "devices.h"],
    "build/ivc-cpp-bench": [PROGRAMS / "ivc-cpp-bench.cpp", PROGRAMS / "devices.h"],
}
OTHERS = (*NATIVE, "cmake", "make", "pip", "python")
"""Programs that are looked at."""
LEFT_OUT = {
    "apt-get": "the system's packages",
    "cd": "the shell's",
    "chmod": "the system's",
    "cp": "the system's; test_readme.py runs it",
    "curl": "asks a server that runs",
    "docker": "its options are its own",
    "export": "the shell's",
    "fallocate": "the system's",
    "git": "its options are its own",
    "hf": "huggingface_hub's, which asks for a login",
    "lmms-eval": "not installed beside the tests: tests/evaluate runs it in its own environment",
    "mkswap": "the system's",
    "nvpmodel": "a Jetson's",
    "jetson_clocks": "a Jetson's",
    "tegrastats": "a Jetson's",
    "python3": "makes an environment, before anything is installed",
    "ray": "Ray's own",
    "scp": "copies to another machine",
    "serve": "Ray's own",
    "source": "the shell's",
    "ssh": "reaches another machine",
    "swapon": "the system's",
    "torchrun": "PyTorch's, on several GPUs",
    "trtexec": "TensorRT's own",
    ".": "the shell's",
}
"""Programs whose options no test looks at, and why; any other has no place in a block of commands."""
ASSIGNED = re.compile(r"^(?:[A-Z_]+=\S* +)+")


def lines(text: str) -> list[str]:
    """Whole command lines: of blocks in a shell's language, and of workflows."""
    found = []
    for block in blocks(text):
        if block.language == "bash":
            found += commands(block.text)
        elif block.language == "console":
            found += prompted(block.text)
        elif block.language == "yaml":
            found += re.findall(r"run: (.+)", block.text)
    return found


def spans(text: str) -> list[str]:
    """Parts of commands within sentences: a program with some of its options, or options alone."""
    found = [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]
    return [span for span in found if span.startswith("--") or span.split(" ")[0] in {*COMMANDS, *OTHERS}]


def check_line(line: str) -> None:
    """Check one whole line, each of its commands."""
    for part in re.split(r" && | \| ", line.replace("optimum-cli export ivc", "ivc-export")):
        name, *arguments = shlex.split(ASSIGNED.sub("", part.removeprefix("sudo ")), comments=True)
        if name in COMMANDS:
            COMMANDS[name].parse_args(arguments)
        elif name not in LEFT_OUT:
            check_other(name, arguments)


def check_span(span: str) -> None:
    """Check the options of a part of a command, and values that are one of few."""
    name, *arguments = span.split() if not span.startswith("--") else ("", *span.split())
    if name in OTHERS:
        check_other(name, [argument.strip("'\"") for argument in arguments])
        return
    parsers = [COMMANDS[name]] if name else [*COMMANDS.values()]
    problems = [mistaken(parser, arguments) for parser in parsers]
    if not name and has_options("ivc-cpp", arguments):
        return
    assert None in problems, problems[0]


def mistaken(parser: argparse.ArgumentParser, arguments: list[str]) -> str | None:
    """What of these the command does not take; None if it takes all."""
    for argument, value in itertools.pairwise([*arguments, "--"]):
        if OPTION.match(argument):
            action = parser._option_string_actions.get(argument)
            if action is None:
                return f"{parser.prog} has no {argument}"
            given = [] if value.startswith("-") or value.isupper() else value.split("|")
            wrong = [one for one in given if action.choices is not None and one not in action.choices]
            if wrong:
                return f"{parser.prog} takes no {argument} {wrong[0]}"
    return None


def check_other(name: str, arguments: list[str]) -> None:
    """Check that a command of another program names what is here."""
    assert name in OTHERS, f"{name} is no command that a test looks at"
    if name == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), arguments
    elif name == "python" and arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]) is not None, arguments[1]
    elif name == "pip":
        extras = "".join(re.findall(r"\[(.+?)\]", " ".join(arguments))).split(",")
        declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
        assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras if extra), arguments
    elif name == "cmake" and "-S" in arguments:
        source = ROOT / arguments[arguments.index("-S") + 1] / "CMakeLists.txt"
        defined = re.findall(r"-D(\w+)=", " ".join(arguments))
        assert all(variable in source.read_text(encoding="utf-8") for variable in defined), arguments
    elif name in NATIVE:
        assert has_options(name, arguments), arguments


def has_options(name: str, arguments: list[str]) -> bool:
    """Whether a program in C++ has these options."""
    text = "".join(file.read_text(encoding="utf-8") for file in NATIVE[name])
    return all(f'"{option}"' in text for option in arguments if option.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_has_options_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for line in lines(text):
        check_line(line)
    for span in spans(text):
        check_span(span)


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_is_of_a_language_that_tests_know(page: Path) -> None:
    for block in blocks(pages.read(page)):
        assert block.language in LANGUAGES, f"{block.language or 'no language'}: {block.text}"
        if block.language == "console":
            assert prompted(block.text), f"a command of a console block begins with $: {block.text}"
        elif block.language == "py":
            check_program(block.text)
        elif block.language == "yaml":
            importlib.import_module("yaml").safe_load(block.text)
        elif block.language == "json":
            json.loads(block.text)


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_of_a_page_stands_outside_a_fenced_block(page: Path) -> None:
    known = {*COMMANDS, *OTHERS, *LEFT_OUT, "optimum-cli", "sudo", "$"}
    indented = re.findall(r"^ {4}(\S+)", FENCE.sub("", pages.read(page)), re.MULTILINE)
    assert not known & {*indented}


def test_every_command_that_can_runs_on_a_page() -> None:
    shells = (block for page in pages.PAGES for block in blocks(pages.read(page)) if block.language == "bash")
    run = {line.split()[0] for block in shells for line in commands(block.text)}
    assert {*COMMANDS} - run == {"ivc-build", "ivc-serve"}  # which needs TensorRT, and which does not end


def check_program(text: str) -> None:
    """Check that a program is one, and that what it imports of the package is there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ivc_export":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_commands_are_found() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"ivc-export --model qwen2-vl-2b --ratio 0.5", "ivc-check --against"} <= {*spans(text)}
    assert "ivc-export --model samples/spatial-vl --ratio 0.5 --output demo/bundle" in lines(text)
    assert sum(line.startswith("ivc-") for page in PAGES for line in lines(page.read_text(encoding="utf-8"))) > 25
    workflow = lines((ROOT / "docs" / "ci.md").read_text(encoding="utf-8"))
    assert {line.split()[0] for line in workflow[:10]} >= {"pip", "ivc-export", "ivc-check", "ivc-bench"}


@pytest.mark.parametrize(
    "span",
    [
        "ivc-run --no-such-option",
        "--no-such-option",
        "ivc-build --target cuda",
        "make nothing",
        "python -m no_such_module",
    ],
)
def test_a_command_that_does_not_exist_is_seen(span: str) -> None:
    with pytest.raises(AssertionError):
        check_span(span)


@pytest.mark.parametrize(
    "line",
    [
        "ivc-run BUNDLE --picture a.png",
        "nothing --at-all",
        "sudo nothing",
        "A=1 ivc-check BUNDLE --onnx-onli",
        "cd build && make nothing",
        "curl example.org | nothing",
    ],
)
def test_a_line_that_cannot_run_is_seen(line: str) -> None:
    with pytest.raises((AssertionError, UserError)):
        check_line(line)


def test_a_program_whose_import_is_not_there_is_seen() -> None:
    with pytest.raises(AssertionError, match="Nothing"):
        check_program("from ivc_export import Nothing")


def test_no_program_is_both_looked_at_and_left_out() -> None:
    assert not {*COMMANDS, *OTHERS} & {*LEFT_OUT}


def test_the_workflow_is_one() -> None:
    (block,) = (block for block in blocks(pages.read(ROOT / "docs" / "ci.md")) if block.language == "yaml")
    workflow = importlib.import_module("yaml").safe_load(block.text)
    assert [*workflow["jobs"]["parity"]["steps"][-1]["with"]] == ["name", "path"]
