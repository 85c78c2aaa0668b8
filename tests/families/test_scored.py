"""What visual tokens are scored by: a family says it, and a recipe may say otherwise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from ivc_export import families
from ivc_export.checkpoint.formats.nbits import Packing, packed_linear
from ivc_export.checkpoint.formats.weight_format import WeightFormat
from ivc_export.checkpoint.weights import PlannedWeights
from ivc_export.contract.manifest import Scored
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import Size, estimate_recipe
from ivc_export.exporter.graphs import build_graphs
from ivc_export.exporter.pipeline import export, scoring
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.edit import numbers
from ivc_export.lowering.precision.scale_residuals import SCALE, ScaleResidualsPass
from ivc_export.verify.parity import check
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.families.layered import read as read_layered


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [("internvl_chat", "unnormed-values", "values"), ("qwen2_vl", "values", "unnormed-values")],
)
def test_a_recipe_scores_otherwise_and_the_manifest_says_so(
    name: str, own: Scored, other: Scored, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", TINY[name])
    bundles = {s: export(ExportRecipe(checkpoint, tmp_path / str(s), max_visual=400, scored=s)) for s in (None, other)}
    assert [bundle.manifest.selection.scored for bundle in bundles.values()] == [own, other]
    hashes = {bundle.manifest.constants_sha256 for bundle in bundles.values()}
    assert len(hashes) == 2
    report = check(bundles[other], checkpoint, ratio=0.4, steps=1)
    assert report.passed, [c for c in report.comparisons if not c.passed]


def test_another_scoring_than_the_published_one_is_not_calibrated(tmp_path: Path) -> None:
    config = {**TINY["internvl_chat"], "llm_config": {**TINY["internvl_chat"]["llm_config"], "num_hidden_layers": 32}}
    checkpoint = make_checkpoint(tmp_path / "c", config)
    found = [
        estimate_recipe(ExportRecipe(checkpoint, tmp_path / "b", scored=scored), [Size(112, 112)]).calibrated
        for scored in (None, "unnormed-values", "values")
    ]
    assert found == [True, True, False]


def test_scoring_rows_without_their_norm_costs_one_product(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", TINY["internvl_chat"])
    flops = []
    for scored in ("unnormed-values", "values"):
        recipe = ExportRecipe(checkpoint, tmp_path / "b", scored=scored)
        (one,) = estimate_recipe(recipe, [Size(112, 112)]).pictures
        flops.append(one.unpruned.flops["prefix"])
        rows = one.visual_tokens + one.text_tokens
    assert flops[0] - flops[1] == 2 * rows * 64 * (4 + 2 * 2) * 16


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_only_the_selection_reads_what_is_scored(lowering: str, tmp_path: Path) -> None:
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "c", TINY["internvl_chat"]), tmp_path / "b"))
    graph = lower(bundle.graph("prefix"), lowering).graph
    (scored,) = [value for value in graph.outputs if value.name == "scored_values"]
    assert scored.shape is not None and scored.shape[1] == 2
    LOWERINGS[lowering].verify("prefix", lower(bundle.graph("prefix"), lowering), bundle.manifest.graphs["prefix"])


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", ["internvl", "internvl3_5", "internvl_chat"])  # with a bias, without, and fused
def test_packed_weights_score_rows_at_their_own_size(name: str, ordered: bool) -> None:
    model = scoring(families.of(TINY[name]["model_type"]).read(TINY[name], None), "unnormed-values")
    linear = partial(packed_linear, packing=Packing(4, ordered=ordered))
    stored = WeightFormat("packed", lambda layer: ".self_attn." in layer, lambda tensors: {}, linear)
    prefix = build_graphs(model, PlannedWeights(stored=stored), 2)["prefix"]
    graph = ScaleResidualsPass()(prefix).model.graph
    (product,) = [node for node in graph if str(node.name).startswith("scored/") and node.op_type == "LinearNBits"]
    scale = product.inputs[0].producer() if product.inputs[0] is not None else None
    assert scale is not None and scale.op_type == "Mul" and numbers(scale.inputs[1]) == [1 / SCALE]


def test_layers_that_do_not_give_it_are_refused() -> None:
    model = read_layered({"value_dim": 16}, None)
    assert scoring(model, "values").selection.scored == "values"
    with pytest.raises(UserError, match="layers have no unnormed-values to score by: give values"):
        scoring(model, "unnormed-values")


def test_a_recipe_names_what_is_known() -> None:
    with pytest.raises(UserError, match="scored 'keys' is unknown: give one of values, unnormed-values"):
        ExportRecipe("x", Path("y"), scored="keys")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="both a calibration and --scored are given"):
        ExportRecipe("x", Path("y"), scored="values", calibration=Path("z"))
