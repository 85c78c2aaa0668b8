"""Windowed attention in the vision encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import PIL.Image

from ivc_export import families
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.lowering.inline import InlinePass
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

FAMILY = families.of("qwen2_5_vl")


def test_scores_grow_with_the_picture_and_not_with_its_square(tmp_path: Path) -> None:
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "c", TINY[FAMILY.model_type]), tmp_path / "b"))
    path = bundle.folder / "vision.onnx"
    model = ir.to_proto(InlinePass()(ir.load(path)).model)
    scores = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"]
    assert len(scores) == 2  # the first block is windowed, the second is not
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in scores)
    onnx.save(model, bundle.folder / "scores.onnx")
    session = onnxruntime.InferenceSession(bundle.folder / "scores.onnx")
    sizes = []
    for side in (224, 448):
        picture = families.preparation(bundle.manifest).picture(PIL.Image.new("RGB", (side, side)), 503)
        windowed, full = session.run(scores, dict(picture.inputs))
        patches = 4 * picture.grid.visual
        assert windowed.size == 2 * patches * 3 * 64  # heads, queries, keys of three blocks of a window's patches
        assert full.size == 2 * patches**2
        np.testing.assert_allclose(windowed.sum(axis=-1), 1, rtol=1e-5)
        sizes.append(windowed.size)
    assert sizes[1] == 4 * sizes[0]
