"""The `ort-cuda` lowering and its runtime, on onnxruntime's CPU provider, which has the same operators in float32."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_run
from ivc_export.cli import run as run_module
from ivc_export.contract.graphs import graph_info
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.contract.operators import verify_graph
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.join_decode import join_decode
from ivc_export.lowering.precision import scale_residuals
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.runtime.chat import Chat, Sampling, generate
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.interface import Timings
from ivc_export.runtime.onnxruntime import cuda as fused_module
from ivc_export.runtime.onnxruntime import fused_graphs as graphs_module
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.onnxruntime.pixel_types import pixel_bounds, take_float32
from ivc_export.runtime.onnxruntime.session_options import PROVIDERS, cuda_options
from ivc_export.runtime.onnxruntime.stream import address_of
from ivc_export.runtime.onnxruntime.workspace import DeviceCache
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import (
    LOGIT_TOLERANCE,
    SCORE_TOLERANCE,
    SHAPES,
    Golden,
    make_large_embeddings,
    make_overflowing_checkpoint,
    random_picture,
)

PROMPT = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]


def lowered(bundle: Bundle, name: GraphName) -> ir.Model:
    return lower(ir.load(bundle.folder / f"{name}.onnx"), "ort-cuda")


@pytest.fixture(scope="module")
def fused(golden_bundle: Bundle) -> FusedSession:
    return FusedSession(golden_bundle, "cpu")


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_fused_graphs_keep_the_contract(golden_bundle: Bundle, name: GraphName) -> None:
    model = lowered(golden_bundle, name)
    LOWERINGS["ort-cuda"].verify(name, model, golden_bundle.manifest.graphs[name])
    left = {node.op_type for node in model.graph if node.op_type in ("Softmax", "Sigmoid", "ReduceMean", "Sqrt")}
    assert not left
    layers = golden_bundle.manifest.decoder.layers
    below = golden_bundle.manifest.selection_layer
    count = sum(node.op_type in ("GroupQueryAttention", "MultiHeadAttention") for node in model.graph)
    assert count == {"prefix": below, "decoder": layers - below}.get(name, count) > 0


def test_the_decode_graph_keeps_the_contract(golden_bundle: Bundle) -> None:
    m = golden_bundle.manifest
    info = graph_info("decode", m.dtype, m.decoder, m.rotary, m.selection, m.preprocessing, m.selection_layer)
    model = join_decode(*(ir.load(golden_bundle.folder / f"{name}.onnx") for name in ("prefix", "decoder")))
    verify_graph("decode", model, info)
    model = lower(model, "ort-cuda")
    LOWERINGS["ort-cuda"].verify("decode", model, info)
    assert {node.domain for node in model.graph} == {"", "com.microsoft"}
    operators = Counter(node.op_type for node in model.graph)
    assert operators["Cos"] == 1  # angles of both halves are the same
    layers = golden_bundle.manifest.decoder.layers
    assert operators["GroupQueryAttention"] == layers and operators["Gemm"] == 5 * layers + 1
    assert not {"RotaryEmbedding", "Split", "Shape", "Gather"} & set(operators)  # nothing that a host would compute


def test_fused_prefill_equals_portable(golden_bundle: Bundle, fused: FusedSession) -> None:
    picture = random_picture(Grid(4, 5), 0)
    wanted = HostConversation(OnnxSession(golden_bundle), 0.4).run(PROMPT, [picture])
    found = FusedConversation(fused, 0.4, capacity=64).run(PROMPT, [picture])
    np.testing.assert_array_equal(found.keep_index, wanted.keep_index)
    np.testing.assert_array_equal(found.prefix["seed_index"], wanted.prefix["seed_index"])
    assert np.abs(found.prefix["token_score"] - wanted.prefix["token_score"]).max() < SCORE_TOLERANCE
    assert np.abs(found.image_embeds[0] - wanted.image_embeds[0]).max() < LOGIT_TOLERANCE
    assert np.abs(found.logits - wanted.logits).max() < LOGIT_TOLERANCE


def test_fused_conversations_equal_portable_ones(golden_bundle: Bundle, fused: FusedSession) -> None:
    """Prefill, decode steps, a turn with two pictures, and decode steps again, over one cache."""
    portable, found = HostConversation(OnnxSession(golden_bundle)), FusedConversation(fused, capacity=150)
    two = [1, 500, *[503] * 12, 501, 3, 500, *[503] * 20, 501, 7, 8]
    turns = [(PROMPT, [random_picture(Grid(4, 5), 0)]), ([5], []), ([6], [])]
    turns += [
        (two, [random_picture(Grid(3, 4), 1), random_picture(Grid(4, 5), 2)]),
        ([9], []),
        ([4, 5, 6], []),
        ([7], []),
    ]
    for tokens, pictures in turns:
        wanted, step = portable.run(tokens, pictures), found.run(tokens, pictures)
        np.testing.assert_array_equal(step.keep_index, wanted.keep_index)
        assert np.abs(step.logits - wanted.logits).max() < LOGIT_TOLERANCE
        assert (found.cache.length, found.next_position) == (portable.cache.length, portable.next_position)
        assert found.cache.bytes_used == portable.cache.bytes_used


def test_a_picture_of_one_row_is_no_decode_step(golden_bundle: Bundle, fused: FusedSession) -> None:
    """Nor is the first row of all, which has no others to look at."""
    portable, found = HostConversation(OnnxSession(golden_bundle)), FusedConversation(fused, capacity=50)
    picture = random_picture(Grid(1, 1), 3)
    turns = [("prefill", [5], []), ("decode", [6], []), ("prefill", [503], [picture]), ("decode", [503], [])]
    for stage, tokens, pictures in turns:
        for one in (portable, found):
            one.timings = Timings()
        wanted, step = portable.run(tokens, pictures), found.run(tokens, pictures)
        assert np.abs(step.logits - wanted.logits).max() < LOGIT_TOLERANCE
        for one in (portable, found):
            assert f"{stage}.decoder" in one.timings.seconds and ("vision" in one.timings.seconds) == bool(pictures)
        for shown, reference in zip(step.image_embeds, wanted.image_embeds, strict=True):
            assert np.abs(shown - reference).max() < LOGIT_TOLERANCE


def test_fused_caches_hold_the_kept_rows(golden_bundle: Bundle, fused: FusedSession) -> None:
    portable, found = HostConversation(OnnxSession(golden_bundle)), FusedConversation(fused, capacity=50)
    for tokens, pictures in ((PROMPT, [random_picture(Grid(4, 5), 0)]), ([5], [])):
        portable.run(tokens, pictures)
        found.run(tokens, pictures)
        for name, value in found.cache.inputs().items():
            rows = value.numpy()[:, :, : found.cache.length]
            assert np.abs(rows - portable.cache[name]).max() < LOGIT_TOLERANCE, name


def addresses(conversation: FusedConversation) -> set[int]:
    workspace = conversation._workspace
    assert workspace is not None
    values = (*workspace.cache.current.values(), *workspace.cache.spare.values(), *workspace.step.values())
    return {address_of(value) for value in (*values, workspace.logits)}


def test_a_conversation_works_where_a_finished_one_did(golden_bundle: Bundle) -> None:
    """In the same memory, over the other's rows, by the same binding and so the same captured CUDA graph."""
    session = FusedSession(golden_bundle, "cpu")

    def answer() -> tuple[set[int], dict[bool, tuple[Any, int]], list[npt.NDArray[Any]]]:
        one = session.converse(0.4, 64)
        steps = [one.run(PROMPT, [random_picture(Grid(4, 5), 0)]), one.run([5]), one.run([6])]
        assert one._workspace is not None
        return addresses(one), dict(one._workspace.bindings), [step.logits for step in steps]

    first = answer()
    before = session.converse(0.4, 64)
    before.run([9] * 60)  # more rows, which stay
    before.run([8])
    del before
    again = answer()
    assert again[0] == first[0] and again[1] == first[1] and list(first[1]) == [True]
    for found, wanted in zip(again[2], first[2], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert next(session.captures) == 2


def test_live_conversations_share_no_memory(golden_bundle: Bundle, fused: FusedSession) -> None:
    """Nor does one of another capacity take what a finished one leaves."""
    ours, others = (FusedConversation(fused, 0.4, capacity=61) for _ in range(2))
    assert not addresses(ours) & addresses(others)
    wanted = HostConversation(OnnxSession(golden_bundle), 0.4)
    for tokens, pictures in ((PROMPT, [random_picture(Grid(4, 5), 0)]), ([5], []), ([6], [])):
        others.run([3, 4, *tokens[-4:]])
        step, reference = ours.run(tokens, pictures), wanted.run(tokens, pictures)
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
    left = addresses(others)
    del others
    larger, same = FusedConversation(fused, capacity=62), FusedConversation(fused, capacity=61)
    assert larger.cache.capacity == 62 and not addresses(larger) & left
    assert addresses(same) == left


def test_fused_graphs_give_the_golden_tokens(golden: Golden, fused: FusedSession) -> None:
    conversation = FusedConversation(fused, capacity=400)
    step = conversation.run(golden.tokens, [golden.picture])
    np.testing.assert_array_equal(step.keep_index, golden.data["keep_indices"])
    tokens = []
    for logits in golden.data["pruned_step_logits"]:
        assert np.abs(step.logits - logits).max() < LOGIT_TOLERANCE
        tokens.append(int(step.logits.argmax()))
        step = conversation.run(tokens[-1:])
    assert tokens == golden.data["pruned_tokens"].ravel().tolist()


def test_weights_are_held_once(fused: FusedSession) -> None:
    sizes = {name: int(np.prod(value.shape())) for name, value in fused._weights.items()}
    assert {"model.norm.weight", "visual.blocks.0.norm1.weight"} <= set(sizes)
    stored = {w.file: w.size for w in fused.bundle.manifest.weights}
    assert 4 * sum(sizes.values()) <= sum(stored.values())


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_weights_go_to_the_device_once(stored: FloatName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sessions read them; those of the dtype that is computed in stay where the file is mapped."""
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "checkpoint", dtype=stored), tmp_path / "bundle"))
    placed = []
    value = FusedSession.value

    def place(self: FusedSession, array: npt.NDArray[Any]) -> Any:
        placed.append(array.size)
        return value(self, array)

    monkeypatch.setattr(FusedSession, "value", place)
    session = FusedSession(bundle, "cpu")
    models = [ir.load(bundle.folder / f"{name}.onnx") for name in GRAPH_NAMES]
    weights = {
        n: v for m in models for n, v in m.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)
    }
    own = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
    packed = {
        "+".join(name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")) + "/packed"
        for name in weights
        if name.endswith(own[:2])
    }
    assert set(session._weights) == {name for name in weights if not name.endswith(own)} | packed
    assert len(placed) == len(session._weights)
    one = session._weights["model.layers.0.mlp.up_proj.weight"].data_ptr()
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert any(start <= one < end for start, end in ranges) == (stored == "float32")


def test_float16_graphs_follow_float32(golden_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CUDA provider gets, weights converted, on the CPU provider, which rounds less often."""
    monkeypatch.setitem(cast("dict[str, str]", graphs_module.DTYPES), "cpu", "float16")
    found = FusedConversation(FusedSession(golden_bundle, "cpu"), 0.4, capacity=80)
    wanted = HostConversation(OnnxSession(golden_bundle), 0.4)
    for tokens, pictures in [
        (PROMPT, [random_picture(Grid(4, 5), 0)]),
        ([5], []),
        ([6], []),
        ([9, 8, 7], []),
        ([4], []),
    ]:
        step = found.run(tokens, pictures)
        reference = wanted.run(tokens, pictures, keep_index=step.keep_index)
        scale = np.abs(reference.logits).max()
        assert 0 < np.abs(step.logits - reference.logits).max() < 1e-2 * scale  # 11 bits; 2.6e-3 measured


def test_residual_sums_may_leave_float16s_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export(ExportRecipe(make_overflowing_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"))
    wanted = HostConversation(OnnxSession(bundle))
    monkeypatch.setitem(cast("dict[str, str]", graphs_module.DTYPES), "cpu", "float16")
    found = FusedConversation(FusedSession(bundle, "cpu"), capacity=40)
    for tokens, pictures in ((PROMPT, [random_picture(Grid(4, 5), 0)]), ([5], []), ([6], [])):
        step = wanted.run(tokens, pictures)
        if pictures:
            assert np.abs(step.prefix["hidden_states"]).max() > 65504
        logits = found.run(tokens, pictures).logits
        assert np.abs(logits - step.logits).max() < 1e-2 * np.abs(step.logits).max()  # 5e-3 measured


def test_activations_beyond_float16_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_residuals, "SCALE", 1.0)
    bundle = export(ExportRecipe(make_overflowing_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle"))
    assert np.isfinite(FusedConversation(FusedSession(bundle, "cpu")).run(PROMPT[-4:]).logits).all()
    monkeypatch.setitem(cast("dict[str, str]", graphs_module.DTYPES), "cpu", "float16")
    session = FusedSession(bundle, "cpu")
    for _ in range(2):
        wanted = (
            "exceed the range of float16 on onnxruntime-cpu: compute in float32, which is the default on this backend"
        )
        with pytest.raises(UserError, match=wanted):
            FusedConversation(session, capacity=10).run(PROMPT[-4:])
    gc.collect()
    assert not session._idle  # what is no number would spoil the next conversation


def test_embeddings_beyond_float16_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a prefill and in a decode step, and only where such a token is run."""
    bundle = export(ExportRecipe(make_large_embeddings(tmp_path / "checkpoint"), tmp_path / "bundle"))
    assert np.isfinite(FusedConversation(FusedSession(bundle, "cpu")).run([1, 5]).logits).all()
    monkeypatch.setitem(cast("dict[str, str]", graphs_module.DTYPES), "cpu", "float16")
    conversation = FusedConversation(FusedSession(bundle, "cpu"), capacity=10)
    for tokens in ([1, 5], [1, 2], [5], [3]):
        if 5 not in tokens:
            assert np.isfinite(conversation.run(tokens).logits).all()
            continue
        with pytest.raises(
            UserError,
            match=r"an embedding of this model has values up to 1e\+05, but the largest value of float16 is "
            r"65504: use --backend",
        ):
            conversation.run(tokens)
    assert conversation.cache.length == 3


def test_pixels_beyond_float16_are_one_sentence(golden_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What normalisation makes of white and black is known before any picture."""
    m = golden_bundle.manifest
    narrow = m.preprocessing.model_copy(update={"std": (1.0, 1e-5, 1.0), "mean": (0.5, 0.9, 0.5)})
    assert np.allclose(pixel_bounds(narrow)[:, 1], [-9e4, 1e4])
    bundle = replace(golden_bundle, manifest=m.model_copy(update={"preprocessing": narrow}))
    FusedSession(bundle, "cpu")
    monkeypatch.setitem(cast("dict[str, str]", graphs_module.DTYPES), "cpu", "float16")
    with pytest.raises(
        UserError,
        match=r"normalised picture of this model has values up to 9e\+04, but the largest value of float16 is 65504",
    ):
        FusedSession(bundle, "cpu")


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_hard_linked_weights_are_read(stored: FloatName, tmp_path: Path) -> None:
    """As they are, and converted; onnx_ir itself refuses files with several links."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype=stored)
    linked = export(ExportRecipe(checkpoint, tmp_path / "linked", weights="link"))
    copied = export(ExportRecipe(checkpoint, tmp_path / "copied"))
    steps = [FusedConversation(FusedSession(b, "cpu"), capacity=40).run([1, 2, 3]) for b in (linked, copied)]
    np.testing.assert_array_equal(steps[0].logits, steps[1].logits)


def test_pixels_are_narrowed_by_the_graph(golden_bundle: Bundle) -> None:
    """NumPy takes tens of milliseconds for that."""
    model = lower(RetypeFloatsPass("float16")(ir.load(golden_bundle.folder / "vision.onnx")).model, "ort-cuda")
    before = [value.name for value in model.graph.inputs]
    take_float32(model)
    assert [value.name for value in model.graph.inputs] == before
    assert model.graph.inputs[0].dtype == ir.DataType.FLOAT and not model.graph.inputs[1].dtype.is_floating_point()  # type: ignore[union-attr]
    (cast,) = model.graph.inputs[0].consumers()
    assert cast.op_type == "Cast" and cast.attributes["to"].as_int() == ir.DataType.FLOAT16
    assert cast.outputs[0].uses()


def test_a_full_cache_is_one_sentence(fused: FusedSession) -> None:
    with pytest.raises(UserError, match="has 20 rows, but 28 are needed: give it a larger capacity"):
        FusedConversation(fused, capacity=20).run(PROMPT, [random_picture(Grid(4, 5), 0)])


def test_an_answer_ends_at_the_caches_last_row(fused: FusedSession) -> None:
    assert len(list(generate(FusedConversation(fused, capacity=6), [1, 2, 3], stop=()))) == 4


def test_a_cache_without_a_capacity_grows(
    golden_bundle: Bundle, fused: FusedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prefill and in a decode step; the smaller one goes to the next conversation that it fits."""
    monkeypatch.setattr(fused_module, "BLOCK", 8)
    fused._idle.clear()
    wanted, found = HostConversation(OnnxSession(golden_bundle)), FusedConversation(fused)
    found.headroom = 4
    assert (found.cache.capacity, found.cache.bytes_used, found.cache.room) == (0, 0, None)
    capacities = []
    for tokens, pictures in [
        ([1, 2, 3], []),
        (PROMPT, [random_picture(Grid(4, 5), 0)]),
        *[([t], []) for t in range(40)],
    ]:
        step, reference = found.run(tokens, pictures), wanted.run(tokens, pictures)
        np.testing.assert_array_equal(step.keep_index, reference.keep_index)
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
        capacities.append(found.cache.capacity)
    # 3 + 4; 31 + 4; 3 + 18 + 20 rows that are one too many, and half as many again as there were
    assert list(dict.fromkeys(capacities)) == [8, 40, 64] and found.cache.room is None
    assert [workspace.cache.capacity for workspace in fused._idle] == [40]
    assert FusedConversation(fused, capacity=41).cache.room == 41 and len(fused._idle) == 1
    left = addresses(FusedConversation(fused, capacity=40))
    small = FusedConversation(fused)
    small.headroom = 4
    small.run([1, 2])
    assert addresses(small) == left  # a larger one serves
    assert small.cache.room is None and FusedConversation(fused, capacity=40).cache.room == 40


def test_a_cache_begins_with_what_is_wanted(fused: FusedSession) -> None:
    """The prompt's rows and an answer's, in whole blocks, and none behind the model's last position."""
    conversation = FusedConversation(fused)
    assert len(list(generate(conversation, [1] * 500, sampling=Sampling(max_tokens=3), stop=()))) == 3
    assert conversation.cache.capacity == 512
    conversation = FusedConversation(fused)
    list(generate(conversation, [1] * 500, sampling=Sampling(max_tokens=3000), stop=range(10**6)))
    assert conversation.cache.capacity == 3584
    fused._idle.clear()
    conversation, most = FusedConversation(fused), fused.bundle.manifest.decoder.max_positions
    list(generate(conversation, [1] * 500, sampling=Sampling(max_tokens=10**9), stop=range(10**6)))
    assert conversation.cache.capacity == most == 4096


@pytest.mark.parametrize("known", [True, False])
def test_a_cache_is_no_larger_than_memory(known: bool, fused: FusedSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is wanted behind a run does not fit, known before or not, the run itself does."""
    m, row = fused.bundle.manifest, DeviceCache.row_bytes(fused.bundle.manifest, fused.dtype)
    place = FusedSession.value

    def value(self: FusedSession, array: npt.NDArray[Any]) -> Any:
        if array.shape[2:3] == (2048,):
            raise UserError("for lack of memory")
        return place(self, array)

    fused._idle.clear()
    if known:
        monkeypatch.setattr(fused_module, "available_bytes", lambda: 1500 * row)
    else:
        monkeypatch.setattr(FusedSession, "value", value)
    conversation = FusedConversation(fused)
    conversation.headroom = 1600
    assert np.isfinite(conversation.run([1, 2, 3]).logits).all() and conversation.cache.capacity == 512
    buffers = [*conversation.cache.current.values(), *conversation.cache.spare.values()]
    assert row * 512 == sum(buffer.tensor_size_in_bytes() for buffer in buffers)
    assert m.decoder.layers * 2 == len(conversation.cache.current)


def test_caches_without_memory_are_one_sentence(fused: FusedSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a conversation whose cache cannot grow goes on as it was."""
    monkeypatch.setattr(fused_module, "BLOCK", 8)
    fused._idle.clear()
    conversation, other = FusedConversation(fused), FusedConversation(fused, capacity=60)
    conversation.headroom = 1
    conversation.run([1, 2, 3])

    def fail(*_: object) -> None:
        raise MemoryError("full")

    with monkeypatch.context() as full:
        full.setattr(FusedSession, "value", fail)
        with pytest.raises(UserError, match=r"caches of 16 rows cannot be allocated for lack of memory \(full\)"):
            conversation.run([4] * 10)
        with pytest.raises(UserError, match=r"caches of 2,000 rows .* \(full\): use smaller pictures, or close other"):
            fused.converse(capacity=2000)
    for tokens in ([1, 2, 3], [5], [6] * 20):
        wanted_step = other.run(tokens)
        if len(tokens) != 3:
            np.testing.assert_array_equal(conversation.run(tokens).logits, wanted_step.logits)


@pytest.mark.parametrize("capacity", [0, -1, 2**31])
def test_caches_of_no_rows_are_one_sentence(capacity: int, fused: FusedSession, golden_bundle: Bundle) -> None:
    for session in (fused, OnnxSession(golden_bundle)):
        with pytest.raises(UserError, match=f"capacity {capacity} is out of range: give 1 to 2,147,483,647 rows"):
            session.converse(capacity=capacity)


def test_chats_run_fused(sample_bundle: Bundle, sample_session: OnnxSession) -> None:
    found = Chat(FusedSession(sample_bundle, "cpu"), capacity=600, sampling=Sampling(max_tokens=6))
    wanted = Chat(sample_session, sampling=Sampling(max_tokens=6))
    for question, pictures in (("Where is the ring?", [SHAPES]), ("And the square?", [])):
        assert "".join(found.ask(question, pictures)) == "".join(wanted.ask(question, pictures))
        assert found.tokens == wanted.tokens


def test_run_without_a_gpu_is_one_sentence(sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert ivc_run([str(sample_bundle.folder), "--prompt", "Hello", "--backend", "onnxruntime-cuda"]) == 2
    assert "install onnxruntime-gpu" in " ".join(capsys.readouterr().err.split())


def test_a_missing_provider_is_one_sentence(golden_bundle: Bundle) -> None:
    with pytest.raises(UserError, match="has no CUDA provider: install onnxruntime-gpu"):
        FusedSession(golden_bundle, "cuda")


def test_norms_take_sums_and_biases_over(golden_bundle: Bundle) -> None:
    """Two norms a vision block, of which the very first reads patches, and one behind the last block."""
    model = lowered(golden_bundle, "vision")
    operators = Counter(node.op_type for node in model.graph)
    assert operators["SkipLayerNormalization"] == 2 * operators["MultiHeadAttention"]
    assert operators["LayerNormalization"] == 1
    assert not [node for node in model.graph if node.op_type == "Gemm" and len(node.inputs) > 2]
    added = [str(node.inputs[1]) for node in model.graph if node.op_type == "Add" and "bias" in str(node.inputs[1])]
    assert added and not [bias for bias in added if "attn.proj" in bias or "fc2" in bias]
    fused = [node for node in model.graph if node.op_type == "SkipLayerNormalization"]
    assert all("attn.proj.bias" in str(node.inputs[4]) or "fc2.bias" in str(node.inputs[4]) for node in fused)


def test_rotations_need_no_casts(golden_bundle: Bundle) -> None:
    for name in GRAPH_NAMES:
        model = lowered(golden_bundle, name)
        turned = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
        assert turned and len({node.inputs[2:] for node in turned}) == 1  # one pair of tables for all layers
        assert not [node for node in turned for user in node.outputs[0].consumers() if user.op_type == "Cast"]


@pytest.mark.parametrize(
    ("version", "strict"), [("1.26.0", True), ("1.27.0", False), ("1.31.1", False), ("2.0", False)]
)
def test_old_norms_are_told_to_square_in_float32(version: str, strict: bool) -> None:
    assert ("enable_skip_layer_norm_strict_mode" in cuda_options(version, True)) == strict
    assert "enable_cuda_graph" not in cuda_options(version, False)
    assert cuda_options(version, False, exact=True)["arena_extend_strategy"] == "kSameAsRequested"
    assert "arena_extend_strategy" not in cuda_options(version, False)


def test_small_heads_are_turned_outside_attention(tmp_path: Path) -> None:
    """Of 8 columns: GroupQueryAttention turns multiples of 16 alone."""
    config = TINY["qwen2_vl"] | {"num_attention_heads": 8, "num_key_value_heads": 4}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "checkpoint", config), tmp_path / "bundle"))
    assert bundle.manifest.decoder.head_dim == 8
    wanted, found = HostConversation(OnnxSession(bundle)), FusedConversation(FusedSession(bundle, "cpu"))
    for tokens in ([1, 2, 3], [4], [5]):
        assert np.abs(found.run(tokens).logits - wanted.run(tokens).logits).max() < LOGIT_TOLERANCE


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ("This session cannot use the graph capture feature as requested by the user", None),
        ("Failed to allocate memory for requested buffer of size 9", "for lack of memory .*size 9.: close other prog"),
        ("EP Error: no device", r"decode does not open in onnxruntime \(.*no device\): use --backend onnxruntime-cpu"),
    ],
)
def test_what_onnxruntime_does_not_capture_is_launched(
    refusal: str, sentence: str | None, golden_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other refusals are told."""
    opened: list[bool] = []

    def refuse(
        content: bytes, options: Any, providers: list[tuple[str, dict[str, str]]]
    ) -> onnxruntime.InferenceSession:
        opened.append("enable_cuda_graph" in providers[0][1])
        if opened[-1]:
            raise state.Fail(f"[ONNXRuntimeError] : 1 : FAIL : {refusal}")
        return session_class(content, options, providers=["CPUExecutionProvider"])

    session_class = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    monkeypatch.setitem(cast("dict[str, str]", PROVIDERS), "cuda", "CPUExecutionProvider")
    monkeypatch.setitem(cast("dict[str, str]", graphs_module.DTYPES), "cuda", "float32")
    monkeypatch.setattr(FusedSession, "value", lambda self, array: onnxruntime.OrtValue.ortvalue_from_numpy(array))
    if sentence:
        with pytest.raises(UserError, match=sentence):
            FusedSession(golden_bundle, "cuda")
        return
    assert not FusedSession(golden_bundle, "cuda").cuda_graph
    assert opened == [False, False, False, True, False, False]


def test_a_missing_capture_is_said(
    sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "open_session", lambda bundle, *_, **__: FusedSession(bundle, "cpu"))
    asked = ["--prompt", "Hello", "--backend", "onnxruntime-cuda", "--max-tokens", "1"]
    assert ivc_run([str(sample_bundle.folder), *asked]) == 0
    assert "without a CUDA graph" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("family", families.names())
def test_every_family_runs_fused(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY[family])
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    _, tokens, picture = make_prompt(bundle, draw_picture())
    portable, found = (
        HostConversation(OnnxSession(bundle)),
        FusedConversation(FusedSession(bundle, "cpu"), capacity=700),
    )
    for more in (tokens, [5], [6], [7]):
        given = [picture] if more is tokens else []
        wanted, step = portable.run(more, given), found.run(more, given)
        np.testing.assert_array_equal(step.keep_index, wanted.keep_index)
        assert np.abs(step.logits - wanted.logits).max() < LOGIT_TOLERANCE
