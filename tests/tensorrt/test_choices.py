"""Which softmax and which attention engines get, what is told of them, and what they mean, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from benchmarks.models import qwen2_vl_2b
from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.weights import PlannedWeights
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import COUNTED
from ivc_export.exporter.graphs import build_graphs
from ivc_export.graph.counting import count
from ivc_export.lowering.types import types_of
from ivc_export.tensorrt import footprint
from ivc_export.tensorrt.decide import decide
from ivc_export.tensorrt.graphs import EngineChoices, choose_graphs, lowered
from ivc_export.tensorrt.loading import Target
from ivc_export.tensorrt.recipe import EngineRecipe

SMALL: dict[str, Any] = {"max_visual": 64, "max_text": 32, "max_new": 32, "opt_visual": 32, "opt_text": 16}
NATIVE = EngineChoices("tensorrt", "float16", "native", "float16", "grouped")


def chosen(bundle: Bundle, version: str, target: Target = "tensorrt", **options: Any) -> EngineChoices:
    capability = "8.6" if target == "tensorrt-rtx" else None
    recipe = EngineRecipe(target=target, compute_capability=capability, **SMALL, **options)
    return choose_graphs(bundle, recipe, SimpleNamespace(__version__=version), "8.6")


@pytest.mark.parametrize(
    ("target", "version", "dtype", "graphs", "softmax", "attention"),
    [
        ("tensorrt", "8.6.2", "float16", "native", "float16", "grouped"),
        ("tensorrt", "10.3.0", "bfloat16", "native", "float32", "grouped"),
        ("tensorrt", "10.13.3.9", "float16", "native", "float16", "grouped"),
        ("tensorrt", "10.14.1", "float16", "opset-23-attention", "float16", "operator"),
        ("tensorrt", "10.15.1", "float16", "opset-23", "float16", "operator"),
        ("tensorrt", "11.1.0", "bfloat16", "opset-23", "float32", "operator"),
        ("tensorrt", "11.1.0", "float32", "native", "float32", "grouped"),
        ("tensorrt-rtx", "1.7.1.116", "float16", "opset-23", "float16", "operator"),
        ("tensorrt-rtx", "1.6.0", "float16", "native", "float16", "grouped"),
    ],
)
def test_version_and_dtype_choose(
    sample_bundle: Bundle, target: Target, version: str, dtype: FloatName, graphs: str, softmax: str, attention: str
) -> None:
    found = chosen(sample_bundle, version, target, dtype=dtype)
    assert (found.graphs, found.softmax, found.attention) == (graphs, softmax, attention)


def test_a_bfloat16_bundle_in_float16_has_the_narrow_softmax(sample_bundle: Bundle) -> None:
    narrow = Bundle(sample_bundle.folder, sample_bundle.manifest.model_copy(update={"dtype": "bfloat16"}))
    assert chosen(narrow, "8.6.2").softmax == "float16"
    assert chosen(narrow, "10.3.0").softmax == "float32"


@pytest.mark.parametrize(("head_dim", "attention"), [(64, "operator"), (128, "operator"), (16, "grouped")])
def test_the_plugin_attends_where_it_has_a_kernel(sample_bundle: Bundle, head_dim: int, attention: str) -> None:
    sizes = sample_bundle.manifest.decoder.model_copy(update={"head_dim": head_dim, "value_dim": head_dim})
    bundle = Bundle(sample_bundle.folder, sample_bundle.manifest.model_copy(update={"decoder": sizes}))
    found = chosen(bundle, "8.6.2", dtype="float16", plugin=Path("lib.so"))
    assert (found.graphs, found.attention) == ("plugin", attention)


def test_what_is_chosen_otherwise(sample_bundle: Bundle) -> None:
    assert chosen(sample_bundle, "8.6.2", dtype="float16", softmax="float32").softmax == "float32"
    assert chosen(sample_bundle, "8.6.2", dtype="float16", attention="repeated").attention == "repeated"
    assert chosen(sample_bundle, "8.6.2", attention="repeated").attention == "repeated"


@pytest.mark.parametrize(
    ("version", "options", "sentence"),
    [
        ("8.6.2", {"dtype": "float32", "softmax": "float16"}, "--softmax float16 needs engines in float16, but these"),
        (
            "10.3.0",
            {"dtype": "bfloat16", "softmax": "float16"},
            "are in bfloat16: leave it out, or add --dtype",
        ),
        (
            "10.14.0",
            {"dtype": "float16", "attention": "grouped"},
            r"tensorrt 10\.14\.0 has its own attention operator",
        ),
    ],
)
def test_what_a_version_or_dtype_lacks_is_refused(
    sample_bundle: Bundle, version: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        chosen(sample_bundle, version, **options)


@pytest.mark.parametrize(
    ("choices", "name", "softmaxes", "scores"),
    [
        (NATIVE, "vision", {"FLOAT16"}, 0),
        (replace(NATIVE, softmax="float32"), "vision", {"FLOAT"}, 6),
        (replace(NATIVE, graphs="plugin"), "vision", {"FLOAT16"}, 0),
        (NATIVE, "decoder", {"FLOAT"}, 8),
        (replace(NATIVE, attention="repeated"), "decoder", {"FLOAT"}, 4),
        (replace(NATIVE, graphs="opset-23", attention="operator"), "vision", set(), 0),
        (replace(NATIVE, graphs="opset-23", attention="operator"), "decoder", set(), 0),
        (replace(NATIVE, graphs="opset-23", attention="operator", softmax="float32"), "vision", {"FLOAT"}, 6),
        (EngineChoices("tensorrt", "bfloat16", "native", "float32", "grouped"), "vision", {"FLOAT"}, 6),
        (EngineChoices("tensorrt", "float32", "native", "float32", "grouped"), "vision", {"FLOAT"}, 8),
    ],
)
def test_graphs_have_the_softmax_that_was_chosen(
    sample_bundle: Bundle, choices: EngineChoices, name: Any, softmaxes: set[str], scores: int
) -> None:
    model = lowered(sample_bundle, name, choices)
    types = types_of(model.graph)
    assert {types[node.inputs[0]].name for node in model.graph if node.op_type == "Softmax"} == softmaxes  # type: ignore[index]
    assert choices.score_bytes(name) == scores


@pytest.mark.parametrize(
    ("choices", "name", "rotations"),
    [
        (NATIVE, "prefix", "FLOAT16"),
        (replace(NATIVE, attention="repeated"), "decoder", "FLOAT16"),
        (replace(NATIVE, graphs="plugin"), "decoder", "FLOAT16"),  # heads of a size that our kernels do not take
        (NATIVE, "vision", "FLOAT"),
        (EngineChoices("tensorrt", "bfloat16", "native", "float32", "grouped"), "prefix", "FLOAT"),
        (EngineChoices("tensorrt", "float32", "native", "float32", "grouped"), "prefix", "FLOAT"),
    ],
)
def test_decoders_rotate_in_float16_where_standard_operators_rotate(
    sample_bundle: Bundle, choices: EngineChoices, name: Any, rotations: str
) -> None:
    model = lowered(sample_bundle, name, choices)
    types, products = types_of(model.graph), [n for n in model.graph if n.op_type == "Mul" and "/Rotate" in str(n.name)]
    assert products and {types[value].name for node in products for value in node.inputs} == {rotations}  # type: ignore[index]


def test_repeated_heads_are_gathered_by_a_constant(sample_bundle: Bundle) -> None:
    """The one spelling that TensorRT 8.6 fuses."""
    model = lowered(sample_bundle, "decoder", replace(NATIVE, attention="repeated"))
    heads, groups = sample_bundle.manifest.decoder.heads, sample_bundle.manifest.decoder.kv_heads
    indices = {
        tuple(node.inputs[1].const_value.numpy())  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type == "Gather" and "/attention/" in str(node.name)
    }
    assert indices == {tuple(np.arange(heads) // (heads // groups))}


def test_estimates_are_what_engines_measured() -> None:
    """TensorRT 8.6's scratch memory at Qwen2-VL-2B's sizes; ours counts what is alive before anything else is fused."""
    family = families.of("qwen2_vl")
    graphs = build_graphs(family.read(qwen2_vl_2b(2, depth=1), None), PlannedWeights("float16"), 1)
    vision, decoder = (ir.to_proto(COUNTED(graphs[name]).model) for name in ("vision", "decoder"))
    patches, rows = {"B": 1, "patches": 16384}, {"S": 4160, "M": 4160, "P": 4160, "R": 1}
    measured = [
        (vision, patches, NATIVE, "vision", 461e6),
        (vision, patches, replace(NATIVE, softmax="float32"), "vision", 26147e6),
        (decoder, rows, NATIVE, "decoder", 3318e6),
        (decoder, rows, replace(NATIVE, attention="repeated"), "decoder", 1819e6),
    ]
    for graph, axes, choices, name, taken in measured:
        found = count(graph, axes, score_bytes=choices.score_bytes(name)).peak_bytes  # type: ignore[arg-type]
        assert 0.95 * taken < found < 1.3 * taken, (choices, found)


@pytest.mark.parametrize(
    ("rows", "gated", "int4", "more"),
    [(2, 0, 0, None), (3, 0, 0, 0), (8, 1, 1, None), (9, 0, 0, 0), (9, 1, 0, 1), (9, 1, 1, 2)],
)
def test_products_of_our_kernels_take_what_their_header_says(
    rows: int, gated: int, int4: int, more: int | None
) -> None:
    """`more`: None, nothing; 0, of one product; with both halves of a gate; with weights of 4 bits as floats, too."""
    features, out = 64, 32 * (1 + gated)
    stored = np.zeros((out, 2, 4), np.int32) if int4 else np.zeros((out, features), np.float16)
    node = onnx.helper.make_node(
        "FusedLinearInt4" if int4 else "FusedLinear", ["x", "w"], ["y"], domain="ivc", gated=gated
    )
    half = onnx.TensorProto.FLOAT16
    x, y = (onnx.helper.make_tensor_value_info(name, half, [rows, size]) for name, size in (("x", features), ("y", 32)))
    graph = onnx.helper.make_graph([node], "one", [x], [y], [onnx.numpy_helper.from_array(stored, "w")])
    opsets = [onnx.helper.make_opsetid(domain, 1 if domain else 17) for domain in ("", "ivc")]
    found = count(onnx.helper.make_model(graph, opset_imports=opsets), {})
    normed = 2 * rows * features
    most = [normed, normed + 2 * rows * out, normed + 2 * rows * out + 2 * out * features]
    working = 0 if more is None else most[more] + (32 << 20)
    assert found.peak_bytes == 2 * rows * (features + 32) + working
    assert found.flops == 2 * rows * features * out


def test_memory_decides_on_attention_and_says_so(sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = EngineRecipe(dtype="float16", max_visual=1024, max_text=64, max_new=64, opt_visual=1)
    fits = decide(sample_bundle, recipe, NATIVE)
    assert fits.choices == NATIVE and len(fits.sentences) == 2
    assert (
        fits.sentences[0].startswith("vision: softmax in float16, about ")
        and "--softmax float32: " in fits.sentences[0]
    )
    assert fits.sentences[1].startswith("decoder: attention grouped, which fits, about ")
    small = replace(recipe, memory=fits.footprint.running - 1)
    found = decide(sample_bundle, small, NATIVE)
    assert found.choices == replace(NATIVE, attention="repeated") and found.footprint.running <= small.memory  # type: ignore[operator]
    assert "attention repeated, because with grouped attention the engines need about" in found.sentences[1]
    assert "(--attention grouped: " in found.sentences[1]
    asked = decide(sample_bundle, replace(small, attention="grouped"), NATIVE)
    assert asked.choices == NATIVE and "as asked" in asked.sentences[1]
    assert footprint.shortage(asked.footprint, small) is not None
    one = decide(sample_bundle, small, replace(NATIVE, graphs="opset-23", attention="operator"))
    assert (
        "by one operator, which TensorRT fuses" in one.sentences[1] and one.footprint.running < found.footprint.running
    )
