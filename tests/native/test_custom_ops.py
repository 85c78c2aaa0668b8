"""Custom operators for onnxruntime: their lowering, and the operators themselves over emulated kernels."""

from __future__ import annotations

import _ctypes
import ctypes
import gc
import itertools
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_run
from ivc_export.contract.graphs import graph_info
from ivc_export.contract.names import GRAPH_NAMES, IVC_DOMAIN, GraphName
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.graph.counting import Tensors, linear_scratch
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.edit import back
from ivc_export.lowering.join_decode import join_decode
from ivc_export.runtime.chat import Sampling, generate
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.onnxruntime.session_options import register
from ivc_export.runtime.onnxruntime.shared_memory import functions
from ivc_export.runtime.onnxruntime.staging import Staging
from ivc_export.runtime.onnxruntime.stream import Place, Stream
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import TINY, wide
from tests.conftest import LOGIT_TOLERANCE
from tests.native.attention import encoder_case
from tests.native.custom_ops import (
    OwnAttentionSession,
    attend_bound,
    attend_joined,
    check_attention,
    check_gather,
    check_selection,
    encode,
    select,
    turn_heads,
)
from tests.native.joined import JoinedCase, joined_case
from tests.native.kernels import TYPES, random_case
from tests.native.linear import IvcLinear, linear_case
from tests.native.linear_ops import FEW, Operands, check_linear, check_packed, run_linear, run_node, run_packed
from tests.native.packed import packed_case


@pytest.fixture(scope="module", params=families.names())
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "checkpoint", TINY[request.param])
    return export(ExportRecipe(checkpoint, folder / "bundle"))


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_graphs_with_custom_operators_keep_the_contract(bundle: Bundle, name: GraphName) -> None:
    model = lower(ir.load(bundle.folder / f"{name}.onnx"), "ort-cuda-ops")
    LOWERINGS["ort-cuda-ops"].verify(name, model, bundle.manifest.graphs[name])
    assert not model.functions
    rule = bundle.manifest.selection
    select = ["CacheIndex"] if rule.tiles or rule.views else ["SelectTokens", "CacheIndex"]
    operators = [node for node in model.graph if node.domain == IVC_DOMAIN and node.op_type != "TurnHeads"]
    wanted = {"vision": [], "prefix": select, "decoder": ["CompactGatherN"]}[name]
    assert [node.op_type for node in operators if node.op_type != "FusedLinear"] == wanted
    if name == "decoder":
        compacted = [str(v.name) for v in model.graph.outputs if str(v.name).startswith("compact_")]
        assert [v.name for v in operators[0].outputs] == compacted
        assert list(operators[0].attributes["axes"].as_ints()) == [2] * len(compacted)


def test_selection_in_onnxruntime_agrees_with_numpy(library: Path) -> None:
    for seed in range(1, 30):
        check_selection(library, "cpu", seed, 800, "bfloat16" if seed % 5 == 0 else "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gathering_in_onnxruntime_agrees_with_numpy(library: Path, dtype: str) -> None:
    check_gather(library, "cpu", dtype)


def test_attention_in_onnxruntime_agrees_with_float64(library: Path) -> None:
    """Over caches that are other memory than the outputs, in all types, on rows that are packed, in part or not."""
    for seed in range(20):
        check_attention(library, "cpu", seed, 60)


def float32_case() -> JoinedCase:
    """Several rows in float32, with norms and angles, over a cache that is not full."""
    cases = (joined_case(seed) for seed in range(500) if seed % 3)
    return next(
        c
        for c in cases
        if c.dtype == "float32" and len(c.rows) > 1 and c.cos is not None and c.query_norm is not None and c.past_length
    )


def test_caches_are_written_in_place_where_they_are_bound_so(library: Path) -> None:
    """Rows that hold nothing yet stay as they were, and the past is not copied."""
    with np.errstate(all="ignore"):
        case = float32_case()
        y, *_ = attend_joined(library, "cpu", case)
        found, keys, values = attend_bound(library, "cpu", case)
        np.testing.assert_array_equal(found, y)
        case.check_answer(found, keys[0], values[0])


def test_impossible_attention_is_refused(library: Path) -> None:
    case = float32_case()
    assert case.cos is not None and case.query_norm is not None
    rows = len(case.rows)
    with pytest.raises(Exception, match="the caches have no room for this run's rows"):
        caches = case.key_cache[:, : rows - 1], case.value_cache[:, : rows - 1]
        attend_joined(library, "cpu", replace(case, key_cache=caches[0], value_cache=caches[1]))
    with pytest.raises(Exception, match="both caches must have the shape"):
        attend_joined(library, "cpu", replace(case, key_cache=case.key_cache[:, 1:]))
    with pytest.raises(Exception, match=r"joined rows must have the shape \[rows, \(heads \+ 2 kv_heads\) head_dim\]"):
        attend_joined(library, "cpu", replace(case, rows=case.rows[:, 1:]))
    with pytest.raises(Exception, match="cosines and sines must have the shape"):
        attend_joined(library, "cpu", replace(case, cos=case.cos[:, 1:]))
    with pytest.raises(Exception, match="one weight for each element"):
        attend_joined(library, "cpu", replace(case, query_norm=case.query_norm[1:]))
    with pytest.raises(Exception, match="all frames must have the same number of rows"):
        turn_heads(library, "cpu", case, rows + 1)
    windows = encoder_case(3, True, 60)
    with pytest.raises(Exception, match="query, key and value must have the shape"):
        encode(library, "cpu", replace(windows, k=windows.k[:, :, 1:]))
    with pytest.raises(Exception, match="window_of_place and block_size must be given together"):
        encode(library, "cpu", replace(windows, block_size=0))
    with pytest.raises(Exception, match="window_of_place must have one entry for each row"):
        encode(library, "cpu", replace(windows, windows=windows.windows[1:]))  # type: ignore[index]


def test_a_wide_product_gives_float32(library: Path) -> None:
    cases = [c for seed in range(99) if (c := linear_case(seed)).dtype == "float16" and not c.layer_norm]
    case = next(c for c in cases if len(c.x) > FEW)
    operands: Operands = {"x": case.x, "weight": case.weight, "norm": case.norm, "bias": case.bias}
    operands |= {"residual": case.residual}
    wide = run_node(library, "cpu", "FusedLinearWide", case, operands, wide=True)
    case.compare(wide.astype(case.x.dtype), 0.0)
    assert (wide != wide.astype(np.float16)).any()


def test_products_in_onnxruntime_agree_with_float64(library: Path) -> None:
    for seed in range(60):
        check_linear(library, "cpu", linear_case(seed))
    for seed in range(40):
        packed = packed_case(seed, 4 + 4 * (seed % 3 == 0))
        check_packed(library, "cpu", packed)
        if packed.linear.norm is not None:
            bias = packed.linear.norm[::-1] / 2
            with_bias = replace(packed.linear, norm=np.concatenate([packed.linear.norm, bias]).astype(bias.dtype))
            check_packed(library, "cpu", replace(packed, linear=with_bias))


@pytest.mark.parametrize(
    ("name", "stem"),
    [("FusedLinear", "ivcLinear"), ("FusedLinearInt4", "ivcLinearPacked"), ("FusedLinearInt8", "ivcLinearPacked")],
)
def test_what_products_are_counted_to_take_is_what_they_ask_for(library: Path, name: str, stem: str) -> None:
    ask = ctypes.CDLL(str(library))[f"{stem}Workspace"]
    ask.restype = ctypes.c_size_t
    features, out, half = 256, 128, onnx.TensorProto.FLOAT16
    for rows, gated in itertools.product((1, 2, 3, 8, 9, 40), (0, 1)):
        x, weight = (
            onnx.helper.make_tensor_value_info(name, half, shape)
            for name, shape in (("x", [rows, features]), ("weight", [out * (1 + gated), features]))
        )
        node = onnx.helper.make_node(name, ["x", "weight"], ["y"], domain=IVC_DOMAIN, gated=gated)
        model = onnx.helper.make_model(onnx.helper.make_graph([node], "one", [x, weight], []))
        struct = IvcLinear(rows, features, out, TYPES["float16"], 0, gated)
        assert linear_scratch(node, Tensors(model)) == (most := ask(ctypes.byref(struct), 1))
        struct.layer_norm = 1  # whose rows are apart, however few
        assert ask(ctypes.byref(struct), 1) == (most or 2 * rows * features)


def test_a_product_has_the_axes_of_its_residual(library: Path) -> None:
    case = next(c for seed in range(99) if (c := linear_case(seed)).residual is not None and len(c.x) > 2)
    wanted = run_linear(library, "cpu", case)
    np.testing.assert_array_equal(run_linear(library, "cpu", case, x=case.x[None]).reshape(wanted.shape), wanted)


def test_impossible_products_are_refused(library: Path) -> None:
    case = next(c for seed in range(99) if (c := linear_case(seed)).gated and len(c.x) > 2)
    with pytest.raises(Exception, match="rows of x and of weight must have the same length"):
        run_linear(library, "cpu", case, x=case.x[:, :-1])
    with pytest.raises(Exception, match="weight of a gated product must have an even number"):
        run_linear(library, "cpu", case, weight=case.weight[1:])
    with pytest.raises(Exception, match="norm must have one weight for each feature"):
        run_linear(library, "cpu", case, norm=case.weight[0, 1:])
    with pytest.raises(Exception, match="bias must have one value for each row of weight"):
        run_linear(library, "cpu", case, bias=case.weight[1:, 0])
    with pytest.raises(Exception, match="residual must have the shape of y"):
        run_linear(library, "cpu", case, residual=case.x[1:, :1])
    with pytest.raises(Exception, match="there is no activation tanh"):
        run_linear(library, "cpu", replace(case, activation="tanh"))
    packed = packed_case(0)
    with pytest.raises(Exception, match="packed must have the shape"):
        run_packed(library, "cpu", packed, packed=packed.packed[:, :, 1:])
    with pytest.raises(Exception, match="scales must have one value for each block"):
        run_packed(library, "cpu", packed, scales=packed.scales[1:])
    pointed, points = next((p, p.points) for seed in range(99) if (p := packed_case(seed)).points is not None)
    assert points is not None
    with pytest.raises(Exception, match="zero_points must have the bits of an entry for each block"):
        run_packed(library, "cpu", pointed, points=points[1:])


def test_impossible_inputs_are_refused(library: Path) -> None:
    case = random_case(4, 100)
    for keep_count in (0, -1, len(case.visual) + 1):
        with pytest.raises(Exception, match="keep_count must be 1 to the number of visual tokens"):
            select(library, "cpu", case, keep_count)
    case = replace(case, visual=case.visual[1:])
    with pytest.raises(Exception, match="must have the same length"):
        select(library, "cpu", case)


@pytest.fixture(scope="module", params=families.names())
def wide_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(f"wide-{request.param}")
    checkpoint = make_checkpoint(folder / "checkpoint", wide(request.param, heads=4))
    return export(ExportRecipe(checkpoint, folder / "bundle"))


@pytest.mark.parametrize("name", [*GRAPH_NAMES, "decode"])
def test_our_attention_keeps_the_contract(wide_bundle: Bundle, name: str) -> None:
    """Heads are split by our operators, from one product's rows."""
    m = wide_bundle.manifest
    if name == "decode":
        portable = join_decode(wide_bundle.graph("prefix"), wide_bundle.graph("decoder"))
        info = graph_info("decode", m.dtype, m.decoder, m.rotary, m.selection, m.preprocessing, m.selection_layer)
    else:
        portable, info = wide_bundle.graph(name), m.graphs[name]  # type: ignore[index, arg-type]
    model = lower(portable, "ort-cuda-ops")
    LOWERINGS["ort-cuda-ops"].verify(name, model, info)  # type: ignore[arg-type]
    found = Counter(node.op_type for node in model.graph)
    latent = m.decoder.value_dim != m.decoder.head_dim
    layers = {"prefix": m.selection_layer, "decoder": m.decoder.layers - m.selection_layer}.get(name, 0)
    assert found["AttendJoined"] == (m.decoder.layers if name == "decode" and not latent else 0)
    assert found["GroupQueryAttention"] == (0 if latent else layers)
    windows = m.family == "qwen2_5_vl" and name == "vision"
    assert found["EncodeAttend"] == windows and (found["MultiHeadAttention"] > 0) == (name == "vision")
    attending = found["GroupQueryAttention"] + found["MultiHeadAttention"] + found["EncodeAttend"]
    assert found["TurnHeads"] == attending and not found["RotaryEmbedding"]
    joined = [node.inputs[0] for node in model.graph if node.op_type in ("AttendJoined", "TurnHeads")]
    assert not [value for value in joined if value is None or value.producer().op_type == "Concat"]  # type: ignore[union-attr]
    sums = [node for node in model.graph if node.op_type == "FusedLinear" and len(node.inputs) == 5]
    rows = [back(node.inputs[0], "Reshape") for node in sums]
    made = [value.producer() for value in rows if value is not None]
    assert not [
        n for n in made if n and n.op_type in ("GroupQueryAttention", "MultiHeadAttention")
    ]  # taken as they are
    lengths = {node.inputs[3] for node in model.graph if node.op_type == "AttendJoined"}
    given = [v for v in model.graph.inputs if str(v.name).startswith("seqlens_k")]  # some layers have their own
    assert len(lengths) <= len(given)  # computed once for all layers
    if m.family in ("llava", "qwen2_vl", "qwen2_5_vl", "internvl"):
        assert found["Split"] == (name == "prefix")  # the selection reads the values of layer k-1
    if name == "decode" and not latent:
        assert not {"Shape", "Gather", "Transpose", "Reshape"} & found.keys()  # nothing that a host would compute


def test_a_decoder_layer_has_four_products(wide_bundle: Bundle) -> None:
    """Query, key and value as one, behind attention, gate and up as one, and down: with all that surrounds them."""
    m, family = wide_bundle.manifest, wide_bundle.manifest.family
    model = lower(join_decode(wide_bundle.graph("prefix"), wide_bundle.graph("decoder")), "ort-cuda-ops")
    found = Counter(node.op_type for node in model.graph)
    assert not {"Gemm", "Erf", "QuickGelu"} & found.keys()
    if family != "deepseek_vl_v2":
        assert found["FusedLinear"] == 4 * m.decoder.layers + 1
        assert not {"Add", "SkipSimplifiedLayerNormalization"} & found.keys()
        gated = [n for n in model.graph if n.op_type == "FusedLinear" and n.attributes["gated"].as_int()]
        assert len(gated) == m.decoder.layers
    vision = Counter(node.op_type for node in lower(wide_bundle.graph("vision"), "ort-cuda-ops").graph)
    assert vision["FusedLinear"] and not {"Gemm", "Erf", "Sigmoid"} & vision.keys()
    for lowering in ("ort-cuda-ops", "plugin"):
        vision = Counter(node.op_type for node in lower(wide_bundle.graph("vision"), lowering).graph)
        assert vision["LayerNormalization"] <= 1  # one before a Reshape, or one that a sum reads too
        assert not vision["SkipLayerNormalization"]


def test_every_family_attends_with_our_operators(wide_bundle: Bundle, library: Path) -> None:
    same_conversation(wide_bundle, FusedSession(wide_bundle, "cpu", op_library=library))


def test_our_operators_can_attend_everywhere(wide_bundle: Bundle, library: Path) -> None:
    same_conversation(wide_bundle, OwnAttentionSession(wide_bundle, "cpu", op_library=library))


def test_every_family_runs_with_custom_operators(bundle: Bundle, library: Path) -> None:
    same_conversation(bundle, FusedSession(bundle, "cpu", op_library=library))


def test_a_decode_step_begins_and_ends_in_host_memory(wide_bundle: Bundle, library: Path) -> None:
    """It tells the best token, and logits only where they are wanted; also of a table that is not lm_head's."""
    session = FusedSession(wide_bundle, "cpu", op_library=library)
    latent = wide_bundle.manifest.decoder.value_dim != wide_bundle.manifest.decoder.head_dim
    assert session.host_steps != latent  # whose caches are written by their rows' numbers
    if latent:
        return
    inputs = {value.name for value in session._sessions["decode"].get_inputs()}
    decoder = {value.name for value in session._sessions["decoder"].get_inputs()}
    assert session.answers and {"wanted", "best", "told"} <= decoder & inputs
    assert {name for name in inputs if not name.startswith("past_")} == {"step", "wanted", "best", "told"} | (
        {"before"} if wide_bundle.manifest.decoder.tied_embeddings else {"before", "table"}
    )
    _, tokens, picture = make_prompt(wide_bundle, draw_picture())
    wanted = FusedConversation(FusedSession(wide_bundle, "cpu"), capacity=700)
    found = FusedConversation(session, capacity=700)
    step, reference = found.run(tokens, [picture]), wanted.run(tokens, [picture])
    assert step.best == step.token == reference.token and "logits" in step.decoder
    first, logits = step, reference.logits
    for number in range(6):
        found.logits_wanted = number % 2 == 0
        step, reference = found.run([reference.token]), wanted.run([reference.token])
        assert step.best == step.token == reference.token
        assert ("logits" in step.decoder) == found.logits_wanted
        if found.logits_wanted:
            assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
    assert np.abs(first.logits - logits).max() < LOGIT_TOLERANCE  # the prefill's, on the device until now


def test_answers_are_the_same_where_the_best_token_is_told(wide_bundle: Bundle, library: Path) -> None:
    _, tokens, picture = make_prompt(wide_bundle, draw_picture())
    for sampling in (Sampling(max_tokens=5), Sampling(temperature=0.7, max_tokens=5)):
        sessions = (FusedSession(wide_bundle, "cpu", op_library=library), FusedSession(wide_bundle, "cpu"))
        answers = [list(generate(one.converse(), tokens, [picture], sampling, ())) for one in sessions]
        assert answers[0] == answers[1] and len(answers[0]) == 5


def same_conversation(bundle: Bundle, session: FusedSession) -> None:
    _, tokens, picture = make_prompt(bundle, draw_picture())
    wanted, found = HostConversation(OnnxSession(bundle)), FusedConversation(session, capacity=700)
    for more in (tokens, [5], [6], tokens, [7]):
        given = [picture] if more is tokens else []
        reference, step = wanted.run(more, given), found.run(more, given)
        np.testing.assert_array_equal(step.keep_index, reference.keep_index)
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
    assert len(session._captured) == 1  # the picture's second run would be a CUDA graph's


@pytest.mark.parametrize("lowering", ["portable", "native"])
def test_graphs_of_functions_open_where_our_operators_are_registered(
    bundle: Bundle, library: Path, lowering: str
) -> None:
    """onnxruntime prefers a registered operator to a body of its name: those of one name must have one signature."""
    for name in GRAPH_NAMES:
        options = onnxruntime.SessionOptions()
        folder = str(bundle.folder)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        register(library, options)
        content = ir.to_proto(lower(bundle.graph(name), lowering)).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        assert [o.name for o in session.get_outputs()] == [t.name for t in bundle.manifest.graphs[name].outputs]


def test_a_library_that_does_not_load_is_one_sentence(golden_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*operators\.so: build it \(docs/tensorrt\.md says how\)"):
        FusedSession(golden_bundle, "cpu", op_library=tmp_path / "operators.so")
    (tmp_path / "operators.so").write_text("nothing")
    with pytest.raises(UserError, match=r"operators\.so does not load as custom operators \(.*\): build it on"):
        FusedSession(golden_bundle, "cpu", op_library=tmp_path / "operators.so")


def test_a_library_of_another_version_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"is of another version of ivc-export: build it again"):
        functions(Path(_ctypes.__file__))


def test_a_failed_prefill_leaves_nothing_on_the_device(
    golden_bundle: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its first graphs used is given up, once the stream no longer uses it. The next run is as ever."""
    session = FusedSession(golden_bundle, "cpu", op_library=library)
    assert session.stream is not None and session._staging is not None
    conversation, other = FusedConversation(session, capacity=60), FusedConversation(session, capacity=60)
    wait, used = session.stream.wait, list[int]()

    def fail(name: str, *_: object, **__: object) -> None:
        raise MemoryError(name)

    def waited() -> bool:
        assert session._staging is not None
        used.append(session._staging.used)
        return wait()

    with monkeypatch.context() as full:
        full.setattr(session, "run", fail)
        full.setattr(session.stream, "wait", waited)
        with pytest.raises(MemoryError, match="prefix"):
            conversation.run([1, 2, 3])
    assert len(used) == 1 and used[0] > 0  # rows of embeddings were written
    np.testing.assert_array_equal(conversation.run([1, 2, 3]).logits, other.run([1, 2, 3]).logits)
    assert not session._pending and session._staging.used == 0


def test_a_run_that_the_device_cannot_finish_is_one_sentence(
    golden_bundle: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = FusedSession(golden_bundle, "cpu", op_library=library)
    monkeypatch.setattr(session.stream, "wait", lambda: False)
    with pytest.raises(UserError, match="cannot finish a run: check that the GPU and its driver work"):
        FusedConversation(session, capacity=60).run([1, 2, 3])


def test_arrays_reach_the_device_and_come_back(library: Path) -> None:
    """None is overwritten before the memory is used again, however often it has to grow."""
    staging = Staging(Stream(library), "cpu")
    generator = np.random.default_rng(0)
    for _ in range(3):
        given, places, values = list[Any](), list[Place](), list[Any]()
        for size in (3, 0, 70_000, 1, 200_000):
            arrays: dict[str, npt.NDArray[Any]] = {"x": generator.integers(-9, 9, (2, size), np.int32)}
            arrays["y"] = generator.random(size).astype(np.float32)
            given += arrays.values()
            places += staging.put(arrays).values()
            held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items() if size}
            values += [(arrays[name], found) for name, found in staging.get(held).items()]
        for array, place in zip(given, places, strict=True):
            assert (place.shape, place.dtype) == (array.shape, array.dtype) and place.address % array.itemsize == 0
            assert ctypes.string_at(place.address, array.nbytes) == array.tobytes()
        for array, found in values:
            np.testing.assert_array_equal(found, array)
        assert staging.used >= sum(array.nbytes for array in given)
        staging.reuse()
        assert staging.used == 0 and len(staging._blocks) == 1


def test_a_stream_outlives_its_sessions(golden_bundle: Bundle, library: Path) -> None:
    """Also a session that a binding keeps."""
    session = FusedSession(golden_bundle, "cpu", op_library=library)
    conversation = FusedConversation(session, capacity=60)
    conversation.run([1, 2, 3])
    conversation.run([4])
    workspace, stream = conversation._workspace, weakref.ref(session.stream)
    assert workspace is not None and workspace.bindings
    opened = session._sessions["vision"]
    del conversation, session
    gc.collect()
    assert stream() is not None
    del opened
    gc.collect()
    assert stream() is not None
    del workspace
    gc.collect()
    assert stream() is None


def test_marks_tell_the_time_between_them(library: Path) -> None:
    stream = Stream(library)
    first = stream.mark()
    time.sleep(0.02)
    second = stream.mark()
    assert 0.02 <= second.seconds_since(first) < 10
    assert first.seconds_since(second) == 0


def test_a_library_without_the_cuda_provider_is_one_sentence(
    sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ivc_run([str(sample_bundle.folder), "--prompt", "Hello", "--op-library", "operators.so"]) == 2
    assert "use it with --backend onnxruntime-cuda" in " ".join(capsys.readouterr().err.split())
