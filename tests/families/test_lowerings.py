"""Every lowering of every family in every dtype, where it runs without a GPU.

That is onnxruntime's CPU provider and a stand-in for TensorRT; tests/tensorrt/test_tensorrt_rtx.py compiles graphs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import PIL.Image
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.dtypes import FloatName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid, Visual
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.precision.widen_floats import WidenFloatsPass
from ivc_export.lowering.precision.widen_gelu import WidenGeluPass
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.interface import Step
from ivc_export.runtime.onnxruntime import fused_graphs
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.tolerances import FLOAT16, FLOAT32
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import LOGIT_TOLERANCE, random_picture
from tests.lowering.spelled import spell_out
from tests.runtime.test_tensorrt import opened

Arrays = Mapping[str, npt.NDArray[Any]]
DTYPES: tuple[FloatName, ...] = ("float32", "float16", "bfloat16")
HALF = 5e-3
"""Largest error of logits in float16 against the same weights in float32, relative to the largest logit: 11 bits,
rounded after every operator; 1.7e-3 measured."""


POLYGRAPHY = "import polygraphy.tools, sys; sys.exit(polygraphy.tools.main())"
"""What the command `polygraphy` does, wherever its script lies."""


class RecordingSession(OnnxSession):
    """Keeps what every graph was given and gave."""

    def run(self, name: GraphName, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        found = super().run(name, feeds)
        self.seen.append((name, dict(feeds), found))
        return found

    @property
    def seen(self) -> list[tuple[GraphName, Arrays, Arrays]]:
        return self.__dict__.setdefault("_seen", [])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Recorded:
    """A conversation on portable graphs: a picture, decode steps, and a turn without one."""

    bundle: Bundle
    session: RecordingSession
    turns: list[tuple[list[int], list[Visual]]]
    steps: list[Step]


EVERY = [(name, dtype, "ivc-prune") for name in (*families.names(), "internvl3_5") for dtype in DTYPES]
EVERY += [("qwen2_5_vl", dtype, "fastv") for dtype in DTYPES] + [("llava", "float32", "fastv")]


@pytest.fixture(scope="module", params=EVERY, ids="-".join)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    name, dtype, method = request.param
    folder = tmp_path_factory.mktemp(name)
    checkpoint = make_checkpoint(folder / "checkpoint", TINY[name], dtype=dtype)
    bundle = export(ExportRecipe(checkpoint, folder / "bundle", max_visual=400, method=method))
    noise = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    picture = families.preparation(bundle.manifest).picture(PIL.Image.fromarray(noise), bundle.manifest.tokens.image)
    shown = [1, 2, *picture.tokens, 7, 8, 9]
    turns: list[tuple[list[int], list[Visual]]] = [(shown, [picture]), ([5], []), ([4, 3, 2], [])]
    session = RecordingSession(bundle, dtype="float16" if dtype == "float16" else "float32")
    conversation = HostConversation(session, 0.4)
    return Recorded(bundle, session, turns, [conversation.run(*turn) for turn in turns])


def plain(recorded: Recorded, name: GraphName, lowering: str) -> onnxruntime.InferenceSession:
    """A lowered graph in an onnxruntime that knows nothing of ours; bfloat16, which it has no kernels for, widened."""
    model = recorded.bundle.graph(name)
    if recorded.bundle.manifest.dtype == "bfloat16":
        model = WidenFloatsPass()(model).model
    model = lower(model, lowering)
    if lowering == "plugin":
        spell_out(model)
    return served(model, recorded.bundle.folder)


def served(model: ir.Model, weights: Path) -> onnxruntime.InferenceSession:
    """A graph whose weights lie in a folder."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def typed(session: onnxruntime.InferenceSession, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
    """What a session takes of `feeds`, floats in its dtype."""
    half = {tensor.name for tensor in session.get_inputs() if tensor.type == "tensor(float16)"}
    return {name: array.astype(np.float16) if name in half else array for name, array in feeds.items()}


@pytest.mark.parametrize("lowering", ["portable", "native", "plugin"])
def test_plain_onnxruntime_gives_the_same_to_the_bit(recorded: Recorded, lowering: str) -> None:
    """In float16 as portable graphs with GELU in float32, where the lowering has it so."""
    bundle, sessions = recorded.bundle, {name: plain(recorded, name, lowering) for name in GRAPH_NAMES}
    assert {name for name, _, _ in recorded.session.seen} == set(GRAPH_NAMES)
    once = bundle.manifest.dtype == "float16" and lowering != "portable"
    gelu = {name: served(WidenGeluPass()(bundle.graph(name)).model, bundle.folder) for name in GRAPH_NAMES if once}
    for name, feeds, seen in recorded.session.seen:
        session, wanted = sessions[name], seen
        if once:
            outputs = [tensor.name for tensor in gelu[name].get_outputs()]
            wanted = dict(zip(outputs, gelu[name].run(None, typed(gelu[name], feeds)), strict=True))
        found = session.run(None, typed(session, feeds))
        for tensor, array in zip(session.get_outputs(), found, strict=True):
            np.testing.assert_array_equal(array, wanted[tensor.name].astype(array.dtype), err_msg=tensor.name)


OPSET_23 = ("opset-23-attention", "opset-23")


@pytest.mark.parametrize("lowering", OPSET_23)
def test_operators_of_opset_23_follow(recorded: Recorded, lowering: str) -> None:
    """In onnxruntime's own kernels, in float16 with the softmax in float16; scores and choices only in float32."""
    half = recorded.bundle.manifest.dtype == "float16"
    sessions = {name: plain(recorded, name, lowering) for name in GRAPH_NAMES}
    for name, feeds, wanted in recorded.session.seen:
        session = sessions[name]
        found = session.run(None, typed(session, feeds))
        for tensor, array in zip(session.get_outputs(), found, strict=True):
            if array.dtype.kind == "i" and not half:
                np.testing.assert_array_equal(array, wanted[tensor.name], err_msg=tensor.name)
            elif array.dtype.kind == "f" and not (half and tensor.name == "token_score"):
                most, _ = (FLOAT16 if half else FLOAT32).errors[kind(tensor.name)]
                expected = wanted[tensor.name].astype(np.float32)
                error = np.abs(array.astype(np.float32) - expected).max(initial=0)
                assert error <= most * max(1.0, np.abs(expected).max(initial=0)), tensor.name


@pytest.mark.parametrize("recorded", [("qwen2_5_vl", "float32", "ivc-prune")], indirect=True, ids="-".join)
@pytest.mark.parametrize("lowering", OPSET_23)
def test_graphs_of_opset_23_are_whole(recorded: Recorded, lowering: str) -> None:
    for name in GRAPH_NAMES:
        model = lower(recorded.bundle.graph(name), lowering)
        LOWERINGS[lowering].verify(name, model, recorded.bundle.manifest.graphs[name])
        path = recorded.bundle.folder / f"{name}.{lowering}.onnx"
        ir.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
        path.unlink()
        operators = [node.op_type for node in model.graph]
        assert "Softmax" not in operators or name == "prefix"  # where the selection has its own
        assert operators.count("Attention") == 2


def kind(tensor: str) -> str:
    """The entry of a table of tolerances."""
    if TensorName.of(tensor).kind or tensor == "scored_values":
        return "keys and values"
    return "image_embeds" if tensor.startswith("deepstack") else tensor


def test_the_cuda_providers_graphs_follow(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU provider, in float16 where the bundle is; bfloat16, which it lacks, in float32."""
    stored = recorded.bundle.manifest.dtype
    dtype = "float16" if stored == "float16" else "float32"
    monkeypatch.setitem(cast("dict[str, str]", fused_graphs.DTYPES), "cpu", dtype)
    found = FusedConversation(FusedSession(recorded.bundle, "cpu"), 0.4, capacity=500)
    wanted = HostConversation(OnnxSession(recorded.bundle), 0.4)
    for turn in recorded.turns:
        step = found.run(*turn)
        reference = wanted.run(*turn, keep_index=step.keep_index)
        most = LOGIT_TOLERANCE if dtype == "float32" else HALF * np.abs(reference.logits).max()
        assert np.abs(step.logits - reference.logits).max() < most
        if dtype == "float32":
            np.testing.assert_array_equal(step.keep_index, reference.prefix["keep_index"])


def test_engines_of_a_stand_in_follow(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as TensorRT 8.6 gets them, which has no bfloat16: float16 is built of it."""
    stored = recorded.bundle.manifest.dtype
    dtype = "float32" if stored == "float32" else "float16"
    session, device = opened(recorded.bundle, monkeypatch, max_visual=400, dtype=dtype)
    found, wanted = session.converse(0.4), HostConversation(OnnxSession(recorded.bundle), 0.4)
    for turn in recorded.turns:
        step = found.run(*turn)
        reference = wanted.run(*turn, keep_index=step.keep_index)
        most = LOGIT_TOLERANCE if dtype == "float32" else HALF * np.abs(reference.logits).max()
        assert np.abs(step.logits - reference.logits).max() < most
    device.check()


def test_polygraphy_runs_a_portable_file(golden_bundle: Bundle, tmp_path: Path) -> None:
    """`polygraphy run --onnxrt`, which has nothing of ours."""
    files = pytest.importorskip("polygraphy.json", reason="polygraphy is not installed")
    session = RecordingSession(golden_bundle)
    picture = random_picture(Grid(4, 5), 0)
    HostConversation(session, 0.4).run([1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10], [picture])
    (feeds, wanted) = next((feeds, found) for graph, feeds, found in session.seen if graph == "prefix")
    files.save_json([feeds], str(tmp_path / "feeds.json"))
    command = [sys.executable, "-c", POLYGRAPHY, "run", str(golden_bundle.folder / "prefix.onnx"), "--onnxrt"]
    command += ["--load-inputs", str(tmp_path / "feeds.json"), "--save-outputs", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ((found,),) = files.load_json(str(tmp_path / "found.json")).values()
    for key, array in wanted.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
