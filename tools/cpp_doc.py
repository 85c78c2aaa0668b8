"""Writes docs/cpp-api.md from the declarations in the C++ runtime's headers and their comments.

The headers have one style. A comment stands on its own lines before a declaration, and belongs to all declarations that
follow without a blank line; or it stands behind a declaration, on its line. This module reads comments, brackets and
semicolons, and no other part of C++.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

HEADERS = Path(__file__).parent.parent / "runtime" / "cpp" / "include" / "ivc"
FIRST = ("ivc.h", "bundle.h", "chat.h", "onnxruntime.h", "tensorrt.h", "device.h", "image.h", "visual.h", "plan.h")
"""The first headers, in this order; the others follow by name."""
LEFT_OUT = ("contract.h",)
"""Headers with nothing but constants, which are generated from the contract."""
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
TYPE = re.compile(r"(?:typedef )?(?P<kind>class|struct|enum class|enum) (?P<name>\w+)[^;()]*\{", re.DOTALL)
ACCESS = re.compile(r"(public|private|protected):")
SKIPPED = re.compile(r'(?:#(?:[^\n]*\\\n)*[^\n]*|extern "C" \{|namespace \w* ?\{|using [^;=]*;|friend [^;]*;)')
BUILT = re.compile(r"(~?\w+\(.*\) = (default|delete)|operator=)|^~")
"""Members that every class has."""


@dataclass
class Declaration:
    """A declaration and its comment.

    code: without the bodies of functions. about: the comment. group: declarations of one number share a comment.
    behind: whether the comment stands behind it. members: the public ones of a class or struct.
    """

    code: str
    about: str
    group: int
    behind: bool = False
    members: list[Declaration] = field(default_factory=list)

    @property
    def is_function(self) -> bool:
        """Whether it is a function."""
        plain = not TYPE.match(self.code) and not self.code.startswith(("typedef", "constexpr", "using"))
        return plain and "(" in self.code.partition("=")[0]

    @property
    def heading(self) -> str:
        """Its heading on the page; empty for functions and values."""
        found = TYPE.match(self.code)
        return f"{found['kind']} {found['name']}" if found else ""


def said(comment: str) -> str:
    """The text of a comment."""
    lines = comment.removeprefix("/*").removesuffix("*/").splitlines()
    return "\n".join(re.sub(r"^\s*(//|\*)? ?", "", line).rstrip() for line in lines).strip()


def end_of(text: str, start: int) -> int:
    """Where a declaration ends: after its semicolon or its body."""
    depth, at = 0, start
    while at < len(text):
        comment = COMMENT.match(text, at)
        if comment:
            at = comment.end()
            continue
        depth += (text[at] in "({[") - (text[at] in ")}]")
        at += 1
        if depth == 0 and (text[at - 1] == ";" or (text[at - 1] == "}" and not re.match(r"\s*\w*[;,]", text[at:]))):
            return at
    raise ValueError(f"a declaration does not end: {text[start : start + 60]!r}")


def read(text: str) -> Iterator[Declaration]:
    """The declarations of a header, or of a body's public part."""
    at, comment, group, public = 0, "", 0, True
    while at < len(text):
        blank = re.compile(r"\s+").match(text, at)
        if blank:
            if blank[0].count("\n") > 1:
                comment, group = "", group + 1
            at = blank.end()
            continue
        own = re.compile(r"(?:(?://[^\n]*|/\*.*?\*/)[ \t]*\n?[ \t]*)+", re.DOTALL).match(text, at)
        if own:
            comment, at, group = "\n".join(map(said, COMMENT.findall(own[0]))), own.end(), group + 1
            if text[at : at + 1] == "\n":  # of no declaration
                comment = ""
            continue
        access = ACCESS.match(text, at)
        if access:
            public, at, comment = access[1] == "public", access.end(), ""
            continue
        skipped = SKIPPED.match(text, at)
        if skipped or text[at] == "}":
            at = skipped.end() if skipped else at + 1
            continue
        start, end = at, end_of(text, at)
        behind = re.compile(r"[ \t]*(//[^\n]*|/\*.*?\*/)", re.DOTALL).match(text, end)
        about = said(behind[1]) if behind else comment
        group += bool(behind)
        if public:
            yield declared(text[at:end], about, group, bool(behind))
        at = behind.end() if behind else end
        if behind or TYPE.match(text[:end], start):
            comment, group = "", group + 1


def declared(code: str, about: str, group: int, behind: bool) -> Declaration:
    """A declaration, without the body of a function, or with the members of a class."""
    kind = TYPE.match(code)
    if kind and kind["kind"] in ("class", "struct"):
        body = code[code.index("{") + 1 : code.rindex("}")]
        inner = f"private:{body}" if kind["kind"] == "class" else body
        members = [one for one in read(inner) if not BUILT.search(one.code)]
        return Declaration(code, about, group, behind, members)
    if not kind and code.endswith("}"):
        head = re.match(r"[^{]*?\)(?: const| noexcept| override)*(?=\s*(?:\{|: ))", code, re.DOTALL)
        code = head[0] + ";" if head else code
    return Declaration(re.sub(r"\s+", " ", code).replace("( ", "("), about, group, behind)


def headers() -> list[Path]:
    """The headers that the page describes."""
    names = sorted(path.name for path in HEADERS.glob("*.h") if path.name not in LEFT_OUT)
    return [
        HEADERS / name for name in sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    ]


def undocumented() -> list[str]:
    """Functions, classes and structs of the headers that have no comment."""
    found = []
    for path in headers():
        for one in read(path.read_text(encoding="utf-8")):
            found += [f"{path.name}: {part.code.splitlines()[0]}" for part in (one, *one.members) if wants(part)]
    return found


def wants(one: Declaration) -> bool:
    """Whether a comment is missing."""
    return not one.about and (one.is_function or bool(one.heading))


def paragraph(text: str) -> str:
    """A comment as Markdown, in which angle brackets outside code are text."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in parts)


def described(declarations: Sequence[Declaration], level: int) -> list[str]:
    """Lines of the page: functions and types with their text, values with their comments as they are in the header."""
    lines = list[str]()
    for kind, shared in groupby(declarations, key=lambda one: (one.heading, one.is_function and one.group)):
        group = list(shared)
        about = [paragraph(sentence(group[0]))] if group[0].about else []
        if kind[0]:
            lines += ["", f"{'#' * level} {kind[0]}", "", *about]
        if group[0].members:
            lines += described(group[0].members, level + 1)
        elif kind[1] is not False:
            lines += ["", "```cpp", *(one.code for one in group), "```", "", *about]
        else:
            lines += ["", "```cpp", *values(group), "```", ""]
    return lines


def sentence(one: Declaration) -> str:
    """A comment as a sentence: one behind a declaration begins small and has no full stop."""
    return f"{one.about[0].upper()}{one.about[1:]}." if one.behind else one.about


def values(declarations: Sequence[Declaration]) -> list[str]:
    """Declarations of values and types with their comments."""
    lines, told = list[str](), ""
    for one in declarations:
        if one.behind:
            lines.append(f"{one.code}  // {' '.join(one.about.split())}")
            continue
        if one.about and one.about != told and not one.heading:
            lines += [f"// {line}" for line in one.about.splitlines()]
        told = one.about
        lines.append(one.code)
    return lines


def cpp_doc() -> str:
    """docs/cpp-api.md."""
    lines = [
        "# C and C++ API",
        "",
        "Generated by `make generate` from the headers in `runtime/cpp/include/ivc/`: edit those instead. "
        "[C++](cpp.md) says how to build and use the library.",
        "",
        "The C API, `ivc.h`, returns errors as values. The C++ API is in namespace `ivc`. It throws `ivc::Error` if "
        "the caller can fix the problem; its message is one sentence that says how.",
    ]
    for path in headers():
        text = path.read_text(encoding="utf-8")
        lead = re.match(r"(?://[^\n]*\n)+|/\*.*?\*/", text, re.DOTALL)
        assert lead is not None, f"{path.name} does not say what it is"
        about = "\n".join(map(said, lead[0].splitlines() if lead[0].startswith("//") else [lead[0]]))
        lines += ["", f"## {path.name}", "", paragraph(about)]
        lines += described(list(read(text[lead.end() :])), 3)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"
