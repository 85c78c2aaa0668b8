"""Engines: recipes, memory, builds by TensorRT-RTX, which needs no GPU to build, and what is stale. None is run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx as trt

from ivc_export.bundle import staging
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_build
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.tensorrt import build as engine
from ivc_export.tensorrt import compile as compiling
from ivc_export.tensorrt import footprint, graphs
from ivc_export.tensorrt.build import build
from ivc_export.tensorrt.compile import begin_timings
from ivc_export.tensorrt.footprint import estimate
from ivc_export.tensorrt.graphs import EngineChoices, graph_to_count
from ivc_export.tensorrt.memory import available_bytes
from ivc_export.tensorrt.profiles import profiles
from ivc_export.tensorrt.recipe import EngineRecipe
from ivc_export.tensorrt.store import find_engines
from samples.make_sample import make_checkpoint
from samples.tiny import TINY, wide

SMALL: dict[str, Any] = {"max_visual": 64, "max_text": 32, "max_new": 32, "opt_visual": 32, "opt_text": 16}
RTX = EngineRecipe(target="tensorrt-rtx", compute_capability="8.6", dtype="float16", **SMALL)


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy, since builds write into it."""
    return Bundle.load(shutil.copytree(sample_bundle.folder, tmp_path / "bundle"))


def test_each_graph_has_a_timing_cache(bundle: Bundle, tmp_path: Path) -> None:
    recipe = replace(RTX, timing_cache=tmp_path / "caches" / "here")
    for _ in range(2):
        build(bundle, recipe)
        assert {path.name for path in (tmp_path / "caches" / "here").iterdir()} == {f"{n}.cache" for n in GRAPH_NAMES}


def test_a_timing_cache_of_another_gpu_is_begun_anew() -> None:
    class Config:
        """TensorRT's, which takes one cache, and none of another GPU."""

        def __init__(self, taken: bytes | None) -> None:
            self.taken = taken

        def get_timing_cache(self) -> bytes | None:
            return self.taken

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            assert self.taken is None and not ignore_mismatch
            self.taken = cache
            return True

    for taken, wanted in ((None, b""), (b"of this GPU", b"of this GPU")):
        config = Config(taken)
        begin_timings(config)
        assert config.taken == wanted


def test_a_saved_timing_cache_is_the_first_that_is_set(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 8.6 takes no other in its place."""
    recipe, given, empty = replace(RTX, timing_cache=tmp_path), [], SimpleNamespace(num_layers=0)
    (tmp_path / "vision.cache").write_bytes(b"saved")

    @contextmanager
    def loaders(*_: Any) -> Iterator[Any]:
        class Loaders:
            def __getattr__(self, name: str) -> Any:
                return lambda *_, **options: told(options) if name == "create_config" else (None, empty)

        yield Loaders()

    def told(options: dict[str, Any]) -> Any:
        given.append(options["load_timing_cache"].read())
        raise UserError("enough")

    monkeypatch.setattr(compiling, "polygraphy", loaders)
    monkeypatch.setattr(compiling, "make_profile", lambda *_: None)
    monkeypatch.setattr(trt, "OnnxParser", lambda *_: SimpleNamespace(parse_from_file=lambda path: True))
    with pytest.raises(UserError, match="enough"):
        build(bundle, recipe)
    assert given == [b"saved"]


def test_a_folder_for_timing_caches_is_checked_first(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*file .*: name another folder"):
        build(bundle, replace(RTX, timing_cache=tmp_path / "file"), lambda *_: pytest.fail("it builds"))


def test_recorded_paths_hold_from_any_folder(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib.so").write_bytes(b"a plugin")
    monkeypatch.setattr(engine, "load_plugin", lambda path: None)
    monkeypatch.setattr(engine, "compile_graph", lambda *arguments: b"plan")
    monkeypatch.setattr(engine, "own_capability", lambda trt: "8.6")
    monkeypatch.setattr(engine, "load_tensorrt", lambda target: trt)
    folder, _ = build(bundle, EngineRecipe(plugin=Path("lib.so"), timing_cache=Path("caches"), **SMALL))
    monkeypatch.chdir("/")
    found = find_engines(bundle, "tensorrt", "8.6", trt)
    assert found.folder == folder
    assert found.record.recipe.timing_cache == tmp_path / "caches"
    assert found.record.recipe.plugin == tmp_path / "lib.so"


def test_a_gpu_without_the_plugins_instructions_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "load_plugin", lambda path: None)
    monkeypatch.setattr(engine, "own_capability", lambda trt: "7.5")
    monkeypatch.setattr(engine, "load_tensorrt", lambda target: trt)
    with pytest.raises(
        UserError, match=r"need a GPU of compute capability 8\.0, but this GPU has 7\.5: leave out --plugin"
    ):
        build(bundle, EngineRecipe(plugin=Path("lib.so"), **SMALL))


@pytest.fixture(scope="module")
def built(sample_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    found = Bundle.load(shutil.copytree(sample_bundle.folder, tmp_path_factory.mktemp("built") / "bundle"))
    build(found, RTX)
    return found


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_visual": 0}, "max-visual 0 is out of range: give 1 to 16384"),
        ({"opt_visual": 99, "max_visual": 64}, "opt-visual 99 is out of range: give 1 to 64"),
        ({"optimization_level": 6}, "optimization-level 6"),
        ({"compute_capability": "8.6"}, "TensorRT builds only for this machine's GPU"),
        ({"target": "tensorrt-rtx"}, r"give --compute-capability with one of 7\.5, "),
        ({"target": "tensorrt-rtx", "compute_capability": "9.0"}, "give --compute-capability with one of"),
        ({"target": "tensorrt-rtx", "compute_capability": "8.6", "plugin": Path("x")}, "has no plugins"),
        ({"softmax": "bfloat16"}, "there is no softmax bfloat16: give float16 or float32"),
        ({"attention": "flash"}, "there is no attention flash: give auto or grouped or repeated"),
        ({"attention": "grouped", "plugin": Path("x")}, "--attention does not apply to engines with our plugin: leave"),
        ({"memory": 0}, "memory 0 is out of range"),
    ],
)
def test_recipes_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        EngineRecipe(**options)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_profiles_fit_together(sample_bundle: Bundle, name: GraphName) -> None:
    for kind, extents in profiles(sample_bundle, name, RTX).items():
        for i in range(3):
            assert extents["S"][i] == extents["L"][i] + extents["T"][i]
            assert extents["keep_count"][i] <= extents["L"][i]
        assert extents["P"] == ((128,) * 3 if kind == "decode" else (0, 0, 128))
        assert all(low <= best <= high for low, best, high in extents.values())


NATIVE = EngineChoices("tensorrt", "float16", "native", "float16", "grouped")


def activations(bundle: Bundle, choices: EngineChoices, visual: int = 400) -> dict[GraphName, int]:
    """Of each graph, for pictures of so many visual tokens."""
    recipe = EngineRecipe(max_visual=visual, max_text=32, max_new=32, opt_visual=1, opt_text=1)
    return estimate(bundle, recipe, choices, {n: graph_to_count(bundle, n, choices) for n in GRAPH_NAMES}).activations


def test_caches_that_the_plugin_writes_to_are_full_buffers(tmp_path: Path) -> None:
    """A builder tunes with a prefill profile's optimum, and rows that are written must fit."""
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "c", wide("qwen2_vl", heads=4)), tmp_path / "bundle"))
    recipe = EngineRecipe(plugin=Path("lib.so"), **SMALL)
    for name in ("prefix", "decoder"):
        for extents in profiles(bundle, name, recipe).values():
            assert extents["P"] == (recipe.capacity,) * 3
    assert profiles(bundle, "prefix", replace(recipe, plugin=None))["prefill"]["P"] == (0, 0, recipe.capacity)


def test_plugin_graphs_are_counted_as_native_ones(sample_bundle: Bundle) -> None:
    """The plugin's nodes have no bodies to infer shapes from; around them the graphs are the same."""
    native, plugin = (activations(sample_bundle, replace(NATIVE, graphs=own)) for own in ("native", "plugin"))
    assert plugin["vision"] == native["vision"]
    assert all(0.9 * native[name] < plugin[name] <= 1.1 * native[name] for name in GRAPH_NAMES)


def test_memory_grows_with_the_square_of_the_picture(sample_bundle: Bundle) -> None:
    def vision(visual: int) -> int:
        return activations(sample_bundle, replace(NATIVE, dtype="float32", softmax="float32"), visual)["vision"]

    scores = 4 * 2 * (4 * 1024) ** 2  # float32, 2 heads, before and behind the softmax
    assert scores < vision(1024) < 4 * scores
    assert 3.5 < vision(2048) / vision(1024) < 4.1


def test_too_little_memory_is_told_first(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (available_bytes() or 1) > 0
    monkeypatch.setattr(footprint, "available_bytes", lambda: 1000)
    with pytest.raises(
        UserError, match=r"are free: close other programs .* lower --max-visual 64 .*--force builds anyway"
    ):
        build(bundle, RTX)
    assert not (bundle.folder / "engines").exists()


def test_lowered_bundles_are_refused(bundle: Bundle) -> None:
    native = Bundle(bundle.folder, bundle.manifest.model_copy(update={"lowering": "native"}))
    with pytest.raises(UserError, match=r"an engine needs portable graphs, .* export the model again"):
        build(native, RTX)


def test_dtypes_are_what_tensorrt_and_the_gpu_have(bundle: Bundle) -> None:
    old, new = SimpleNamespace(__version__="8.6.0"), SimpleNamespace(__version__="10.3.0")
    narrow = Bundle(bundle.folder, bundle.manifest.model_copy(update={"dtype": "bfloat16"}))
    recipe = EngineRecipe(**SMALL)
    assert graphs.build_dtype(narrow, recipe, new, "8.7") == "bfloat16"
    assert graphs.build_dtype(narrow, recipe, old, "8.7") == "float16"
    assert graphs.build_dtype(narrow, recipe, new, "7.5") == "float16"
    assert graphs.build_dtype(bundle, recipe, old, "8.7") == "float32"
    with pytest.raises(UserError, match="bfloat16 needs TensorRT 10"):
        graphs.build_dtype(bundle, EngineRecipe(dtype="bfloat16", **SMALL), old, "8.7")


def test_engines_are_built_whole_and_found(built: Bundle) -> None:
    folder = find_engines(built, "tensorrt-rtx", "8.6", trt).folder
    assert folder == built.folder / "engines" / f"rtx-{trt.__version__}-sm86"
    assert sorted(path.name for path in folder.iterdir()) == [
        "build.json",
        "decoder.plan",
        "prefix.plan",
        "vision.plan",
    ]
    record = json.loads((folder / "build.json").read_text())
    assert (record["dtype"], record["graphs"], record["capacity"]) == ("float16", "opset-23", 128)
    assert (record["softmax"], record["attention"]) == ("float16", "operator")
    assert record["engines"]["decoder"]["profiles"] == ["prefill", "decode"]
    assert not list(built.folder.glob(".build-*"))


def test_stale_and_foreign_engines_are_refused(built: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(built.folder, tmp_path / "bundle"))
    folder = find_engines(bundle, "tensorrt-rtx", "8.6", trt).folder
    command = rf"ivc-build {bundle.folder} --target tensorrt-rtx --compute-capability "
    with pytest.raises(UserError, match=rf"no engines for rtx-.*-sm89; there are rtx-.*-sm86: .*{command}8\.9"):
        find_engines(bundle, "tensorrt-rtx", "8.9", trt)
    folder.rename(folder.with_name(folder.name.replace("sm86", "sm89")))
    with pytest.raises(UserError, match=rf"are for TensorRT .* and sm8\.6: build them with {command}8\.9"):
        find_engines(bundle, "tensorrt-rtx", "8.9", trt)
    folder.with_name(folder.name.replace("sm86", "sm89")).rename(folder)
    graph = bundle.folder / "prefix.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x42\x00")
    with pytest.raises(UserError, match=rf"built from other graphs or weights: .*{command}8\.6"):
        find_engines(bundle, "tensorrt-rtx", "8.6", trt)
    (folder / "prefix.plan").write_bytes(b"short")
    with pytest.raises(UserError, match=r"prefix\.plan is damaged \(its size differs"):
        find_engines(bundle, "tensorrt-rtx", "8.6", trt)
    record = json.loads((folder / "build.json").read_text())
    (folder / "build.json").write_text(json.dumps(record | {"engines": {}}))
    with pytest.raises(UserError, match=r"build\.json cannot be used"):
        find_engines(bundle, "tensorrt-rtx", "8.6", trt)
    (folder / "build.json").write_text("{")
    with pytest.raises(UserError, match=rf"build\.json is damaged .*{command}8\.6"):
        find_engines(bundle, "tensorrt-rtx", "8.6", trt)


def test_a_failed_build_leaves_older_engines(built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(shutil.copytree(built.folder, tmp_path / "bundle"))
    before = sorted(path.relative_to(bundle.folder) for path in bundle.folder.rglob("*"))

    def fail(*arguments: Any, **options: Any) -> bytes:
        raise UserError("TensorRT cannot build it")

    monkeypatch.setattr(engine, "compile_graph", fail)
    with pytest.raises(UserError, match="cannot build"):
        build(bundle, RTX)
    assert sorted(path.relative_to(bundle.folder) for path in bundle.folder.rglob("*")) == before
    find_engines(bundle, "tensorrt-rtx", "8.6", trt)


def test_a_build_removes_what_killed_ones_left(bundle: Bundle) -> None:
    left = bundle.folder / ".build-killed"
    (left / "done").mkdir(parents=True)
    with engine.working_folder(bundle) as first, engine.working_folder(bundle) as second:
        assert not left.exists() and first.exists() and second.exists() and first != second
    assert not list(bundle.folder.glob(".build-*")) and list((bundle.folder / "weights").iterdir())


@pytest.mark.parametrize("at_once", [True, False])
def test_engines_change_places_with_older_ones(
    built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """In one step, or in two where the file system cannot."""
    bundle = Bundle.load(shutil.copytree(built.folder, tmp_path / "bundle"))
    (older,) = (bundle.folder / "engines").iterdir()
    (older / "mark").touch()
    if not at_once:
        monkeypatch.setattr(staging, "renamed_at_once", lambda *_: False)
    with engine.working_folder(bundle) as work:
        shutil.copytree(older, work / "done")
        (work / "done" / "mark").rename(work / "done" / "new")
        staging.put_in_place(work / "done", older, force=True)
        assert (older / "new").exists() and (work / "done" / "mark").exists()
    assert [path.name for path in (bundle.folder / "engines").iterdir()] == [older.name]


def test_ctrl_c_ends_a_build_and_leaves_older_engines(built: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(built.folder, tmp_path / "bundle"))
    before = {path: path.stat().st_mtime_ns for path in bundle.folder.rglob("*.plan")}
    steps: list[str] = []

    def progress(name: str, phase: str, done: int, total: int) -> None:
        if not steps:
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(name)

    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run side by side
    try:
        with pytest.raises(KeyboardInterrupt):
            build(bundle, RTX, progress)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert set(steps) == {"vision"}
    assert {path: path.stat().st_mtime_ns for path in bundle.folder.rglob("*.plan")} == before
    assert not list(bundle.folder.glob(".build-*"))


def test_the_command_builds_and_says_what_it_takes(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-visual", "32", "--max-text", "16", "--max-new", "16", "--optimization-level", "0"]
    rtx = ["--target", "tensorrt-rtx", "--compute-capability", "12.0"]
    for _ in range(2):  # the second replaces the first
        assert ivc_build([str(bundle.folder), *rtx, *options]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "KV caches of 64 tokens" in said and "of activations" in said
    assert "vision: softmax in float32, about" in said
    assert "decoder: attention grouped, which fits, about" in said and "(--attention repeated: " in said
    assert ivc_build([str(bundle.folder), *options]) == 2
    assert "tensorrt does not load" in capsys.readouterr().err
    assert ivc_build([str(bundle.folder / "no")]) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--foo"], "unrecognized arguments: --foo: ivc-build --help lists the options"),
        (["--max-visual", "0"], "max-visual 0 is out of range"),
        (["--opt-visual", "0"], "opt-visual 0 is out of range"),
        (["--opt-text", "0"], "opt-text 0 is out of range"),
        (["--workspace", "nan"], "workspace nan is out of range: give GiB above 0"),
        (["--workspace", "-1"], "workspace -1 is out of range"),
        (["--compute-capability", "8.6"], "leave out --compute-capability"),
        ([], "tensorrt does not load"),
    ],
)
def test_the_commands_mistakes_are_one_sentence(
    bundle: Bundle, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ivc_build([str(bundle.folder), *options]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1
    assert not list(bundle.folder.glob(".build-*"))


def test_what_tensorrt_cannot_read_is_one_sentence(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = bundle.graph("vision")
    next(node for node in graph.graph if node.op_type == "Cos").op_type = "Bernoulli"  # of one input, too
    monkeypatch.setattr(Bundle, "graph", lambda *_: graph)
    with pytest.raises(UserError, match=r"TensorRT .* cannot read the vision graph"):
        build(bundle, EngineRecipe(target="tensorrt-rtx", compute_capability="8.6", **SMALL))


def test_experts_are_refused_before_tensorrt_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "c", TINY["deepseek_vl_v2"]), tmp_path / "b"))
    monkeypatch.setattr("ivc_export.tensorrt.build.load_tensorrt", pytest.fail)
    with pytest.raises(UserError, match="prefix and decoder of this model have mixtures of experts"):
        build(bundle, RTX)
