"""The C++ device over TensorRT engines against Python, with a stand-in for TensorRT and the GPU; see fake_tensorrt."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Visual
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.interface import Conversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.tensorrt.store import find_engines, read_record
from samples.make_sample import make_checkpoint
from samples.tiny import TINY, wide
from tests.conftest import LOGIT_TOLERANCE, make_large_embeddings
from tests.native.cpp_runtime import HostProgram, build, shared
from tests.native.test_cpp_host import SANITIZED
from tests.runtime.fake_tensorrt import CAPABILITY, Context, FakeTensorrt, HostDevice, folder_of, put_engines
from tests.runtime.test_tensorrt import opened

MAXIMA: dict[str, Any] = {"max_visual": 400, "max_text": 128, "max_new": 128}
MEMORY = 1 << 30
HERE = {"tensorrt": FakeTensorrt.__version__, "capability": CAPABILITY}


class EnginesProgram(HostProgram):
    """The running test program, whose engines are run here."""

    def converse(
        self, bundle: Bundle, memory: Path, change: Callable[[dict[str, Any]], None] | None = None, **more: Any
    ) -> dict[str, Any]:
        """What comes of conversations on a bundle's engines. change: of what is said of their tensors."""
        memory.write_bytes(b"")
        os.truncate(memory, MEMORY)
        runtime = FakeTensorrt(bundle)
        plans = {name: (folder_of(bundle) / f"{name}.plan").read_bytes() for name in ("vision", "prefix", "decoder")}
        engines = {name: runtime.deserialize_cuda_engine(plan) for name, plan in plans.items()}
        tensors = {
            name: {
                tensor: {
                    "input": tensor in engine.inputs,
                    "type": engine.get_tensor_dtype(tensor).name,
                    "shape": engine.get_tensor_shape(tensor),
                    "host": tensor == "keep_count",
                }
                for tensor in engine.names
            }
            for name, engine in engines.items()
            if engine is not None
        }
        if change is not None:
            change(tensors)
        contexts = {
            (name, profile): Context(engine) for name, engine in engines.items() if engine for profile in (0, 1)
        }
        command = {"do": "converse", "bundle": str(bundle.folder), "memory": str(memory), "tensors": tensors} | HERE
        with memory.open("r+b") as file, mmap.mmap(file.fileno(), MEMORY) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            found = self._served(command | more, contexts, tensors, int(view.ctypes.data))
            del view
        return found

    def _served(
        self, command: dict[str, Any], contexts: dict[tuple[str, int], Context], tensors: dict[str, Any], base: int
    ) -> dict[str, Any]:
        """The answer to a command, once all that it asks of engines is answered."""
        values = []  # what contexts know by address alone
        found = self.exchange(command)
        while "call" in found:
            context, name = contexts[found["engine"], found["profile"]], found["name"]
            reply: Any = True
            context.device_memory = 1
            if found["call"] == "input":
                address = base + found["offset"]
                assert ("value" in found) == tensors[found["engine"]][name]["host"], name
                if "value" in found:
                    values.append(np.array([found["value"]], np.int32))
                    address = values[-1].ctypes.data
                reply = context.set_input_shape(name, tuple(found["shape"]))
                reply = reply and context.set_tensor_address(name, address)
            elif found["call"] == "output":
                reply = context.set_tensor_address(name, base + found["offset"])
            elif found["call"] == "shape":
                reply = context.get_tensor_shape(name)
            else:
                reply = context.execute_async_v3(HostDevice.stream)
            found = self.exchange(reply)
        return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginesProgram]:
    found = EnginesProgram([build(shared(tmp_path_factory, "cpp-gcc"), SANITIZED) / "ivc_engines_test"])
    yield found
    found.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for seed, size in enumerate(((56, 84, 3), (90, 40, 3))):
        noise = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{seed}.png")
        found.append(folder / f"{seed}.png")
    return found


@dataclass(frozen=True)
class OneRun:
    """Tokens and pictures of a run, as both sides take them."""

    tokens: list[int]
    files: list[Path]
    visuals: list[Visual]

    @property
    def said(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "pictures": [str(file) for file in self.files]}


def runs(bundle: Bundle, files: list[Path]) -> list[OneRun]:
    """A picture, decode steps, a run without and one with two pictures, and decode steps, over one cache."""
    preparation = families.preparation(bundle.manifest)
    found = []
    for text, shown in (
        ([7, 8, 9], files[:1]),
        ([5], []),
        ([6], []),
        ([9, 8, 7], []),
        ([3, 4], files),
        ([5], []),
        ([6], []),
    ):
        visuals = [preparation.picture(PIL.Image.open(file), bundle.manifest.tokens.image) for file in shown]
        tokens = [token for visual in visuals for token in (1, 2, *visual.tokens)]
        found.append(OneRun([*tokens, *text], shown, visuals))
    return found


def tiny(name: str, folder: Path, config: dict[str, Any] | None = None) -> Bundle:
    checkpoint = make_checkpoint(folder / "checkpoint", config or TINY[name])
    return export(ExportRecipe(checkpoint, folder / "bundle", max_visual=400))


def check(found: dict[str, Any], wanted: Conversation, planned: list[OneRun], tolerance: float) -> None:
    """Compare runs in C++ with those of a conversation in Python."""
    for run, one in zip(found["runs"], [*planned, *planned], strict=False):
        if one is planned[0]:
            wanted.restart()
        step = wanted.run(one.tokens, one.visuals)
        assert run["keep_index"] == step.keep_index.tolist()
        assert np.abs(np.array(run["logits"], np.float32) - step.logits).max() <= tolerance
        assert (run["length"], run["cache_bytes"]) == (wanted.cache.length, wanted.cache.bytes_used)
    assert found["broken"] == 0, "something wrote behind its memory"
    assert found["held"] == 0, "memory was not given back"


@pytest.fixture
def copied(sample_bundle: Bundle, tmp_path: Path) -> Bundle:
    """The sample's bundle in a folder of its own."""
    return Bundle.load(shutil.copytree(sample_bundle.folder, tmp_path / "bundle"))


@pytest.fixture
def built(copied: Bundle) -> Bundle:
    """The same with float32 engines."""
    put_engines(copied, **MAXIMA)
    return copied


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "internvl", "qwen3_vl", "deepseek_vl_v2"])
def test_conversations_equal_those_on_the_host(
    program: EnginesProgram, pictures: list[Path], tmp_path: Path, name: str
) -> None:
    """Twice on one device. LLaVA keeps a layer whole, DeepSeek-VL2 has values of another size than keys, and views."""
    bundle = tiny(name, tmp_path)
    put_engines(bundle, **MAXIMA)
    planned = runs(bundle, pictures)
    said: dict[str, Any] = {"ratio": 0.4, "runs": [one.said for one in planned], "rounds": 2}
    found = program.converse(bundle, tmp_path / "memory", **said)["answer"]
    check(found, HostConversation(OnnxSession(bundle), 0.4), planned, LOGIT_TOLERANCE)
    assert found["stages"] == {
        "vision": 6, "prefill.prefix": 6, "prefill.decoder": 6, "decode.decoder": 8
    }  # fmt: skip
    assert (found["captures"], found["replays"]) == (1, 7)  # the first step runs as it is


def test_pictures_seen_before_run_no_vision(
    program: EnginesProgram, built: Bundle, pictures: list[Path], tmp_path: Path
) -> None:
    planned = runs(built, pictures)
    said: dict[str, Any] = {"ratio": 0.4, "runs": [one.said for one in planned], "rounds": 2, "again": True}
    found = program.converse(built, tmp_path / "memory", **said)["answer"]
    check(found, HostConversation(OnnxSession(built), 0.4), planned, LOGIT_TOLERANCE)
    assert found["stages"]["vision"] == 2


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_caches_that_engines_write_to_equal_those_on_the_host(
    program: EnginesProgram, pictures: list[Path], tmp_path: Path, name: str
) -> None:
    bundle = tiny(name, tmp_path, wide(name, heads=2))
    plugin = tmp_path / "libivc_plugin.so"
    plugin.write_bytes(b"a library")
    put_engines(bundle, plugin=plugin, **MAXIMA)
    planned = runs(bundle, pictures)
    said: dict[str, Any] = {"ratio": 0.4, "runs": [one.said for one in planned], "plugin": str(plugin), "rounds": 2}
    found = program.converse(bundle, tmp_path / "memory", **said)["answer"]
    check(found, HostConversation(OnnxSession(bundle), 0.4), planned, LOGIT_TOLERANCE)


@pytest.mark.parametrize("graph", [True, False])
def test_float16_engines_give_what_they_give_in_python(
    program: EnginesProgram,
    copied: Bundle,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    graph: bool,
) -> None:
    session, _ = opened(copied, monkeypatch, dtype="float16", **MAXIMA)
    planned = runs(copied, pictures)
    said: dict[str, Any] = {"ratio": 0.4, "runs": [one.said for one in planned], "graph": graph}
    found = program.converse(copied, tmp_path / "memory", **said)["answer"]
    check(found, session.converse(0.4), planned, 0)
    assert (found["dtype"], found["captures"]) == ("float16", int(graph))


def test_keep_count_lies_where_the_engine_reads_it(
    program: EnginesProgram, built: Bundle, pictures: list[Path], tmp_path: Path
) -> None:
    planned = runs(built, pictures)
    for host in (True, False):
        change = another("prefix/keep_count", host=host)
        said: dict[str, Any] = {"ratio": 0.4, "runs": [one.said for one in planned]}
        found = program.converse(built, tmp_path / "memory", change, **said)["answer"]
        check(found, HostConversation(OnnxSession(built), 0.4), planned, LOGIT_TOLERANCE)


def test_engines_are_not_destroyed_at_work(
    program: EnginesProgram,
    built: Bundle,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decode step fails between its engines."""
    execute, starts = Context.execute_async_v3, iter(range(3))

    def start(self: Context, stream: int) -> bool:
        return execute(self, stream) and not ("logits" in self.addresses and next(starts) == 2)

    monkeypatch.setattr(Context, "execute_async_v3", start)
    steps = [one.said for one in runs(built, pictures)[:3]]
    found = program.converse(built, tmp_path / "memory", ratio=1, runs=steps)
    assert found["error"] == "TensorRT cannot run the decoder engine: check that the GPU has memory left"


def test_embeddings_beyond_float16_are_refused(program: EnginesProgram, tmp_path: Path) -> None:
    bundle = export(ExportRecipe(make_large_embeddings(tmp_path / "checkpoint"), tmp_path / "bundle"))
    put_engines(bundle, dtype="float16", **MAXIMA)
    found = program.converse(bundle, tmp_path / "memory", ratio=1, runs=[{"tokens": [1, 2, 5], "pictures": []}])
    assert (
        found["error"]
        == "inputs_embeds has values beyond the range of float16: build engines with ivc-build --dtype float32"
    )


def test_nothing_but_logits_and_kept_rows_leaves_the_device(
    program: EnginesProgram, built: Bundle, pictures: list[Path], tmp_path: Path
) -> None:
    said: dict[str, Any] = {"ratio": 0.4, "runs": [one.said for one in runs(built, pictures)[:3]]}
    found = program.converse(built, tmp_path / "memory", **said)["answer"]
    logits = 3 * built.manifest.decoder.vocab_size
    assert found["downloaded"] == 4 * (logits + len(found["runs"][0]["keep_index"]))


@pytest.mark.parametrize(
    "maxima", [{"max_visual": 5}, {"max_text": 4}, {"max_new": 1, "max_text": 12, "max_visual": 26}]
)
def test_runs_beyond_the_engines_are_refused_as_in_python(
    program: EnginesProgram,
    copied: Bundle,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    maxima: dict[str, int],
) -> None:
    session, _ = opened(copied, monkeypatch, **MAXIMA | maxima)
    planned, conversation = runs(copied, pictures) * 3, session.converse(1.0)
    found = program.converse(copied, tmp_path / "memory", ratio=1, runs=[one.said for one in planned])
    with pytest.raises(UserError) as refused:
        for one in planned:
            conversation.run(one.tokens, one.visuals)
    assert found["error"].startswith(str(refused.value))


def test_caches_of_more_rows_than_the_engines_are_refused(
    program: EnginesProgram, built: Bundle, tmp_path: Path
) -> None:
    found = program.converse(built, tmp_path / "memory", ratio=1, runs=[], rows=10**6)
    assert found["error"].startswith("the engines' caches have 656 rows, but 1000000 are needed: ")


def another(place: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    """A change of an engine's tensor; a tensor without fields is taken away."""
    engine, tensor = place.split("/")

    def change(tensors: dict[str, Any]) -> None:
        if fields:
            tensors[engine][tensor] = tensors[engine].get(tensor, {}) | fields
        else:
            del tensors[engine][tensor]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            another("decoder/logits"),
            "the decoder engine is not an engine of this bundle's decoder graph (its logits differs): ",
        ),
        (another("prefix/keep_index", type="FLOAT"), "(its keep_index differs): build the engines again"),
        (another("prefix/hidden_states", shape=[1, -1, 7]), "(its hidden_states differs): "),
        (another("prefix/hidden_states", shape=[-1, 64]), "(its hidden_states differs): "),
        (another("vision/secret", input=True, type="FLOAT", shape=[1]), "(its secret differs): "),
        (
            another("prefix/hidden_states", type="HALF"),
            "hidden_states is float16 in one engine and hidden_states float32",
        ),
        (
            another("vision/image_embeds", type="HALF"),
            "image_embeds is float16 in one engine and inputs_embeds float32 in",
        ),
        (another("decoder/past_key.2", type="HALF"), "past_key.2 is float16 in one engine and "),
    ],
)
def test_engines_of_other_graphs_are_refused(
    program: EnginesProgram,
    built: Bundle,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    found = program.converse(built, tmp_path / "memory", change, ratio=1, runs=[])
    assert message in found["error"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "prefix/inputs_embeds",
            "the prefix engine needs inputs_embeds in host memory, but this library puts it elsewhere",
        ),
        (
            "decoder/hidden_states",
            "the decoder engine needs hidden_states in host memory, but this library puts it elsewhere",
        ),
        ("prefix/keep_index", "the prefix engine needs keep_index in host memory, but this library puts it"),
    ],
)
def test_engines_that_want_other_tensors_on_the_host_are_refused(
    program: EnginesProgram, built: Bundle, pictures: list[Path], tmp_path: Path, place: str, message: str
) -> None:
    said: dict[str, Any] = {"ratio": 1, "runs": [one.said for one in runs(built, pictures)[:1]]}
    found = program.converse(built, tmp_path / "memory", another(place, host=True), **said)
    assert message in found["error"]


def test_outputs_of_another_size_are_refused(
    program: EnginesProgram,
    built: Bundle,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = Context.get_tensor_shape
    said: dict[str, Any] = {"ratio": 1, "runs": [one.said for one in runs(built, pictures)[:2]]}
    for name, change, message in (
        ("logits", lambda s: (*s[:2], s[2] + 1), "gives logits of [1, 1, "),
        ("hidden_states", lambda s: (1, s[1] * 2, s[2]), "gives hidden_states of [1, "),
        ("compact_key.0", lambda s: (*s[:2], 2**40, s[3]), "gives compact_key.0 of [1, "),
        (
            "seed_index",
            lambda s: (2**60,),
            "a tensor would not fit into memory: build the engines again with ivc-build",
        ),
        ("token_score", lambda s: (-1,), "the prefix engine does not give the size of token_score: "),
        ("image_embeds", lambda s: (s[0], s[1], s[2] + 1), "gives image_embeds of [1, "),
    ):
        monkeypatch.setattr(
            Context,
            "get_tensor_shape",
            lambda self, one, n=name, c=change: c(shape(self, one)) if one == n else shape(self, one),
        )
        assert message in program.converse(built, tmp_path / "memory", **said)["error"], name


# --- which engines are the bundle's


@pytest.fixture
def bundle(copied: Bundle, tmp_path: Path) -> Bundle:
    """The same with float16 engines that call a plugin."""
    plugin = tmp_path / "libivc_plugin.so"
    plugin.write_bytes(b"a library")
    put_engines(copied, plugin=plugin, dtype="float16", **MAXIMA)
    return copied


def test_engines_are_found_where_python_finds_them(program: EnginesProgram, bundle: Bundle, tmp_path: Path) -> None:
    where = {"bundle": str(bundle.folder), "plugin": str(tmp_path / "libivc_plugin.so"), **HERE}
    folder = str(folder_of(bundle).resolve())
    wanted = {"folder": folder, "capacity": sum(MAXIMA.values()), "dtype": "float16"}
    assert program.ask("find", **where) == wanted
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert program.ask("find", **where, engines=str(elsewhere)) == wanted | {"folder": str(elsewhere)}
    for number, version in (
        (8600, "8.6.0"),
        (8601, "8.6.1"),
        (100300, "10.3.0"),
        (101303, "10.13.3"),
        (110100, "11.1.0"),
    ):
        assert program.ask("version", number=number) == version


def edited(**fields: Any) -> Callable[[Path], None]:
    """An edit of build.json; a name with dots is of a record within."""

    def edit(folder: Path) -> None:
        path = folder / "build.json"
        record = json.loads(path.read_text())
        for name, value in fields.items():
            *outer, last = name.split("__")
            place = record
            for one in outer:
                place = place[one]
            place[last] = value
        path.write_text(json.dumps(record))

    return edit


def truncated(folder: Path) -> None:
    (folder / "decoder.plan").write_bytes(b"")


def linked(folder: Path) -> None:
    (folder / "decoder.plan").unlink()
    (folder / "decoder.plan").symlink_to("/etc/hostname")


def missing(folder: Path) -> None:
    (folder / "build.json").unlink()


def no_json(folder: Path) -> None:
    (folder / "build.json").write_text('{"capacity": ')


DAMAGES = {
    "truncated": truncated,
    "linked": linked,
    "missing": missing,
    "no JSON": no_json,
    "another field": edited(colour="red"),
    "another field of the recipe": edited(recipe__colour="red"),
    "capacity": edited(capacity=5),
    "capacity beyond integers": edited(capacity=2**40),
    "capacity of the recipe": edited(recipe__max_new=2**31),
    "no visual tokens": edited(recipe__max_visual=0),
    "target": edited(target="tensorrt-rtx"),
    "target of the recipe": edited(recipe__target="tensorrt-rtx"),
    "GPU of the recipe": edited(recipe__compute_capability=CAPABILITY),
    "attention of the recipe": edited(attention="grouped", recipe__attention="grouped"),
    "memory of the recipe": edited(recipe__memory=0),
    "workspace of the recipe": edited(recipe__workspace="much"),
    "timing cache of the recipe": edited(recipe__timing_cache=5),
    "tactic sources of the recipe": edited(recipe__tactic_sources=[5]),
    "TensorRT": edited(tensorrt="8.5.3"),
    "no version": edited(tensorrt="8.6.0; rm"),
    "GPU": edited(compute_capability="8.7"),
    "dtype": edited(dtype="float32"),
    "no dtype": edited(dtype="int8"),
    "graphs": edited(graphs="native"),
    "no graphs": edited(graphs="ort-cuda"),
    "softmax": edited(softmax="bfloat16"),
    "attention": edited(attention="repeated"),
    "packed weights": edited(packed_weights={"gptq": "int8"}),
    "scale": edited(residual_scale=0.3),
    "scale of nothing": edited(residual_scale=0),
    "plugin": edited(plugin_sha256="0" * 64),
    "no digest": edited(plugin_sha256="x" * 64),
    "no plugin": edited(plugin_sha256=None),
    "inputs": edited(inputs_sha256="0" * 64),
    "size": edited(engines__decoder__bytes=7),
    "no size": edited(engines__decoder__bytes=0),
    "file": edited(engines__decoder__file="../../manifest.json"),
    "profiles": edited(engines__decoder__profiles=["decode", "prefill"]),
    "engines": edited(engines={}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_engines_are_refused_as_in_python(
    program: EnginesProgram, bundle: Bundle, tmp_path: Path, damage: str
) -> None:
    DAMAGES[damage](folder_of(bundle))
    plugin = tmp_path / "libivc_plugin.so"
    with pytest.raises(UserError):
        engines = find_engines(bundle, "tensorrt", CAPABILITY, FakeTensorrt)
        engines.check_plugin(plugin)
    refusal = program.refusal("find", bundle=str(bundle.folder), plugin=str(plugin), **HERE)
    assert "ivc-build" in refusal or "copy the whole bundle" in refusal
    assert "\n" not in refusal and refusal.count(": ") >= 1


def test_mutated_records_are_read_or_refused(program: EnginesProgram, bundle: Bundle, tmp_path: Path) -> None:
    """Seeded mutants, under sanitizers: what is read is what Python reads."""
    generator, path = random.Random(0), folder_of(bundle) / "build.json"
    whole = path.read_text()
    numbers = list(re.finditer(r"(?<=[:\[,])-?\d[\d.e+-]*", whole))
    values = ["-1", "0", "1", "2", "1e999", str(2**31), str(2**63), "0.5", "NaN", "null", '""', "[]", "{}", "true"]
    plugin, read = tmp_path / "libivc_plugin.so", 0
    for turn in range(200):
        if turn % 2:
            found = generator.choice(numbers)
            mutant = whole[: found.start()] + generator.choice(values) + whole[found.end() :]
        else:
            at, length = generator.randrange(len(whole)), generator.randrange(1, 30)
            mutant = whole[:at] + generator.choice(("", '"', "{", "]", "\\", whole[-length:])) + whole[at + length :]
        path.write_text(mutant)
        said = program.answer("find", bundle=str(bundle.folder), plugin=str(plugin), **HERE)
        read += "answer" in said
        try:
            find_engines(bundle, "tensorrt", CAPABILITY, FakeTensorrt).check_plugin(plugin)
        except UserError:
            assert "error" in said and "\n" not in said["error"], mutant
        else:
            assert "answer" in said, (said, mutant)
    assert 0 < read < 100


def test_other_engines_than_those_here_are_refused(program: EnginesProgram, bundle: Bundle, tmp_path: Path) -> None:
    where: dict[str, Any] = {"bundle": str(bundle.folder), "plugin": str(tmp_path / "libivc_plugin.so")}
    refusal = program.refusal("find", **where, tensorrt="10.3.0", capability="8.7")
    assert "has no engines for 10.3.0-sm87; there are 8.6.0-sm90: build them here with ivc-build" in refusal
    refusal = program.refusal("find", **where, engines=str(folder_of(bundle)), tensorrt="8.6.0", capability="8.7")
    assert "are for TensorRT 8.6.0 and compute capability 9.0, but this machine has 8.6.0 and 8.7: " in refusal
    assert program.refusal("find", **where | {"plugin": ""}, **HERE).endswith("libivc_plugin.so, with --plugin")
    other = tmp_path / "other.so"
    other.write_bytes(b"another library")
    assert "(its SHA-256 differs)" in program.refusal("find", **where | {"plugin": str(other)}, **HERE)
    put_engines(bundle, **MAXIMA)
    assert program.refusal("find", **where, **HERE).endswith(" use no plugin: leave out --plugin")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_record_that_is_written_is_read(program: EnginesProgram, bundle: Bundle, dtype: FloatName) -> None:
    put_engines(bundle, dtype=dtype, attention="repeated", **MAXIMA)
    read_record(folder_of(bundle) / "build.json", "build again")
    assert program.ask("find", bundle=str(bundle.folder), **HERE)["dtype"] == dtype
