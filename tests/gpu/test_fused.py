"""The `ort-cuda` lowering on onnxruntime's CUDA provider, in float16. Needs onnxruntime-gpu.

python -m pytest -m gpu tests/gpu/test_fused.py
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ivc_export.bundle.bundle import Bundle
from ivc_export.families.pictures import Grid
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.onnxruntime.session_options import cuda_options
from ivc_export.runtime.onnxruntime.shown import ShownSession
from ivc_export.verify.oracle import record
from ivc_export.verify.parity import compare
from ivc_export.verify.testdata import draw_picture, make_prompt
from tests.conftest import Golden, random_picture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="onnxruntime has no CUDA provider"
    ),
]
TOLERANCE = 2e-2
"""Of the largest logit: float16 rounds by 5e-4 after each of some fifty operators."""


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_conversations_on_the_gpu_follow_float32(golden_bundle: Bundle, cuda_graph: bool) -> None:
    wanted = HostConversation(OnnxSession(golden_bundle))
    found = FusedConversation(FusedSession(golden_bundle, "cuda", cuda_graph), capacity=160)
    image = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]
    for turn in range(2):
        step = found.run(image, [random_picture(Grid(4, 5), turn)])
        reference = wanted.run(image, [random_picture(Grid(4, 5), turn)], keep_index=step.keep_index)
        for token in (5, 6, 7, 8):
            assert np.abs(step.logits - reference.logits).max() < TOLERANCE * np.abs(reference.logits).max()
            step, reference = found.run([token]), wanted.run([token])


def test_every_tensor_is_within_its_bound(golden: Golden, golden_bundle: Bundle) -> None:
    """By the tolerances that ivc-check has for the CUDA provider, which come from the CPU provider's errors."""
    image = draw_picture()
    reference = record(golden_bundle, golden.folder, make_prompt(golden_bundle, image)[1], [image], 0.5, 8)
    report, _ = compare(ShownSession(golden_bundle, "cuda"), reference, [image])
    assert report.passed, [c for c in report.comparisons if not c.passed]


@pytest.mark.parametrize("operator", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
@pytest.mark.parametrize("scale", [1, 300, 15000])
def test_norms_square_in_float32(operator: str, scale: float) -> None:
    """15,000 squared over 1,536 columns is beyond float16; onnxruntime before 1.27 has to be told."""
    generator, columns = np.random.default_rng(0), 1536
    names = ["x", "skip", "weight", *(["beta"] if operator == "SkipLayerNormalization" else []), "bias"]
    values = {name: generator.standard_normal(columns).astype(np.float16) for name in names}
    values |= {name: (scale * generator.uniform(-1, 1, (64, columns))).astype(np.float16) for name in ("x", "skip")}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, value.shape) for name, value in values.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [64, columns]) for name in ("normed", "sum")]
    node = helper.make_node(operator, names, ["normed", "", "", "sum"], domain="com.microsoft", epsilon=1e-6)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "norm", inputs, outputs), opset_imports=opsets, ir_version=8)
    options = cuda_options(onnxruntime.__version__, cuda_graph=False)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[("CUDAExecutionProvider", options)])
    found, total = session.run(None, values)
    wide = {name: value.astype(np.float64) for name, value in values.items()}
    wanted = wide["x"] + wide["skip"] + wide["bias"]
    assert np.abs(total - wanted).max() <= 2e-3 * scale * 2
    if "beta" in wide:
        wanted -= wanted.mean(axis=-1, keepdims=True)
    wanted *= wide["weight"] / np.sqrt((wanted**2).mean(axis=-1, keepdims=True) + 1e-6)
    assert np.abs(found - wanted - wide.get("beta", 0)).max() < 1e-2


def test_golden_rows_are_kept(golden: Golden, golden_bundle: Bundle) -> None:
    step = FusedConversation(FusedSession(golden_bundle, "cuda"), capacity=400).run(golden.tokens, [golden.picture])
    flipped = np.setxor1d(step.keep_index, golden.data["keep_indices"])
    assert len(flipped) <= 2  # float16 may exchange the two at the boundary
