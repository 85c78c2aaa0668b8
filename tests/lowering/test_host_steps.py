"""Decode steps that begin and end in host memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe, Quantisation
from ivc_export.lowering import lower
from ivc_export.lowering.join_decode import join_decode
from ivc_export.lowering.onnxruntime.host_steps import take_host_steps
from ivc_export.lowering.precision.scale_residuals import SCALE
from samples.make_sample import make_checkpoint
from samples.tiny import wide

ALIASES = {"Squeeze", "Unsqueeze"}
"""Operators that compute nothing."""


@pytest.mark.parametrize(
    ("quantisation", "product", "head"),
    [
        (Quantisation(), "FusedLinear", "FusedLinearWide"),
        (Quantisation("int4", 32, lm_head="int8"), "FusedLinearInt4", "FusedLinearInt8"),
        (Quantisation("int8", 32, lm_head="int8"), "FusedLinearInt8", "FusedLinearInt8"),
    ],
    ids=["floats", "int4", "int8"],
)
def test_a_step_is_five_launches_a_layer_and_three(
    tmp_path: Path, quantisation: Quantisation, product: str, head: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", wide("qwen2_vl", heads=4))
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype="float16", quantisation=quantisation))
    m = bundle.manifest
    model = lower(join_decode(bundle.graph("prefix"), bundle.graph("decoder")), "ort-cuda-ops")
    assert take_host_steps(model, None, m.decoder.hidden_size)
    wanted = Counter({"TakeStep": 1, "AttendJoined": m.decoder.layers, "GiveAnswer": 1})
    wanted += Counter({product: 4 * m.decoder.layers}) + Counter({head: 1})
    assert Counter(node.op_type for node in model.graph if node.op_type not in ALIASES) == wanted
    (first,) = [node for node in model.graph if node.op_type == "TakeStep"]
    assert first.attributes["scale"].as_float() == SCALE
