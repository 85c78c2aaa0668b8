from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, IVC_DOMAIN, GraphName
from ivc_export.contract.operators import verify_graph
from ivc_export.dtypes import FloatName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.lowering import lower
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.precision.widen_floats import WidenFloatsPass
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from samples.make_sample import make_checkpoint
from tests.conftest import LOGIT_TOLERANCE, random_picture

IMAGE_PROMPT = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_native_has_standard_operators_only(golden_bundle: Bundle, name: GraphName) -> None:
    model = lower(ir.load(golden_bundle.folder / f"{name}.onnx"), "native")
    assert not model.functions
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    constants = {a for node in model.graph if node.op_type == "Constant" for a in node.attributes}
    assert constants <= {"value"}  # TensorRT 8.6 misreads value_int and value_ints
    assert IVC_DOMAIN not in model.opset_imports
    verify_graph(name, model, golden_bundle.manifest.graphs[name])


def test_native_computes_what_portable_does(golden_bundle: Bundle) -> None:
    """Written beside the portable graph, where its weights are, and run on the same inputs."""
    step = HostConversation(OnnxSession(golden_bundle)).run(IMAGE_PROMPT, [random_picture(Grid(4, 5), 0)])
    path = golden_bundle.folder / "prefix.native.onnx"
    ir.save(lower(ir.load(golden_bundle.folder / "prefix.onnx"), "native"), path)
    try:
        session = onnxruntime.InferenceSession(path)
    finally:
        path.unlink()
    embeds = golden_bundle.embed(step.run.tokens)
    embeds[step.run.visual_index] = step.image_embeds[0]
    empty = np.zeros((1, 2, 0, 32), np.float32)
    names = ("position_ids", "visual_index", "text_index", "query_index", "ivc_priority")
    feeds = {name: getattr(step.run, name) for name in names}
    feeds |= {"inputs_embeds": embeds[None], "past_length": np.zeros(1, np.int32)}
    feeds |= {"keep_count": np.array([step.run.keep_count], np.int32)}
    feeds |= {i.name: empty for i in session.get_inputs() if i.name.startswith(("past_key", "past_value"))}
    for output, found in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        np.testing.assert_array_equal(found, step.prefix[output.name])


def test_inlining_needs_a_body(golden_bundle: Bundle) -> None:
    model = ir.load(golden_bundle.folder / "prefix.onnx")
    model.functions.clear()
    with pytest.raises(ir.passes.PreconditionError, match="no body"):
        InlinePass()(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_checkpoints_run_widened(tmp_path: Path, dtype: FloatName) -> None:
    """The same weights, rounded by us and stored in float32, give the same logits as the narrow bundle, widened."""
    narrow = export(ExportRecipe(make_checkpoint(tmp_path / "narrow", dtype=dtype), tmp_path / "narrow-ivc"))
    assert narrow.manifest.dtype == dtype
    for name in GRAPH_NAMES:
        info = narrow.manifest.graphs[name]
        verify_graph(name, ir.load(narrow.folder / info.file), info)
    tokens, picture = IMAGE_PROMPT, random_picture(Grid(4, 5), 0)
    step = HostConversation(OnnxSession(narrow)).run(tokens, [picture])

    wide_checkpoint = make_checkpoint(tmp_path / "wide")
    rounded = {
        name: array.astype(np.float32) for name, array in load_file(tmp_path / "narrow/model.safetensors").items()
    }
    save_file(rounded, wide_checkpoint / "model.safetensors")
    wide = export(ExportRecipe(wide_checkpoint, tmp_path / "wide-ivc"))
    wanted = HostConversation(OnnxSession(wide)).run(tokens, [picture])
    np.testing.assert_array_equal(step.keep_index, wanted.keep_index)
    assert np.abs(step.logits - wanted.logits).max() < LOGIT_TOLERANCE


def test_widening_leaves_no_narrow_value(tmp_path: Path) -> None:
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "c", dtype="bfloat16"), tmp_path / "b"))
    for name in GRAPH_NAMES:
        model = WidenFloatsPass()(ir.load(bundle.folder / f"{name}.onnx")).model
        values = [*model.graph.inputs, *model.graph.outputs]
        assert not [v.name for v in values if v.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)]
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
                assert [user.op_type for user in value.consumers()] == ["Cast"]
