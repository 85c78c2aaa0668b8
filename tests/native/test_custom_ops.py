"""Custom operators for onnxruntime: their lowering, and the operators themselves over emulated kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_run
from ivc_export.contract.names import GRAPH_NAMES, IVC_DOMAIN, GraphName
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.onnxruntime.fused_graphs import register
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import LOGIT_TOLERANCE
from tests.native.custom_ops import check_gather, check_selection, select
from tests.native.kernels import random_case
from tests.native.test_plugin_builds import build


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("operators"), "86", "ivc_onnxruntime_emulated")


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
    select = [] if rule.tiles or rule.views else ["SelectTokens"]
    operators = [node for node in model.graph if node.domain == IVC_DOMAIN]
    wanted = {"vision": [], "prefix": select, "decoder": ["CompactGatherN"]}[name]
    assert [node.op_type for node in operators] == wanted
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


def test_impossible_inputs_are_refused(library: Path) -> None:
    case = random_case(4, 100)
    for keep_count in (0, -1, len(case.visual) + 1):
        with pytest.raises(Exception, match="keep_count is not 1 to the visual tokens"):
            select(library, "cpu", case, keep_count)
    case = replace(case, visual=case.visual[1:])
    with pytest.raises(Exception, match="differ in length"):
        select(library, "cpu", case)


def test_every_family_runs_with_custom_operators(bundle: Bundle, library: Path) -> None:
    _, tokens, picture = make_prompt(bundle, draw_picture())
    session = FusedSession(bundle, "cpu", op_library=library)
    wanted, found = HostConversation(OnnxSession(bundle)), FusedConversation(session, capacity=700)
    for more in (tokens, [5], [6], tokens, [7]):
        given = [picture] if more is tokens else []
        reference, step = wanted.run(more, given), found.run(more, given)
        np.testing.assert_array_equal(step.keep_index, reference.keep_index)
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE


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
    with pytest.raises(UserError, match=r"there is no .*operators\.so: build it as docs/tensorrt\.md says"):
        FusedSession(golden_bundle, "cpu", op_library=tmp_path / "operators.so")
    (tmp_path / "operators.so").write_text("nothing")
    with pytest.raises(UserError, match=r"operators\.so does not load as custom operators \(.*\): build it on"):
        FusedSession(golden_bundle, "cpu", op_library=tmp_path / "operators.so")


def test_a_library_without_the_cuda_provider_is_one_sentence(
    sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ivc_run([str(sample_bundle.folder), "--prompt", "Hello", "--op-library", "operators.so"]) == 2
    assert "use it with --backend onnxruntime-cuda" in " ".join(capsys.readouterr().err.split())
