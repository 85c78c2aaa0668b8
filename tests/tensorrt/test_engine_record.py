"""build.json: what is read of it, what is refused, and whose plugin is loaded. With a stand-in for TensorRT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.integrity import verify_files
from ivc_export.contract.names import MANIFEST
from ivc_export.errors import UserError
from ivc_export.runtime.tensorrt import session as tensorrt
from ivc_export.runtime.tensorrt.session import TensorrtSession
from ivc_export.tensorrt.build import build
from ivc_export.tensorrt.recipe import EngineRecipe
from ivc_export.tensorrt.store import RECORD, find_engines
from tests.runtime.fake_tensorrt import CAPABILITY, FakeTensorrt, HostDevice, folder_of, put_engines

MAXIMA: dict[str, Any] = {"max_visual": 256, "max_text": 64, "max_new": 64}


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A copy, with a stand-in for TensorRT that would load anything."""
    found = Bundle.load(shutil.copytree(sample_bundle.folder, tmp_path / "bundle"))
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda target: FakeTensorrt(found))
    monkeypatch.setattr(tensorrt, "own_capability", lambda trt: CAPABILITY)
    monkeypatch.setattr(tensorrt, "CudaDevice", HostDevice)
    return found


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Libraries that were loaded."""
    found: list[Path] = []
    monkeypatch.setattr(tensorrt, "load_plugin", found.append)
    return found


def write(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what build.json says."""
    path = folder_of(bundle) / RECORD
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Set a field, by its path."""

    def change(content: dict[str, Any]) -> None:
        *way, last = name.split(".")
        for part in way:
            content = content[part]
        content[last] = value

    return change


BAD: list[tuple[str, Any, str]] = [
    ("capacity", 10**12, "capacity is 1000000000000, but the recipe's maxima give 384"),
    ("capacity", 385, "capacity is 385, but the recipe's maxima give 384"),
    ("capacity", "384", "capacity: Input should be a valid integer"),
    ("capacity", True, "capacity: Input should be a valid integer"),
    ("capacity", 384.5, "capacity: Input should be a valid integer"),
    ("capacity", None, "capacity: Input should be a valid integer"),
    ("recipe.max_visual", 0, "max-visual 0 is out of range: give 1 to"),
    ("recipe.max_visual", 10**30, "max-visual 1000000000000000000000000000000 is out of range"),
    ("recipe.max_text", [64], "recipe.max_text: Input should be a valid integer"),
    ("recipe.workspace", 0, "workspace 0 is out of range"),
    ("recipe.optimization_level", 7, "optimization-level 7 is out of range"),
    ("recipe.tactic_sources", "CUBLAS", "recipe.tactic_sources: Input should be a valid"),
    ("recipe.dtype", "float8", "recipe.dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
    ("recipe.dtype", "bfloat16", "dtype is float32, but the recipe has bfloat16"),
    ("recipe.extra", 1, "recipe.extra: "),
    ("recipe", [], "recipe: Input should be"),
    ("extra", 1, "extra: Extra inputs are not permitted"),
    ("dtype", "double", "dtype: Input should be 'float32'"),
    ("target", "tensorrt-rtx", "the recipe is for another target"),
    ("tensorrt", "8.6.0\nand more", "tensorrt: String should match"),
    ("compute_capability", "../..", "compute_capability: String should match"),
    ("residual_scale", 0, "residual_scale is 0"),
    ("residual_scale", -0.0625, "residual_scale is -0.0625"),
    ("residual_scale", 0.3, "residual_scale is 0.3"),
    ("residual_scale", 0.0625, "residual_scale is 0.0625"),  # of float32 engines
    ("residual_scale", 1e300, "residual_scale is 1e+300"),
    ("residual_scale", float("nan"), "residual_scale: Input should be a finite number"),
    ("inputs_sha256", "0", "inputs_sha256: String should match"),
    ("weights_sha256", [], "weights_sha256: Input should be"),
    ("plugin_sha256", "0" * 64, "the graphs are native, but plugin and plugin_sha256 do not fit them"),
    ("graphs", "plugin", "the graphs are plugin, but plugin and plugin_sha256 do not fit them"),
    ("softmax", "float16", "softmax is float16"),  # of float32 engines
    ("attention", "operator", "attention is operator"),  # of native graphs
    ("recipe.attention", "repeated", "attention is grouped"),
    ("recipe.plugin", "/lib.so", "the graphs are native, but plugin and plugin_sha256 do not fit them"),
    ("engines.prefix.file", "../../../x.plan", "engines.prefix is not what ivc-build makes"),
    ("engines.decoder.profiles", ["prefill"], "engines.decoder is not what ivc-build makes"),
    ("engines.decoder.profiles", "prefill", "engines.decoder.profiles: Input should be a valid"),
    ("engines.vision.bytes", -1, "engines.vision.bytes: Input should be greater than 0"),
    ("engines", {}, "engines.vision is not what ivc-build makes"),
    ("engines.other", {"file": "x", "bytes": 1, "profiles": []}, "engines.other."),
]


def test_a_damaged_record_is_one_sentence(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """With the command that builds the engines, and exit code 2, whatever field is damaged, or missing."""
    put_engines(bundle, **MAXIMA)
    path = folder_of(bundle) / RECORD
    whole = path.read_text()
    cases = [(put(name, value), sentence) for name, value, sentence in BAD]
    for name in json.loads(whole):
        cases.append((lambda content, name=name: content.pop(name), f"{name}: Field required"))  # type: ignore[misc]
    for change, sentence in cases:
        path.write_text(whole)
        write(bundle, change)
        assert cli.ivc_run([str(bundle.folder), "--prompt", "x", "--backend", "tensorrt"]) == 2, sentence
        said = capsys.readouterr().err
        assert f"{RECORD} cannot be used ({sentence}" in said, said
        assert said.startswith("error: ") and said.count("\n") == 1
        assert said.endswith(f": build them with ivc-build {bundle.folder} --target tensorrt\n")


@pytest.mark.parametrize("name", ["engines", "build.json", "prefix.plan"])
def test_links_out_of_the_bundle_are_not_followed(bundle: Bundle, name: str, tmp_path: Path) -> None:
    put_engines(bundle, **MAXIMA)
    path = bundle.folder / name if name == "engines" else folder_of(bundle) / name
    path.symlink_to(path.rename(tmp_path / name))
    with pytest.raises(UserError, match=r"which is outside the bundle or a link to a place outside it: .*ivc-build"):
        TensorrtSession(bundle)
    if name == "engines":
        with pytest.raises(UserError, match=r"a link to a place outside it: remove the link"):
            build(bundle, EngineRecipe(target="tensorrt-rtx", compute_capability="8.6", opt_visual=1, max_visual=16))


def test_a_missing_engine_is_one_sentence(bundle: Bundle) -> None:
    put_engines(bundle, **MAXIMA)
    (folder_of(bundle) / "vision.plan").unlink()
    with pytest.raises(UserError, match=r"vision\.plan is missing: build them with ivc-build"):
        TensorrtSession(bundle)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 99 + "]" * 99, "\0"])
def test_what_is_no_record_is_one_sentence(bundle: Bundle, content: str) -> None:
    put_engines(bundle, **MAXIMA)
    (folder_of(bundle) / RECORD).write_text(content)
    with pytest.raises(UserError, match=r"build\.json is damaged .*: build them with ivc-build"):
        TensorrtSession(bundle)


def test_the_residual_scale_is_the_records(bundle: Bundle) -> None:
    """Not this version's own: hidden states are looked at in the scale that the engines were built with."""
    put_engines(bundle, "float16", **MAXIMA)
    found = []
    for scale in (2.0**-4, 2.0**-5):
        write(bundle, put("residual_scale", scale))
        found.append(TensorrtSession(bundle).converse().run([1, 2, 3]).prefix["hidden_states"])
    assert (found[1] == 2 * found[0]).all() and found[0].any()


def test_weights_that_are_hashed_later_leave_engines_as_they_were(bundle: Bundle) -> None:
    """`ivc-check --weights` adds what an older manifest lacks; a hash that both sides know must be the same."""
    path = bundle.folder / MANIFEST
    content = json.loads(path.read_text())
    content["weights"][0]["sha256"] = None
    path.write_text(json.dumps(content))
    older = Bundle.load(bundle.folder)
    put_engines(older, **MAXIMA)
    hashed = verify_files(older)
    assert hashed.manifest.weights[0].sha256 is not None
    find_engines(hashed, "tensorrt", CAPABILITY, FakeTensorrt)
    put_engines(hashed, **MAXIMA)
    find_engines(hashed, "tensorrt", CAPABILITY, FakeTensorrt)
    find_engines(older, "tensorrt", CAPABILITY, FakeTensorrt)
    write(bundle, put("weights_sha256", {hashed.manifest.weights[0].file: "0" * 64}))
    with pytest.raises(UserError, match="built from other graphs or weights: build them with"):
        find_engines(hashed, "tensorrt", CAPABILITY, FakeTensorrt)


def with_plugin(bundle: Bundle, library: Path) -> None:
    """Engines whose record names a library; the stand-in calls none."""
    library.write_bytes(b"a library")
    put_engines(bundle, **MAXIMA, plugin=library)


def test_a_library_that_a_record_names_is_not_loaded(
    bundle: Bundle, loaded: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_plugin(bundle, tmp_path / "libivc_plugin.so")
    command = ["--prompt", "x", "--backend", "tensorrt"]
    assert cli.ivc_run([str(bundle.folder), *command]) == 2
    said = capsys.readouterr().err
    assert said.endswith("use our plugin: give its library, libivc_plugin.so, with --plugin\n") and not loaded
    other = tmp_path / "other.so"
    other.write_bytes(b"another library")
    assert cli.ivc_run([str(bundle.folder), *command, "--plugin", str(other)]) == 2
    said = capsys.readouterr().err
    assert f"{other} is not the plugin that the engines in" in said and "(its SHA-256 differs)" in said
    assert not loaded
    assert cli.ivc_run([str(bundle.folder), *command, "--plugin", str(tmp_path / "none.so")]) == 2
    assert "none.so is missing: give the path of the plugin, libivc_plugin.so" in capsys.readouterr().err
    copy = (tmp_path / "libivc_plugin.so").rename(tmp_path / "moved.so")
    TensorrtSession(bundle, plugin=copy)
    assert loaded == [copy]


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        (cli.ivc_run, ["--prompt", "x", "--backend", "tensorrt"], "use no plugin: leave out --plugin"),
        (cli.ivc_check, ["--onnx-only", "--backend", "tensorrt"], "use no plugin: leave out --plugin"),
        (cli.ivc_bench, ["--backend", "tensorrt"], "use no plugin: leave out --plugin"),
        (cli.ivc_run, ["--prompt", "x"], "--plugin is for tensorrt: use it with --backend tensorrt"),
        (cli.ivc_check, ["--onnx-only"], "--plugin is for tensorrt: use it with --backend tensorrt"),
        (cli.ivc_bench, [], "--plugin is for tensorrt: use it with --backend tensorrt"),
    ],
)
def test_a_plugin_that_nothing_calls_is_refused(
    command: Callable[[list[str]], int],
    arguments: list[str],
    sentence: str,
    bundle: Bundle,
    loaded: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_engines(bundle, **MAXIMA)
    assert command([str(bundle.folder), *arguments, "--plugin", "lib.so"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1 and not loaded
