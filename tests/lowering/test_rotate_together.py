"""Query, key and value by one packed product: the same values on onnxruntime's CPU provider, bit by bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ivc_export import Quantisation, families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GraphName
from ivc_export.dtypes import FloatName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.lowering.onnxruntime.rotate_together import RotateTogetherPass
from ivc_export.runtime.onnxruntime import cpu
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

SMALL_HEADS = TINY["qwen2_vl"] | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
CONFIGS = {name: TINY[name] for name in [*families.names(), "internvl3_5"]} | {"heads of 8 columns": SMALL_HEADS}
NORMED = ("qwen3_vl", "internvl3_5")
"""Models that norm query and key before rotation."""
LATENT = "deepseek_vl_v2"
"""Its query, key and value are no products of the same rows."""
JOINED = "internvl_chat"
"""Its checkpoint has one product, whose heads are in another order."""


class NoPass(ir.passes.InPlacePass):
    """Leaves a graph as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, False)


def packed(name: str, folder: Path, dtype: FloatName = "float32", layer: int | None = None) -> Bundle:
    """A bundle with weights in 4 bits."""
    checkpoint = make_checkpoint(folder / "checkpoint", CONFIGS[name])
    recipe = ExportRecipe(checkpoint, folder / "bundle", layer, dtype=dtype, quantisation=Quantisation("int4", 32))
    return export(recipe)


@pytest.fixture(scope="module", params=CONFIGS)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Bundle]:
    return request.param, packed(request.param, tmp_path_factory.mktemp("packed"))


def assert_same(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    """A picture, steps and a longer turn, over exact and over fixed caches."""
    found = OnnxSession(bundle, 1, accuracy_level=level)
    monkeypatch.setattr(cpu, "RotateTogetherPass", NoPass)
    wanted = OnnxSession(bundle, 1, accuracy_level=level)
    _, tokens, picture = make_prompt(bundle, draw_picture())
    for capacity in (None, len(tokens) + 8):
        ours, theirs = (session.converse(0.5, capacity) for session in (found, wanted))
        for turn, pictures in ((tokens, [picture]), ([3], []), ([5, 6, 9], []), ([1], [])):
            a, b = ours.run(turn, pictures), theirs.run(turn, pictures)
            assert np.array_equal(a.keep_index, b.keep_index) and np.array_equal(a.logits, b.logits)
        assert all(np.array_equal(ours.cache[name], theirs.cache[name]) for name in ours.cache._arrays)


@pytest.mark.parametrize("level", [0, 4])
def test_every_family_gives_the_same(named: tuple[str, Bundle], monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    assert_same(named[1], monkeypatch, level)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_widened_weights_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: FloatName) -> None:
    assert_same(packed("qwen2_vl", tmp_path, dtype), monkeypatch, 4)


@pytest.mark.parametrize("graph", ["prefix", "decoder"])
def test_a_layer_has_one_product_and_one_rotation(named: tuple[str, Bundle], graph: GraphName) -> None:
    """Normed heads are rotated as before; a second pass changes nothing."""
    name, bundle = named
    model = bundle.graph(graph)
    before = Counter(node.op_type for node in model.graph)
    assert RotateTogetherPass()(model).modified == (name not in (LATENT, JOINED))
    after = Counter(node.op_type for node in model.graph)
    layers = before["Attention"]
    assert before["LinearNBits"] - after["LinearNBits"] == (0 if name in (LATENT, JOINED) else 2 * layers)
    turning = 0 if name in (*NORMED, LATENT, JOINED) else layers
    assert after["RotaryEmbedding"] == turning and before["Rotate"] - after["Rotate"] == 2 * turning
    assert before["SplitHeads"] - after["SplitHeads"] == 2 * turning
    assert not RotateTogetherPass()(model).modified


def test_layers_of_floats_stay_as_they_are(golden_bundle: Bundle) -> None:
    model = golden_bundle.graph("prefix")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not RotateTogetherPass()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
