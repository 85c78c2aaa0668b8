"""A lowering is one record: with it, bundles are exported, verified, opened and run in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_export
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.lowering import LOWERINGS, Lowering, lower
from ivc_export.lowering.inline import InlinePass
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from tests.conftest import LOGIT_TOLERANCE

MARK = ("", "Identity")


class MarkPass(ir.passes.InPlacePass):
    """Put an Identity before every matrix product."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in [node for node in model.graph if node.op_type == "MatMul"]:
            mark = ir.node("Identity", [node.inputs[0]], name=f"{node.name}/mark")
            mark.outputs[0].name = f"{node.name}/marked"
            model.graph.insert_before(node, mark)
            node.replace_input_with(0, mark.outputs[0])
        return ir.passes.PassResult(model, True)


TOY = Lowering(passes=lambda: (InlinePass(), MarkPass()), operators=frozenset([MARK]), exported=True)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOWERINGS, "toy", TOY)


def test_graphs_are_lowered_to_a_toy_and_verified(sample_bundle: Bundle) -> None:
    for name in GRAPH_NAMES:
        model = lower(sample_bundle.graph(name), "toy")
        info = sample_bundle.manifest.graphs[name]
        TOY.verify(name, model, info)
        used = {(node.domain, node.op_type) for node in model.graph}
        assert (MARK in used) and not [domain for domain, _ in used if domain == "ivc"]
        with pytest.raises(AssertionError):
            LOWERINGS["native"].verify(name, model, info)


def test_a_bundle_is_exported_in_a_toy(sample_bundle: Bundle, sample_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    command = ["--model", str(sample_checkpoint), "--output", str(output), "--lowering", "toy", "--quiet"]
    assert ivc_export(command) == 0
    bundle = Bundle.load(output)
    assert bundle.manifest.lowering == "toy"
    found, wanted = (OnnxSession(one).converse().run([1, 2, 3]).logits for one in (bundle, sample_bundle))
    assert np.abs(found - wanted).max() < LOGIT_TOLERANCE
