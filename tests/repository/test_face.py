"""What `import ivc_export` offers to programs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ivc_export

ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
NAMES = [
    "Bundle",
    "Chat",
    "ExportRecipe",
    "Method",
    "Quantisation",
    "Sampling",
    "UserError",
    "Video",
    "export",
    "open_bundle",
    "open_session",
]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_face_is_these_names_and_each_is_there() -> None:
    assert ivc_export.__all__ == NAMES
    taken: dict[str, object] = {}
    exec("from ivc_export import *", taken)
    assert sorted({*taken} - {"__builtins__"}) == NAMES
    assert {*NAMES} <= {*dir(ivc_export)}
    for name in NAMES:
        assert taken[name] is getattr(ivc_export, name)
        assert taken[name].__doc__, f"{name} says nothing of itself"


def test_the_face_has_nothing_else() -> None:
    with pytest.raises(AttributeError, match=r"module 'ivc_export' has no attribute 'exprot'"):
        _ = ivc_export.exprot  # type: ignore[attr-defined]


def test_types_are_checked_against_the_modules_that_names_come_from() -> None:
    """What mypy reads is what Python imports."""
    tree = ast.parse((ROOT / "ivc_export" / "__init__.py").read_text(encoding="utf-8"))
    found = {a.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    found.pop("TYPE_CHECKING")
    assert found == {name: f"ivc_export.{home}" for name, home in vars(ivc_export)["_HOMES"].items()}
    assert sorted(found) == NAMES


def test_importing_the_package_imports_nothing_else() -> None:
    known = {"ivc_export"} | {*sys.stdlib_module_names}
    loaded = {name.partition(".")[0] for name in python("import sys, ivc_export; print(*sys.modules)").split()}
    bare = {name.partition(".")[0] for name in python("import sys; print(*sys.modules)").split()}
    assert loaded - bare <= known


def test_a_public_name_loads_only_what_it_needs() -> None:
    heavy = {"numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "torch"}
    loaded = {*python("import sys; from ivc_export import UserError; print(*sys.modules)").split()}
    assert not loaded & heavy and "ivc_export.errors" in loaded


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_examples_need_nothing_below_the_face(page: Path) -> None:
    for program in EXAMPLE.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ivc_export"):
                assert node.module == "ivc_export" and {alias.name for alias in node.names} <= {*NAMES}
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("ivc_export.")]


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_every_option(name: str) -> None:
    """Of functions and constructors, and of what they hold: each argument, and the errors that they raise."""
    found = getattr(ivc_export, name)
    text = inspect.getdoc(found) or ""
    named = {*re.findall(r"^    (\w+): ", text, re.MULTILINE)}
    if name != "UserError":
        assert {*inspect.signature(found).parameters} <= named, name
    for member, value in vars(found).items() if inspect.isclass(found) else ():
        function = getattr(value, "__func__", value)
        if member[0] != "_" and (inspect.isfunction(function) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member} says nothing of itself"
