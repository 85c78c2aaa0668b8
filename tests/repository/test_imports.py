from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from ivc_export import families

PACKAGE = Path(__file__).parents[2] / "ivc_export"
ORDER = [  # from the bottom up; a module imports from its own line or from lower ones
    {"errors", "dtypes"},
    {"files"},
    {"contract"},
    {"checkpoint"},
    {"graph", "text"},
    {"lowering", "selection"},
    {"families"},
    {"bundle"},
    {"source", "tensorrt"},
    {"runtime"},
    {"verify"},
    {"exporter"},
    {"bench", "calibrate"},
    {"report"},
    {"serve"},
    {"cli"},
    {"evaluate"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
NEWER = {"tomllib", "datetime.UTC", "enum.StrEnum", "contextlib.chdir", "itertools.batched"} | {
    f"typing.{name}"
    for name in ("Self", "Never", "NotRequired", "Required", "LiteralString", "Unpack", "assert_never", "override")
}
"""What the standard library has from 3.11 or 3.12 on."""
HEAVY = {
    "torch": {"verify", "calibrate", "bench"},
    "transformers": {"verify", "bench"},
    "matplotlib": {"report"},
    "tensorrt": set(),
    "polygraphy": set(),
}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "ivc_export" else {module}
    return found


def names_taken(path: Path) -> set[str]:
    """What a file imports when it is imported, as dotted names."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10)).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_newer_than_python_3_10_is_needed() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not names_taken(path) & NEWER, path


def test_imports_go_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for module in imported(path):
            parts = module.split(".")
            if parts[0] == "ivc_export" and len(parts) > 1 and parts[1] != "__version__":
                assert LEVEL[parts[1]] <= LEVEL[own], (
                    f"{path.relative_to(PACKAGE)} imports {module}, which lies above it"
                )


def test_the_reference_shares_no_code_with_what_it_checks() -> None:
    parts = ("dequantised", "attended", "drawn", "reference_picture", "two_views")
    known = {"ivc_export.contract.manifest", "ivc_export.dtypes", "ivc_export.errors"}
    known |= {f"ivc_export.verify.{part}" for part in parts}
    for name in ("reference.py", *(f"{part}.py" for part in parts)):
        own = {module for module in imported(PACKAGE / "verify" / name) if module.startswith("ivc_export")}
        assert own <= known, name


def test_heavy_packages_are_imported_where_they_belong() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imported(path):
            assert own in HEAVY.get(module.split(".")[0], {own}), f"{path} imports {module}"


def test_the_registry_names_every_family() -> None:
    files = (PACKAGE / "families").glob("*.py")
    found = [path.stem for path in files if "\nFAMILY = " in path.read_text(encoding="utf-8")]
    assert tuple(sorted(found)) == families.names()


def test_no_family_is_named_outside_its_file() -> None:
    names = families.names()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "families":
            assert not [name for name in names if name in path.read_text(encoding="utf-8")], path


def test_the_commands_start_without_torch_and_onnxruntime() -> None:
    code = """import sys, ivc_export.cli.export, ivc_export.cli.run, ivc_export.cli.check, ivc_export.cli.bench
print({"torch", "matplotlib", "onnxruntime"} & {*sys.modules})"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_public_functions_and_classes_have_names_of_their_own() -> None:
    """A family's file and a command's have the same parts each; the reference scores by itself what it checks."""
    homes: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(path)
    twice = {name: paths for name, paths in homes.items() if len(paths) > 1 and name != "token_scores"}
    for name, paths in twice.items():
        folders = {path.parent.name for path in paths}
        assert folders in ({"families"}, {"cli"}), f"{name} stands in {', '.join(map(str, paths))}"


def test_no_file_is_longer_than_can_be_read_at_once() -> None:
    """A longer one says in its docstring, by the word lines, why it is."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400 or " lines" in (ast.get_docstring(ast.parse(text)) or ""), path
