"""Passes that make graphs for TensorRT: the plugin's nodes, other dtypes, residual sums in float32."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.weights import PlannedWeights
from ivc_export.contract.names import GRAPH_NAMES, IVC_DOMAIN, GraphName
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.graphs import build_graphs
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.lowering.precision.scale_residuals import ScaleResidualsPass
from ivc_export.lowering.precision.widen_residuals import WidenResidualsPass
from ivc_export.lowering.tensorrt.plugin import UsePluginPass
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.interface import Step
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from samples.make_sample import make_checkpoint
from samples.tiny import TINY, wide
from tests.conftest import make_overflowing_checkpoint, random_picture
from tests.lowering.spelled import spell_out
from tools.generate import listing

Arrays = dict[str, npt.NDArray[Any]]
IMAGE_PROMPT = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]


def load(bundle: Bundle, name: GraphName) -> ir.Model:
    return ir.load(bundle.folder / f"{name}.onnx")


def feeds(step: Step, bundle: Bundle) -> dict[GraphName, Arrays]:
    """What a prefill gave prefix and decoder, by graph."""
    m, run = bundle.manifest, step.run
    embeds = bundle.embed(run.tokens)
    embeds[run.visual_index] = step.image_embeds[0]
    empty = np.zeros((1, m.decoder.kv_heads, 0, m.decoder.head_dim), np.float32)
    both = {"position_ids": run.position_ids, "past_length": np.zeros(1, np.int32)}
    prefix = {name: getattr(run, name) for name in ("visual_index", "text_index", "query_index", "ivc_priority")}
    prefix |= {"inputs_embeds": embeds[None], "keep_count": np.array([run.keep_count], np.int32)}
    decoder = {name: array for name, array in step.prefix.items() if name.startswith("new_")}
    decoder |= {"hidden_states": step.prefix["hidden_states"], "keep_index": step.keep_index}
    decoder |= {"logit_index": np.array([len(step.keep_index) - 1], np.int32)}
    found: dict[GraphName, Arrays] = {"prefix": both | prefix, "decoder": both | decoder}
    for name, arrays in found.items():
        for tensor in m.graphs[name].inputs:
            if tensor.name.startswith("past_") and tensor.name != "past_length":
                arrays[tensor.name] = empty
    return found


@pytest.fixture(scope="module")
def prefill(golden_bundle: Bundle) -> Step:
    return HostConversation(OnnxSession(golden_bundle)).run(IMAGE_PROMPT, [random_picture(Grid(4, 5), 0)])


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_plugin_graphs_keep_the_contract(golden_bundle: Bundle, name: GraphName) -> None:
    model = lower(load(golden_bundle, name), "plugin")
    LOWERINGS["plugin"].verify(name, model, golden_bundle.manifest.graphs[name])
    assert not model.functions
    operators = [node.op_type for node in model.graph if node.domain == IVC_DOMAIN]
    assert operators == {"vision": [], "prefix": ["SelectTokens"], "decoder": ["CompactGatherN"]}[name]
    for node in model.graph:
        if node.domain == IVC_DOMAIN:
            assert node.attributes["plugin_namespace"].as_string() == "ivc"
            assert node.attributes["plugin_version"].as_string() == "1"


@pytest.mark.parametrize("name", ["prefix", "decoder"])
def test_plugin_graphs_mean_the_same(golden_bundle: Bundle, prefill: Step, name: GraphName) -> None:
    model = lower(load(golden_bundle, name), "plugin")
    spell_out(model)
    path = golden_bundle.folder / f"{name}.plugin.onnx"
    ir.save(model, path)
    try:
        session = onnxruntime.InferenceSession(path)
    finally:
        path.unlink()
    wanted = getattr(prefill, name)
    for output, found in zip(
        session.get_outputs(), session.run(None, feeds(prefill, golden_bundle)[name]), strict=True
    ):
        np.testing.assert_array_equal(found, wanted[output.name])


@pytest.mark.parametrize("family", [name for name in families.names() if name != "deepseek_vl_v2"])  # has experts
def test_graphs_for_our_attention_keep_the_contract(family: str, tmp_path: Path) -> None:
    """Caches below the cut are inputs of decoder, and all but those kept whole are its outputs."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", wide(family, heads=4))
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    layers, cut = bundle.manifest.decoder.layers, bundle.manifest.selection_layer
    for name in GRAPH_NAMES:
        model, lowering = lower(load(bundle, name), "plugin"), LOWERINGS["plugin"]
        lowering.verify(name, model, bundle.manifest.graphs[name])
        operators = [node.op_type for node in model.graph if node.domain == IVC_DOMAIN]
        assert not {"Attention", "EncoderAttention", "WindowAttention"} & {*operators}
        assert "Gemm" not in {node.op_type for node in model.graph}  # products are our kernels' too
        count = {"vision": 0, "prefix": cut, "decoder": layers - cut}[name]
        assert operators.count("AttendJoined" if name == "decoder" else "AttendInPlace") == count
        assert ("EncodeAttend" in operators) == (name == "vision")
        assert operators.count("CompactIntoCaches") == (name == "decoder")
        for dtype in ("float32", "float16"):
            typed = lower(RetypeFloatsPass(dtype)(load(bundle, name)).model, "plugin")
            told = {node.attributes["float_type"].as_int() for node in typed.graph if node.domain == IVC_DOMAIN}
            assert told == {int(FLOATS[dtype].onnx)}
    scaled = lower(WidenResidualsPass()(ScaleResidualsPass()(load(bundle, "decoder")).model).model, "plugin")
    assert not any({"alpha", "beta"} & {*node.attributes} for node in scaled.graph if node.op_type == "Gemm")


def test_gathers_by_different_indices_are_not_fused(golden_bundle: Bundle) -> None:
    model = load(golden_bundle, "decoder")
    gather = next(node for node in model.graph if node.op_type == "CompactGather")
    gather.replace_input_with(1, next(v for v in model.graph.inputs if v.name == "logit_index"))
    with pytest.raises(ir.passes.PreconditionError, match="another keep_index"):
        UsePluginPass()(model)


def test_the_plugin_is_told_which_tensors_are_wider(golden_bundle: Bundle) -> None:
    """hidden_states is float32, position_ids int32, and keys and values are of the graph's dtype."""
    model = WidenResidualsPass()(RetypeFloatsPass("float16")(load(golden_bundle, "decoder")).model).model
    (gather,) = (node for node in lower(model, "plugin").graph if node.op_type == "CompactGatherN")
    kinds = dict(
        zip([value.name for value in gather.inputs[1:] if value], gather.attributes["kinds"].as_ints(), strict=True)
    )
    assert (kinds.pop("hidden_states"), kinds.pop("position_ids")) == (2, 1)
    assert set(kinds.values()) == {0}
    assert gather.attributes["float_type"].as_int() == ir.DataType.FLOAT16


def tiny_graphs(dtype: FloatName, name: str = "qwen2_vl") -> list[ir.Model]:
    family = families.of(name)
    model = family.read(TINY[family.model_type], None)

    weights = PlannedWeights(dtype)
    layer = family.default_layer(model.decoder).layer
    return list(build_graphs(model, weights, layer).values())


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_retyped_graphs_are_as_built_in_that_dtype(source: FloatName, to: FloatName) -> None:
    for graph, wanted in zip(tiny_graphs(source), tiny_graphs(to), strict=True):
        found = RetypeFloatsPass(to)(graph).model
        assert listing(found) == listing(wanted)
        for values, others in (
            (found.graph.inputs, wanted.graph.inputs),
            (found.graph.outputs, wanted.graph.outputs),
            (found.graph.initializers.values(), wanted.graph.initializers.values()),
        ):
            assert {v.name: v.dtype for v in values} == {v.name: v.dtype for v in others}


def test_retyped_weights_are_rounded_once(golden_bundle: Bundle) -> None:
    before, after = load(golden_bundle, "decoder"), RetypeFloatsPass("bfloat16")(load(golden_bundle, "decoder")).model
    for name, value in before.graph.initializers.items():
        stored, found = value.const_value, after.graph.initializers[name].const_value
        assert stored is not None and found is not None
        dtype = ml_dtypes.bfloat16 if isinstance(stored, ir.ExternalTensor) else stored.dtype.numpy()
        np.testing.assert_array_equal(found.numpy().astype(np.float32), stored.numpy().astype(dtype).astype(np.float32))


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", dtype="bfloat16")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, checkpoint / "model.safetensors")
    bundle = export(ExportRecipe(checkpoint, tmp_path / "b"))
    with pytest.raises(
        UserError, match=r"up_proj\.weight has values up to 9\.\d+e\+04, but the largest value of float16 is 65504"
    ):
        ir.save(RetypeFloatsPass("float16")(load(bundle, "prefix")).model, tmp_path / "x.onnx", external_data="x.data")


def test_a_missing_cast_is_found(golden_bundle: Bundle) -> None:
    model = load(golden_bundle, "vision")
    cast = next(node for node in model.graph if node.op_type == "Cast" and node.inputs[0].const_value is not None)  # type: ignore[union-attr]
    cast.outputs[0].replace_all_uses_with(cast.inputs[0])  # type: ignore[arg-type]
    with pytest.raises(ir.passes.PreconditionError, match="mixes float32"):
        RetypeFloatsPass("float16")(model)


def halve(path: Path, chosen: Callable[[onnx.NodeProto], bool]) -> None:
    """Let chosen nodes that give float32 values round them to float16, as TensorRT 8.6 does."""
    model = onnx.load(str(path), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    wide = {v.name for v in (*inferred.value_info, *inferred.output) if v.type.tensor_type.elem_type == 1}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.append(node)
        name = node.output[0]
        if name in wide and chosen(node):
            model.graph.node[-1].output[0] = f"{name}/wide"
            model.graph.node.append(onnx.helper.make_node("Cast", [f"{name}/wide"], [f"{name}/half"], to=10))
            model.graph.node.append(onnx.helper.make_node("Cast", [f"{name}/half"], [name], to=1))
    onnx.save(model, str(path))


def sums(node: onnx.NodeProto) -> bool:
    """What sums residuals."""
    return re.fullmatch(r"layers\.\d+/Add_[13]", node.name) is not None


def run_in_float16(
    bundle: Bundle,
    arrays: dict[GraphName, Arrays],
    folder: Path,
    *passes: ir.passes.PassBase,
    halved: Callable[[onnx.NodeProto], bool] = lambda node: False,
) -> dict[str, Any]:
    """Prefix and decoder in float16, by ONNX's own evaluator, which rounds every value as the graph says.

    passes: behind the one that retypes. halved: see halve.
    """
    outputs: dict[str, Any] = {}
    for name in ("prefix", "decoder"):
        model = RetypeFloatsPass("float16")(load(bundle, name)).model
        for one in passes:
            model = one(model).model
        model = lower(model, "native")
        path = folder / f"{name}.onnx"
        ir.save(model, path, external_data=f"{name}.data")
        halve(path, halved)
        onnx.checker.check_model(path, full_check=True)
        types = {value.name: value.dtype for value in model.graph.inputs}
        given = arrays[name] | {key: value for key, value in outputs.items() if key in types}
        given = {key: a.astype(types[key].numpy()) for key, a in given.items()}  # type: ignore[union-attr]
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(str(path)).run(None, given)
        outputs |= {v.name: a for v, a in zip(model.graph.outputs, results, strict=True) if v.name}
    return outputs


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_residual_sums_may_leave_float16s_range(tmp_path: Path) -> None:
    """Activations beyond 65504, as some models have in a few channels: float16 gives no number, float32 sums do."""
    bundle = export(ExportRecipe(make_overflowing_checkpoint(tmp_path / "c"), tmp_path / "b"))
    step = HostConversation(OnnxSession(bundle)).run(IMAGE_PROMPT, [random_picture(Grid(4, 5), 0)])
    step = replace(step, replayed=step.prefix["keep_index"])
    arrays = feeds(step, bundle)
    assert np.abs(step.prefix["hidden_states"]).max() > 65504

    def run(*passes: ir.passes.PassBase, **options: Any) -> dict[str, Any]:
        return run_in_float16(bundle, arrays, tmp_path, *passes, **options)

    def close(found: dict[str, Any]) -> bool:
        error = np.abs(found["logits"][0, 0] - step.logits).max()
        return bool(error < 5e-3 * np.abs(step.logits).max())  # float16 rounds by 5e-4; 8e-4 measured

    assert not np.isfinite(run()["hidden_states"]).all()
    wide = run(WidenResidualsPass())
    assert wide["hidden_states"].dtype == np.float32 and close(wide)
    assert not np.isfinite(run(WidenResidualsPass(), halved=sums)["hidden_states"]).all()
    assert close(run(ScaleResidualsPass(), WidenResidualsPass(), halved=sums))


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_widened_residuals_leave_no_narrow_sum(golden_bundle: Bundle, name: GraphName) -> None:
    model = WidenResidualsPass()(RetypeFloatsPass("float16")(load(golden_bundle, name)).model).model
    typed = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(lower(model, "native")), strict_mode=True))
    sums = [n for n in typed.graph if n.op_type == "Add" and n.name and n.name.count("/") < 2 + (name == "vision")]
    residual = [n for n in sums if any(u.op_type in ("LayerNormalization", "ReduceMean") for u in readers(n))]
    assert residual
    assert all(node.outputs[0].dtype == ir.DataType.FLOAT for node in residual)


def readers(node: ir.Node) -> list[ir.Node]:
    """Nodes that read a node's result, also through a square."""
    direct = list(node.outputs[0].consumers())
    return direct + [u for n in direct if n.op_type == "Mul" for u in n.outputs[0].consumers()]


@pytest.mark.parametrize(
    ("family", "layer_norms", "in_place"),
    [("internvl", 4, 0), ("llava", 4, 0), ("qwen2_vl", 4, 2), ("qwen2_5_vl", 0, 2)],
)
def test_vision_graphs_of_our_kernels_mean_the_same(
    family: str, layer_norms: int, in_place: int, tmp_path: Path
) -> None:
    """in_place: layers whose attention reads values where the product wrote them, beside query and key."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", wide(family, heads=4))
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    fused = lower(load(bundle, "vision"), "plugin")
    linears = [node for node in fused.graph if node.op_type == "FusedLinear"]
    assert sum(node.attributes["normed"].as_int() for node in linears) >= layer_norms
    turned = [node for node in fused.graph if node.op_type == "TurnHeads"]
    assert [len(node.outputs) for node in turned] == [2] * in_place
    found = []
    for number, model in enumerate((load(bundle, "vision"), spell_out(fused))):
        path = bundle.folder / f"vision.{number}.onnx"
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.LazyTensor):  # it has no file
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        ir.save(model, path)
        session = onnxruntime.InferenceSession(path)
        extents = {"B": 1, "patches": 24}
        given = {
            one.name: np.random.default_rng(0)
            .standard_normal(
                [size if isinstance(size, int) else extents.get(size, 1) for size in one.shape], np.float32
            )
            .astype(np.int32 if "int32" in one.type else np.float32)
            for one in session.get_inputs()
        }
        found.append(session.run(None, given)[0])
    wanted, ours = found
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
