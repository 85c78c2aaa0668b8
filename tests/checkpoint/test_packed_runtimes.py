"""Bundles of packed layers on every runtime, against the same values as floats."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from ivc_export.bench.roofline import Workload
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.packed_layers import find_false_claim
from ivc_export.checkpoint.formats.nbits import Packing, dequantise, pack_blocks, pack_values
from ivc_export.contract.manifest import StoredLayer
from ivc_export.contract.names import GRAPH_NAMES, IR_VERSION, IVC_DOMAIN, OPSET
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.graph.functions import function
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.join_decode import join_decode
from ivc_export.lowering.onnxruntime.split_bytes import SplitBytesPass
from ivc_export.runtime.onnxruntime.cpu import OnnxSession, mapped
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.records import ONNXRUNTIME_CPU
from ivc_export.tensorrt.decide import decide
from ivc_export.tensorrt.graphs import EngineChoices, choose_graphs, graph_to_count, lowered, packed_weights
from ivc_export.tensorrt.recipe import EngineRecipe
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.checkpoint.quantised import LAYOUTS, write
from tests.checkpoint.test_toy_format import HALF, Turns, answers, largest
from tests.conftest import LOGIT_TOLERANCE
from tests.runtime.test_tensorrt import opened

PACKED = ("AWQ", "GPTQ, 8 bits, activations ordered", "compressed-tensors")


@pytest.fixture(scope="module", params=PACKED)
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """In float16, as the checkpoint is, and in float32 of floats that mean the same."""
    folder = tmp_path_factory.mktemp("packed")
    stored, wanted = write(make_checkpoint(folder / "plain"), folder, LAYOUTS[request.param])
    return export(ExportRecipe(stored, folder / "a", layer=2)), export(ExportRecipe(wanted, folder / "b", layer=2))


@pytest.fixture(scope="module")
def wanted(bundles: tuple[Bundle, Bundle]) -> Turns:
    return answers(OnnxSession(bundles[1], threads=1))


def test_the_cpu_provider_widens_scales_alone(bundles: tuple[Bundle, Bundle], wanted: Turns) -> None:
    assert largest(answers(OnnxSession(bundles[0], threads=1)), wanted) < LOGIT_TOLERANCE


@pytest.mark.parametrize("zero_points", [False, True])
def test_bytes_are_two_halves_of_exact_weights(zero_points: bool) -> None:
    random, out, features, packing = np.random.default_rng(0), 5, 72, Packing(8, 32, zero_points)
    values, zeros = random.integers(0, 256, (out, features), np.uint8), random.integers(0, 256, (out, 3), np.uint8)
    values[0, :2], zeros[0], values[1, :2], zeros[1] = 0, 255, 255, 0
    scales = random.uniform(0.01, 0.1, (out, 3)).astype(np.float16)
    arrays: dict[str, Any] = {"packed": pack_blocks(values, packing), "scales": scales}
    arrays |= {"zero_points": zeros} if zero_points else {}
    model = SplitBytesPass()(one_product(arrays, packing, out, features, "float16")).model
    assert [node.op_type for node in model.graph] == ["LinearNBitsZeroPoints", "LinearNBitsZeroPoints", "Add"]
    weight = np.zeros((out, features), np.float32)
    for node in list(model.graph)[:2]:
        packed, scale, points = (value.const_value.numpy() for value in node.inputs[1:])  # type: ignore[union-attr]
        weight += dequantise(packed, scale, points, 4, features)
    np.testing.assert_array_equal(weight, dequantise(arrays["packed"], scales, arrays.get("zero_points"), 8, features))


def test_halves_of_bytes_lie_in_pages_that_the_system_may_drop() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    copy = mapped(array)
    np.testing.assert_array_equal(copy, array)
    assert isinstance(copy, np.memmap) and np.ascontiguousarray(copy).ctypes.data == copy.ctypes.data


def test_no_room_for_halves_of_bytes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"of 12 bytes cannot be written \(No space left on device\): make room"):
        mapped(np.zeros((3, 4), np.uint8))


def test_a_manifest_that_says_otherwise_than_graphs_is_refused(bundles: tuple[Bundle, Bundle]) -> None:
    m = bundles[0].manifest
    graphs, formats = [bundles[0].graph(name) for name in GRAPH_NAMES], dict(m.weight_formats)
    assert find_false_claim(m, graphs) is None
    (layer, stored), *_ = formats.items()
    other = {"int4": "int8", "int8": "int4"}[stored.format]
    for said, claims in (
        ("floats", {name: one for name, one in formats.items() if name != layer}),
        (other, formats | {layer: StoredLayer(format=other)}),
    ):
        problem = find_false_claim(m.model_copy(update={"weight_formats": claims}), graphs)
        assert (
            problem == f"it says that the weights of {layer} are {said}, and the graphs that they are {stored.format}"
        )


def test_another_accuracy_level_is_chosen_when_a_bundle_opens(bundles: tuple[Bundle, Bundle], wanted: Turns) -> None:
    session = OnnxSession(bundles[0], threads=1, accuracy_level=4)
    error = largest(answers(session), wanted)
    assert LOGIT_TOLERANCE < error < 0.1 * max(float(np.abs(logits).max()) for logits in wanted)
    assert ONNXRUNTIME_CPU.after(session) == "packed weights are multiplied by int8 activations (accuracy level 4)"
    assert ONNXRUNTIME_CPU.after(OnnxSession(bundles[1], threads=1)) is None
    with pytest.raises(UserError, match="accuracy level 3 is unknown: give 0 or 4"):
        OnnxSession(bundles[0], accuracy_level=3)


def test_graphs_for_the_cuda_provider_compute_with_them(bundles: tuple[Bundle, Bundle], wanted: Turns) -> None:
    assert largest(answers(FusedSession(bundles[0], "cpu")), wanted) < LOGIT_TOLERANCE


def test_our_operators_take_packed_weights(bundles: tuple[Bundle, Bundle]) -> None:
    """With what surrounds a product, unless it gathers the columns of x in an order of its own."""
    layers = bundles[0].manifest.decoder.layers - bundles[0].manifest.selection_layer
    found = Counter(node.op_type for node in lower(bundles[0].graph("decoder"), "ort-cuda-ops").graph)
    if {one.format for one in bundles[0].manifest.weight_formats.values()} == {"int4"}:
        assert found["FusedLinearInt4"] == 4 * layers
        assert not {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"} & found.keys()
    else:
        assert found["FusedLinearInt8"] == 7 * layers and not found["FusedLinearInt4"]
    assert not {"MatMulNBits", "QuickGelu"} & found.keys()


def test_attention_of_decode_steps_turns_rows_of_packed_products(bundles: tuple[Bundle, Bundle]) -> None:
    """Of heads that our operators do not attend to, where one product gives query, key and value."""
    model = lower(join_decode(bundles[0].graph("prefix"), bundles[0].graph("decoder")), "ort-cuda-ops")
    turning = [n.attributes["do_rotary"].as_int() for n in model.graph if n.op_type == "GroupQueryAttention"]
    joined = {one.format for one in bundles[0].manifest.weight_formats.values()} == {"int4"}
    assert turning == bundles[0].manifest.decoder.layers * [int(joined)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", LOGIT_TOLERANCE), ("float16", HALF)])
def test_engines_compute_with_their_values(
    bundles: tuple[Bundle, Bundle],
    wanted: Turns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: FloatName,
    tolerance: float,
) -> None:
    bundle = Bundle.load(shutil.copytree(bundles[0].folder, tmp_path / "bundle"))
    session, device = opened(bundle, monkeypatch, dtype=dtype)
    assert largest(answers(session), wanted) < tolerance
    device.check()


def test_engines_with_the_plugin_compute_with_their_values(
    bundles: tuple[Bundle, Bundle], wanted: Turns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(shutil.copytree(bundles[0].folder, tmp_path / "bundle"))
    library = tmp_path / "lib.so"
    library.write_bytes(b"a plugin")
    session, device = opened(bundle, monkeypatch, dtype="float16", plugin=library)
    assert largest(answers(session), wanted) < HALF
    device.check()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_lowered_graphs_keep_the_contract(bundles: tuple[Bundle, Bundle], lowering: str) -> None:
    bundle, record = bundles[0], LOWERINGS[lowering]
    for name in GRAPH_NAMES:
        record.verify(name, lower(bundle.graph(name), lowering), bundle.manifest.graphs[name])


def test_the_roofline_reads_packed_bytes(bundles: tuple[Bundle, Bundle]) -> None:
    found, plain = (Workload(bundle) for bundle in bundles)
    assert sum(found.integer_bytes.values()) > 0 == sum(plain.integer_bytes.values())
    assert sum(found.parameters.values()) < sum(plain.parameters.values())


def test_projections_of_the_cuda_provider_are_one_product(bundles: tuple[Bundle, Bundle]) -> None:
    """Unless each gathers the columns of x in an order of its own."""
    decode = lower(join_decode(bundles[0].graph("prefix"), bundles[0].graph("decoder")), "ort-cuda")
    ordered = any(name.endswith(".order") for name in decode.graph.initializers)
    products = [node for node in decode.graph if node.op_type == "MatMulNBits"]
    assert len(products) == 4 * (7 if ordered else 5)


def one_product(arrays: dict[str, Any], packing: Packing, out: int, features: int, dtype: FloatName) -> ir.Model:
    """A graph of one packed product, of blocks of 32."""
    name = "LinearNBitsZeroPoints" if packing.zero_points else "LinearNBits"
    x = ir.val("x", dtype=FLOATS[dtype].onnx, shape=("S", features))
    given = [ir.val(f"w.{key}", const_value=ir.tensor(array, name=f"w.{key}")) for key, array in arrays.items()]
    attributes = {"bits": packing.bits, "block_size": 32, "K": features, "N": out}
    node = ir.node(name, [x, *given], attributes, domain=IVC_DOMAIN, name="linear")
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", ir.TensorType(FLOATS[dtype].onnx), ir.Shape(["S", out])
    opsets = {"": OPSET, IVC_DOMAIN: 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=given, opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=IR_VERSION, functions=[function(name).clone()])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 4e-3)])
@pytest.mark.parametrize("zero_points", [False, True])
def test_blocks_that_tensorrt_dequantises_give_the_same(zero_points: bool, dtype: FloatName, tolerance: float) -> None:
    """Stored values less zero points span -15 to 15, and nothing is clamped."""
    random, out, features, packing = np.random.default_rng(0), 6, 96, Packing(4, 32, zero_points)
    values, zeros = random.integers(0, 16, (out, features), np.uint8), random.integers(0, 16, (out, 3), np.uint8)
    values[0, :2], zeros[0], values[1, :2], zeros[1] = 0, 15, 15, 0
    scales = random.uniform(0.01, 0.1, (out, 3)).astype(dtype)
    arrays: dict[str, Any] = {"packed": pack_blocks(values, packing), "scales": scales}
    arrays |= {"zero_points": pack_values(zeros, 4)} if zero_points else {}
    zero = np.repeat(zeros if zero_points else np.full_like(zeros, 8), 32, axis=1).astype(np.float64)
    wanted = (values.astype(np.float64) - zero) * np.repeat(scales.astype(np.float64), 32, axis=1)
    rows = random.standard_normal((3, features)).astype(dtype)

    model = lower(one_product(arrays, packing, out, features, dtype), "opset-21")
    weight = model.graph.initializers["w.int4"]
    assert weight.dtype == ir.DataType.INT4 and weight.const_value is not None
    assert weight.const_value.nbytes == out * features // 2
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.dtype, name=value.name)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": rows})
    meant = rows.astype(np.float64) @ wanted.T
    assert found.dtype == np.dtype(dtype) and np.abs(found - meant).max() < tolerance * np.abs(meant).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("zero_points", [False, True])
def test_our_plugin_gets_the_bytes_of_a_bundle(zero_points: bool, dtype: FloatName) -> None:
    """As int32, with zeros behind zero points that fill none."""
    random, out, features, packing = np.random.default_rng(0), 5, 72, Packing(4, 32, zero_points)
    values, zeros = random.integers(0, 16, (out, features), np.uint8), random.integers(0, 16, (out, 3), np.uint8)
    scales = random.uniform(0.01, 0.1, (out, 3)).astype(FLOATS[dtype].numpy)
    arrays: dict[str, Any] = {"packed": pack_blocks(values, packing), "scales": scales}
    arrays |= {"zero_points": pack_values(zeros, 4)} if zero_points else {}
    model = lower(one_product(arrays, packing, out, features, dtype), "plugin")
    (node,) = model.graph
    assert (node.op_type, node.attributes["block_size"].as_int()) == ("FusedLinearInt4", 32)
    assert node.attributes["zero_points"].as_int() == zero_points
    packed, stored, *points = (value.const_value.numpy() for value in node.inputs[1:])  # type: ignore[union-attr]
    np.testing.assert_array_equal(packed.view(np.uint8), arrays["packed"])
    np.testing.assert_array_equal(stored, scales)
    assert packed.dtype == np.int32 and len(points) == zero_points
    if zero_points:
        assert (points[0].dtype, points[0].tobytes()) == (np.int32, arrays["zero_points"].tobytes() + bytes(2))


def test_the_plugins_kernel_takes_no_bytes_and_no_float32() -> None:
    values = np.zeros((5, 64), np.uint8)
    for bits, dtype in ((8, "float16"), (4, "float32")):
        packing = Packing(bits, 32)
        arrays = {"packed": pack_blocks(values, packing), "scales": np.ones((5, 2), dtype)}
        (node,) = lower(one_product(arrays, packing, 5, 64, dtype), "plugin").graph  # type: ignore[arg-type]
        assert node.op_type == "Gemm"


@pytest.mark.parametrize("layout", ["AWQ", "compressed-tensors"])
def test_tensorrt_rtx_compiles_weights_in_blocks(layout: str, tmp_path: Path) -> None:
    """And keeps them in 4 bits: the engine is smaller than that of floats by most of what they save."""
    rtx = pytest.importorskip("tests.tensorrt.test_tensorrt_rtx", reason="needs TensorRT-RTX")
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = TINY["qwen2_vl"] | sizes | {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
    config |= {"vision_config": config["vision_config"] | {"hidden_size": 256}}
    stored, _ = write(make_checkpoint(tmp_path / "plain", config), tmp_path, LAYOUTS[layout])
    bundle = export(ExportRecipe(stored, tmp_path / "bundle", layer=2))
    choices = EngineChoices("tensorrt-rtx", "float16", "opset-23", "float16", "operator")
    engines = {}
    for graphs in ("opset-23", "native"):
        model = lowered(bundle, "prefix", replace(choices, graphs=graphs))
        engines[graphs] = rtx.compiled(model, bundle.folder, "prefix", "SM86").nbytes
    saved = 2 * (3 * 256 * 768 + 2 * 256 * 256 + 2 * 256 * 128) * 3 // 2  # of two bytes a weight in two layers
    assert engines["native"] - engines["opset-23"] > 0.7 * saved


@pytest.mark.parametrize(("dtype", "packed"), [("float16", "int4"), ("float32", "float32")])
def test_engines_with_the_plugin_keep_four_bits_but_in_float32(
    bundles: tuple[Bundle, Bundle], dtype: FloatName, packed: str
) -> None:
    bundle = bundles[0]
    kinds = {one.format for one in bundle.manifest.weight_formats.values()}
    recipe = EngineRecipe(plugin=Path("lib.so"), dtype=dtype)
    choices = choose_graphs(bundle, recipe, SimpleNamespace(__version__="8.6.2"), "8.6")
    assert choices.graphs == "plugin"
    assert packed_weights(bundle, "plugin", dtype) == {kind: packed if kind == "int4" else dtype for kind in kinds}
    for name in ("prefix", "decoder"):
        model = lowered(bundle, name, choices)
        operators = [node.op_type for node in model.graph]
        assert ("FusedLinearInt4" in operators) == (packed == "int4" in kinds)
        assert not any(node.op_type.startswith("LinearNBits") for node in model.graph)
        assert graph_to_count(bundle, name, choices)


@pytest.mark.parametrize(
    ("version", "graphs", "packed"),
    [
        ("8.6.2", "native", {"int4": "float16"}),
        ("10.3.0", "opset-21", {"int4": "int4"}),
        ("10.14.1", "opset-23-attention", {"int4": "int4"}),
        ("11.1.0", "opset-23", {"int4": "int4"}),
    ],
)
def test_versions_of_tensorrt_choose_what_becomes_of_packed_layers(
    bundles: tuple[Bundle, Bundle], version: str, graphs: str, packed: dict[str, str]
) -> None:
    """Those of 8 bits become floats in all."""
    bundle = bundles[0]
    if {one.format for one in bundle.manifest.weight_formats.values()} == {"int8"}:
        graphs, packed = graphs.replace("opset-21", "native"), {"int8": "float16"}
    choices = choose_graphs(bundle, EngineRecipe(), SimpleNamespace(__version__=version), "8.6")
    assert (choices.graphs, packed_weights(bundle, choices.graphs, "float16")) == (graphs, packed)
    ((kind, built),) = packed.items()
    said = f"weights: {kind} layers {'stay' if kind == built else 'become'} {built}, about"
    assert said in decide(bundle, EngineRecipe(), choices).sentences[-1]
