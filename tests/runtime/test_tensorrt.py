"""The hand-over from engine to engine, with a stand-in for TensorRT."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import onnx_ir as ir
import onnxruntime
import PIL.Image
import pytest

from ivc_export import cli, families
from ivc_export.bench import prompts
from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid, Visual
from ivc_export.runtime.backends import BACKENDS
from ivc_export.runtime.chat import Chat, FollowUp, Sampling, generate
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.interface import Seen, Timings
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.plan import plan_run
from ivc_export.runtime.probes import SIZES
from ivc_export.runtime.tensorrt import probes
from ivc_export.runtime.tensorrt import session as tensorrt
from ivc_export.runtime.tensorrt.engine import Tensor
from ivc_export.runtime.tensorrt.session import TensorrtSession
from ivc_export.tensorrt.profiles import Extents
from ivc_export.tensorrt.recipe import Options
from ivc_export.verify.oracle import record
from ivc_export.verify.parity import compare
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import LOGIT_TOLERANCE, SCORE_TOLERANCE, SHAPES, Golden, make_large_embeddings, random_picture
from tests.runtime.fake_tensorrt import (
    CAPABILITY,
    Context,
    DataType,
    FakeEngine,
    FakeTensorrt,
    HostDevice,
    folder_of,
    put_engines,
)
from tests.runtime.test_conversation import TURNS

MAXIMA = {"max_visual": 256, "max_text": 64, "max_new": 64}
IMAGE_PROMPT = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]


def opened(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **recipe: Any) -> tuple[TensorrtSession, HostDevice]:
    put_engines(bundle, **MAXIMA | recipe)
    device = HostDevice()
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda target: FakeTensorrt(bundle))
    monkeypatch.setattr(tensorrt, "own_capability", lambda trt: CAPABILITY)
    monkeypatch.setattr(tensorrt, "CudaDevice", lambda: device)
    monkeypatch.setattr(tensorrt, "load_plugin", lambda path: None)
    return TensorrtSession(bundle, plugin=recipe.get("plugin")), device


@pytest.fixture
def bundle(golden_bundle: Bundle, tmp_path: Path) -> Bundle:
    """The golden's bundle, with a folder for engines of its own."""
    return Bundle.load(shutil.copytree(golden_bundle.folder, tmp_path / "bundle"))


def test_conversations_equal_those_on_the_host(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decode steps, turns with one and two pictures and with none, over one cache."""
    session, device = opened(bundle, monkeypatch)
    found, wanted = session.converse(0.4), HostConversation(OnnxSession(bundle), 0.4)
    for tokens, pictures in TURNS:
        step, reference = found.run(tokens, pictures), wanted.run(tokens, pictures)
        np.testing.assert_array_equal(step.keep_index, reference.keep_index)
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
        assert [a.shape for a in step.image_embeds] == [a.shape for a in reference.image_embeds]
    assert (found.cache.length, found.cache.bytes_used) == (wanted.cache.length, wanted.cache.bytes_used)
    assert found.next_position == wanted.next_position
    device.check()


def test_a_picture_of_one_row_is_no_decode_step(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, device = opened(bundle, monkeypatch)
    found, wanted = session.converse(), HostConversation(OnnxSession(bundle))
    for stage, tokens, pictures in (("prefill", [5], []), ("prefill", [503], [random_picture(Grid(1, 1), 3)])):
        found.timings = Timings()
        step, reference = found.run(tokens, pictures), wanted.run(tokens, pictures)
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
        assert f"{stage}.decoder" in found.timings.seconds
    device.check()


def test_pictures_seen_before_run_no_vision(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, device = opened(bundle, monkeypatch, max_text=128)
    found, wanted = session.converse(0.4), HostConversation(OnnxSession(bundle), 0.4)
    tokens, pictures = TURNS[5]
    first, reference = found.run(tokens, pictures), wanted.run(tokens, pictures)
    for step in (first, reference):
        assert [picture.grid for picture in step.seen] == [picture.grid for picture in pictures]
    seen: list[Visual | Seen] = [first.seen[0], pictures[1]]
    found.restart()
    again = found.run(tokens, seen)
    np.testing.assert_array_equal(again.keep_index, reference.keep_index)
    assert np.abs(again.logits - reference.logits).max() < LOGIT_TOLERANCE
    assert found.timings.runs["vision"] == 3
    device.check()


def test_a_conversation_that_outgrows_engines_names_larger_ones(
    sample_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _ = opened(Bundle.load(shutil.copytree(sample_bundle.folder, tmp_path / "bundle")), monkeypatch)
    chats = {way: Chat(session, sampling=Sampling(max_tokens=2), follow_up=way) for way in get_args(FollowUp)}
    for chat in chats.values():
        list(chat.ask("Where?", [SHAPES]))
    with pytest.raises(UserError) as found:
        list(chats["again"].ask("And here?", [SHAPES]))
    assert str(found.value) == (
        "the prompt has 384 visual tokens, but these engines take 256 at most: build them with --max-visual 384, or "
        "use a smaller picture, or continue on the compacted cache (--follow-up compacted)"
    )
    list(chats["compacted"].ask("And here?", [SHAPES]))
    list(chats["again"].ask("And now?"))


@pytest.mark.parametrize("name", ["llava", "internvl"])  # a layer kept whole; tiles
def test_families_that_need_more(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.of(name)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY[family.model_type])
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", max_visual=400))
    session, device = opened(bundle, monkeypatch, max_visual=400)
    noise = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    picture = families.preparation(bundle.manifest).picture(PIL.Image.fromarray(noise), bundle.manifest.tokens.image)
    prompt = [1, 2, *picture.tokens, 7, 8, 9]
    found, wanted = session.converse(0.4), HostConversation(OnnxSession(bundle), 0.4)
    for tokens, pictures in [(prompt, [picture]), ([5], []), ([6], []), ([4, 3, 2], []), ([9], [])]:
        step, reference = found.run(tokens, pictures), wanted.run(tokens, pictures)
        np.testing.assert_array_equal(step.keep_index, reference.keep_index)
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
    assert found.cache.bytes_used == wanted.cache.bytes_used
    device.check()


def test_nothing_but_logits_leaves_the_device(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, device = opened(bundle, monkeypatch)
    tokens = list(generate(session.converse(), IMAGE_PROMPT, [random_picture(Grid(4, 5), 0)], Sampling(max_tokens=3)))
    assert device.downloads == [4 * bundle.manifest.decoder.vocab_size] * len(tokens)


def test_the_best_token_is_found_where_nobody_wants_logits(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, device = opened(bundle, monkeypatch)
    found, wanted = session.converse(), session.converse()
    for tokens in ([1, 2, 5], [7], [8], [9]):
        found.logits_wanted = False
        step, reference = found.run(tokens), wanted.run(tokens)
        assert step.best == int(reference.logits.argmax()) and reference.best is None
    for bad in (np.nan, np.inf):
        tensor = Tensor(device.allocate(12), (1, 1, 3), np.dtype(np.float32))
        device.upload(tensor.address, np.array([1, bad, 2], np.float32))
        with pytest.raises(UserError, match="NaN logits in float32 on tensorrt"):
            session.best(tensor)


def test_tensors_are_fetched_once_and_not_too_late(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = opened(bundle, monkeypatch)
    conversation = session.converse()
    prefill = conversation.run(IMAGE_PROMPT, [random_picture(Grid(4, 5), 0)])
    kept = prefill.keep_index
    conversation.run([5])
    assert prefill.prefix["token_score"].shape == (20,)  # a decode step leaves a prefill's tensors as they are
    conversation.run(IMAGE_PROMPT, [random_picture(Grid(4, 5), 1)])
    assert prefill.keep_index is kept
    with pytest.raises(RuntimeError, match="another prefill"):
        prefill.prefix["hidden_states"]


def test_parity_of_engines(golden: Golden, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    image = draw_picture()
    tokens = make_prompt(bundle, image)[1]
    session, _ = opened(bundle, monkeypatch)
    report, step = compare(session, record(bundle, golden.folder, tokens, [image], 0.5, 2), [image])
    assert report.passed, [c for c in report.comparisons if not c.passed]
    assert (report.backend, report.dtype) == ("tensorrt", "float32")
    assert "tensorrt" in report.versions
    assert len(step.keep_index) < len(tokens)


def test_float16_engines_take_and_give_float16(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, device = opened(bundle, monkeypatch, dtype="float16")
    picture = random_picture(Grid(4, 5), 0)
    wanted = HostConversation(OnnxSession(bundle)).run(IMAGE_PROMPT, [picture])
    conversation = session.converse()
    step = conversation.run(IMAGE_PROMPT, [picture], keep_index=wanted.keep_index)
    np.testing.assert_array_equal(step.keep_index, wanted.keep_index)
    assert session.engines["prefix"].dtypes["past_key.0"] == np.float16
    assert session.engines["prefix"].dtypes["hidden_states"] == np.float32
    assert 0 < np.abs(step.logits - wanted.logits).max() < 5e-3 * np.abs(wanted.logits).max()
    assert np.abs(step.prefix["token_score"] - wanted.prefix["token_score"]).max() < 1e3 * SCORE_TOLERANCE
    device.check()


def test_what_float16_engines_do_not_take_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export(ExportRecipe(make_large_embeddings(tmp_path / "checkpoint"), tmp_path / "bundle"))
    session, device = opened(bundle, monkeypatch, dtype="float16")
    conversation = session.converse()
    wanted = r"but the largest value of float16 is 65504: build engines with ivc-build --dtype float32"
    with pytest.raises(UserError, match=rf"inputs_embeds has values up to 1e\+05, {wanted}"):
        conversation.run([1, 5])
    picture = random_picture(Grid(1, 1), 0)
    picture.inputs["pixel_values"][0, 0, 0] = 7e4
    with pytest.raises(UserError, match=rf"pixel_values has values up to 7e\+04, {wanted}"):
        conversation.run([1, bundle.manifest.tokens.image, 2], [picture])
    assert np.isfinite(conversation.run([1, 2]).logits).all() and conversation.cache.length == 2
    device.check()


def test_runs_beyond_the_engines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = opened(bundle, monkeypatch, max_visual=16, max_text=8, max_new=3)
    conversation = session.converse()
    with pytest.raises(
        UserError, match=r"20 visual tokens, but these engines take 16 at most.*--max-visual 20.*smaller"
    ):
        conversation.run(IMAGE_PROMPT, [random_picture(Grid(4, 5), 0)])
    with pytest.raises(UserError, match=r"9 other tokens, but these engines take 8 at most.*--max-text 9"):
        conversation.run(range(10))
    for _ in range(3):
        conversation.run(range(8))
    with pytest.raises(UserError, match=r"have 27 rows, but 32 are needed.*--max-new"):
        conversation.run(range(8))
    with pytest.raises(UserError, match="27 rows, not 64"):
        session.converse(capacity=64)


def test_an_answer_ends_at_the_caches_last_row(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = opened(bundle, monkeypatch, max_visual=1, max_text=2, max_new=3)
    assert len(list(generate(session.converse(), [1, 2, 3], stop=()))) == 4


def test_engines_that_cannot_be_used(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(bundle, monkeypatch)
    plan = folder_of(bundle) / "decoder.plan"
    plan.write_bytes(b"x" * plan.stat().st_size)
    with pytest.raises(UserError, match=r"decoder.plan does not load in TensorRT 8.6.0: build it here with ivc-build"):
        TensorrtSession(bundle)
    record = folder_of(bundle) / "build.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"inputs_sha256": "0" * 64}))
    with pytest.raises(UserError, match="built from other graphs"):
        TensorrtSession(bundle)


def spoil_shape(monkeypatch: pytest.MonkeyPatch, name: str, spoilt: Callable[[tuple[int, ...]], Any]) -> None:
    """Let execution contexts say another shape of tensor `name`."""
    whole = Context.get_tensor_shape

    def say(self: Context, wanted: str) -> Any:
        return spoilt(whole(self, wanted)) if wanted == name else whole(self, wanted)

    monkeypatch.setattr(Context, "get_tensor_shape", say)


class NoDims:
    """TensorRT's Dims of no known rank."""

    def __len__(self) -> int:
        return -1

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))


SPOILT: list[tuple[str, Callable[[tuple[int, ...]], Any], str]] = [
    (
        "hidden_states",
        lambda shape: (1, -1, shape[2]),
        "the prefix engine does not give the size of hidden_states",
    ),
    ("logits", lambda shape: NoDims(), "the decoder engine does not give the size of logits"),
    (
        "image_embeds",
        lambda shape: (1, 21, shape[2]),
        "the vision engine gives image_embeds of [1, 21, ",
    ),
    ("keep_index", lambda shape: (99,), "the prefix engine gives keep_index of [99] instead of [18]"),
    ("token_score", lambda shape: (20, 1), "the prefix engine gives token_score of [20, 1] instead of [20]"),
    (
        "new_key.5",
        lambda shape: (1, 2, 9, 16),
        "the decoder engine gives new_key.5 of [1, 2, 9, 16] instead of [1, 2, 18, 32]",
    ),
    (
        "compact_value.0",
        lambda shape: (1, 2, 4096, 16),
        "the decoder engine gives compact_value.0 of [1, 2, 4096, 16] instead of",
    ),
    ("new_value.0", lambda shape: (4, *shape[1:]), "the prefix engine gives new_value.0 of [4, "),
    ("seed_index", lambda shape: (-1,), "the prefix engine does not give the size of seed_index"),
]


@pytest.mark.parametrize(("name", "spoilt", "sentence"), SPOILT)
def test_outputs_of_unknown_or_other_size_are_refused(
    name: str,
    spoilt: Callable[[tuple[int, ...]], Any],
    sentence: str,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is written: an extent of -1 used to give a buffer of one byte."""
    session, device = opened(bundle, monkeypatch)
    spoil_shape(monkeypatch, name, spoilt)
    with pytest.raises(UserError, match=re.escape(sentence) + ".*: build the engines again with ivc-build"):
        session.converse(0.5).run(IMAGE_PROMPT, [random_picture(Grid(4, 5), 0)])
    device.check()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("logits", "TensorRT refuses the memory for logits of the decoder engine: build the engines again"),
        ("image_embeds", "TensorRT refuses the memory for image_embeds of the vision engine: build the engines again"),
        ("past_key.0", r"past_key.0 of .* does not fit the prefix engine: build engines with larger maxima"),
    ],
)
def test_addresses_that_are_not_taken_are_refused(
    name: str, sentence: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, device = opened(bundle, monkeypatch)
    taken = Context.set_tensor_address
    monkeypatch.setattr(
        Context, "set_tensor_address", lambda self, one, address: one != name and taken(self, one, address)
    )
    with pytest.raises(UserError, match=sentence):
        session.converse(0.5).run(IMAGE_PROMPT, [random_picture(Grid(4, 5), 0)])
    device.check()


def rename(name: str, new: str) -> Callable[[FakeEngine], None]:
    def change(engine: FakeEngine) -> None:
        if name in engine.names:
            engine.names[engine.names.index(name)] = new
            engine.shapes[new], engine.types[new] = engine.shapes[name], engine.types[name]
            engine.inputs = [new if one == name else one for one in engine.inputs]

    return change


def retype(name: str, kind: str) -> Callable[[FakeEngine], None]:
    return lambda engine: engine.types.update({name: DataType[kind]} if name in engine.names else {})


def reshape(name: str, *shape: int | str) -> Callable[[FakeEngine], None]:
    return lambda engine: engine.shapes.update({name: shape} if name in engine.names else {})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (rename("past_key.0", "past.0"), "prefix.plan is not an engine of this bundle's prefix graph (its past.0"),
        (rename("logits", "probabilities"), "decoder.plan is not an engine of this bundle's decoder graph (its logits"),
        (
            reshape("past_key.0", 1, 4, "P", 16),
            "prefix.plan is not an engine of this bundle's prefix graph (its past_key.0",
        ),
        (
            reshape("image_embeds", "visual", 64),
            "vision.plan is not an engine of this bundle's vision graph (its image_embeds",
        ),
        (
            retype("position_ids", "FLOAT"),
            "prefix.plan is not an engine of this bundle's prefix graph (its position_ids",
        ),
        (retype("keep_index", "INT64"), "prefix.plan has keep_index in INT64, a type that no graph of ivc-export has"),
        (retype("past_value.0", "HALF"), "past_value.0 is float16 in one engine and past_key.0 float32 in another"),
        (retype("image_embeds", "HALF"), "inputs_embeds is float32 in one engine and image_embeds float16 in another"),
        (retype("compact_key.1", "HALF"), "compact_key.1 is float16 in one engine and past_key.0 float32 in another"),
    ],
)
def test_engines_of_other_graphs_are_refused(
    change: Callable[[FakeEngine], None], sentence: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(bundle, monkeypatch)
    begun = FakeEngine.__init__

    def begin(self: FakeEngine, session: onnxruntime.InferenceSession) -> None:
        begun(self, session)
        change(self)

    monkeypatch.setattr(FakeEngine, "__init__", begin)
    with pytest.raises(UserError, match=re.escape(sentence)) as raised:
        TensorrtSession(bundle)
    assert "with ivc-build" in str(raised.value)


def compile_parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Options, list[Extents]]]:
    """Let selection and compaction stay graphs; what was to be compiled, as it comes."""
    asked = []

    def stay(trt: Any, model: ir.Model, profiles: Iterable[Extents], options: Options, work: Path) -> bytes:
        assert not [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
        work.joinpath("written").touch()
        asked.append((str(model.graph.name), options, list(profiles)))
        return bytes(ir.to_proto(model).SerializeToString())

    monkeypatch.setattr(probes, "compile_graph", stay)
    return asked


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_selection_is_timed_in_engines_built_as_the_sessions(
    dtype: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {"workspace": 1 << 20, "tactic_sources": ("EDGE_MASK_CONVOLUTIONS",)}
    recipe |= {"optimization_level": 2, "timing_cache": Path("caches")}
    session, device = opened(bundle, monkeypatch, dtype=dtype, **recipe)
    asked = compile_parts(monkeypatch)
    written = bundle.folder.stat().st_mtime_ns
    prompt = prompts.noise_prompt(bundle, 42, 20)
    for ratio in (1.0, 0.5):
        plan = plan_run(bundle.manifest, np.array(prompt.tokens, np.int32), [prompt.picture.grid], 0, ratio)
        found = probes.engine_times(session, plan)
        assert min(found.select, found.compact, found.decode) > 0
    assert [name for name, *_ in asked] == ["select", "compact"]  # once for a session
    assert bundle.folder.stat().st_mtime_ns == written  # a bundle may be read-only
    for _, options, extents in asked:
        assert options == Options(
            "tensorrt", CAPABILITY, 1 << 20, 2, None, ("EDGE_MASK_CONVOLUTIONS",), dtype != "float32"
        )
        assert [profile["L"] for profile in extents] == [(1, 1, MAXIMA["max_visual"]), (1, 1, 1)]
    parts = probes.PARTS[session]
    assert parts.engines["compact"].dtypes["hidden_states"] == np.float32  # as residual sums are
    assert parts.engines["compact"].dtypes["new_key.0"] == parts.engines["select"].dtypes["values"] == np.dtype(dtype)
    device.check()


def test_the_bench_takes_engines(
    sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.load(shutil.copytree(sample_bundle.folder, tmp_path / "bundle"))
    opened(bundle, monkeypatch)
    asked = compile_parts(monkeypatch)
    monkeypatch.setitem(cast("dict[str, Any]", SIZES), "cuda", (64, 2**16))
    words = ["--visual", "20", "--text", "16", "--tokens", "3", "--rounds", "2", "--warmups", "1"]
    ratios, file = ["--ratio", "0.5", "--ratio", "0.2"], tmp_path / "bench.json"
    backends = ["--backend", "tensorrt", "--backend", "onnxruntime-cpu"]
    assert cli.ivc_bench([str(bundle.folder), *words, *ratios, *backends, "--json", str(file)]) == 0
    assert "select, compact" in capsys.readouterr().out
    content = json.loads(file.read_text())
    ceilings = {found["device"]: found for found in content["ceilings"]}
    assert ceilings["cuda"]["source"] == "tensorrt 8.6.0" and [name for name, *_ in asked].count("matmul") == 1
    assert ceilings["cuda"]["dtype"] == "float32" and ceilings["cuda"]["copy_gb_per_second"] > 0
    rows = {(row["side"], row["ratio"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 2 * 3 and not content["failures"]
    sizes = bundle.manifest.decoder
    cell = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * 4
    for ratio, kept in ((1.0, 20), (0.5, 10), (0.2, 4)):
        row, other = rows["tensorrt", ratio], rows["onnxruntime-cpu", ratio]
        assert row["device"] == "cuda" and row["tokens"] == other["tokens"]
        assert row["cache_bytes"] == other["cache_bytes"] == cell * (kept + 16)
        assert row["visual_cache_bytes"] == cell * kept
        assert min(row["stages"][name] for name in ("vision", "prefix", "decoder")) > 0 and row["decode"] > 0
        assert min(row["selection"].values()) > 0 and row["selection"]["share"] < 1
    assert rows["onnxruntime-cpu", 1.0]["agreement"] == 4


def test_commands_take_engines(
    sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.load(shutil.copytree(sample_bundle.folder, tmp_path / "bundle"))
    opened(bundle, monkeypatch)
    image = tmp_path / "picture.png"
    draw_picture().save(image)
    answers = []
    for backend in ("tensorrt", "onnxruntime-cpu"):
        command = [str(bundle.folder), "--image", str(image), "--prompt", "Where is the ring?", "--json"]
        assert cli.ivc_run([*command, "--max-tokens", "4", "--backend", backend]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert answers[0]["visual_tokens"] == answers[1]["visual_tokens"]
    assert answers[0]["cache"] == answers[1]["cache"]


def test_commands_say_what_engines_lack(sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.ivc_run([str(sample_bundle.folder), "--prompt", "x", "--backend", "tensorrt"]) == 2
    assert "tensorrt does not load" in capsys.readouterr().err


def test_check_says_what_engines_lack_before_the_checkpoint_runs(
    bundle: Bundle, sample_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ivc_export.verify.oracle.record", lambda *_: pytest.fail("it runs the checkpoint"))
    command = [str(bundle.folder), "--against", str(sample_checkpoint), "--backend", "tensorrt"]
    assert cli.ivc_check(command) == 2
    assert "tensorrt does not load" in capsys.readouterr().err
    session, _ = opened(bundle, monkeypatch)
    record = replace(BACKENDS["tensorrt"], open=lambda bundle: session)
    monkeypatch.setitem(BACKENDS, "tensorrt", record)
    session.backend = "tensorrt-rtx"
    assert cli.ivc_check(command) == 2
    assert "no tolerance has been measured for tensorrt-rtx in float32: check on one of" in capsys.readouterr().err
