"""FastV is chosen at export: its operator against NumPy, its graphs against transformers' attention, its commands."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import PIL.Image
import pytest
import torch

from ivc_export import Chat, Method, UserError, cli, families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.manifest import FastVRule
from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, IVC_VERSION, OPSET
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Visual
from ivc_export.graph.functions import function
from ivc_export.report.overlay import count_kinds
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.selection.fastv import select_attended, select_by_score
from ivc_export.selection.ivc_prune import Selected
from ivc_export.verify.oracle import reference_layout, reference_picture
from ivc_export.verify.parity import check, compare_ranking
from ivc_export.verify.reference import Reference
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import LOGIT_TOLERANCE, SHAPES
from tests.families.family_cases import CASES

SCORE_ERROR = 1e-6
"""Of probabilities, in float32."""


FLOATS = ("query", "key", "past_key")


@cache
def operator(scale: float, kind: ir.DataType = ir.DataType.FLOAT) -> onnxruntime.InferenceSession:
    """SelectAttended alone. kind: of queries and keys."""
    body = function("SelectAttended")
    wide = [str(value.name) in FLOATS for value in body.inputs]
    inputs = [
        ir.val(str(value.name), kind if floats else ir.DataType.INT32, ir.Shape([None] * (4 if floats else 1)))
        for value, floats in zip(body.inputs, wide, strict=True)
    ]
    node = ir.node("SelectAttended", inputs, {"scale": scale}, domain=IVC_DOMAIN, num_outputs=2)
    for value, (name, dtype) in zip(node.outputs, {"keep_index": "INT32", "token_score": "FLOAT"}.items(), strict=True):
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType[dtype]), ir.Shape([None])
    imports = {"": OPSET, IVC_DOMAIN: IVC_VERSION}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=imports, name="select")
    model = ir.Model(graph, ir_version=IR_VERSION, functions=[body.clone()])
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def random_feeds(seed: int) -> dict[str, npt.NDArray[Any]]:
    """A run over a cache whose last rows are not valid: what they hold must not matter."""
    generator = np.random.default_rng(seed)
    kv_heads, group = (int(n) for n in generator.integers(1, 5, 2))
    size, rows, past = (int(n) for n in generator.integers((8, 6, 0), (64, 90, 40)))
    visual = np.sort(generator.choice(rows - 1, int(generator.integers(1, rows - 1)), replace=False)).astype(np.int32)
    past_key = generator.standard_normal((1, kv_heads, past, size), np.float32)
    valid = int(generator.integers(0, past + 1))
    past_key[:, :, valid:] = 1e3
    return {
        "query": generator.standard_normal((1, kv_heads * group, rows, size), np.float32),
        "key": generator.standard_normal((1, kv_heads, rows, size), np.float32),
        "past_key": past_key,
        "past_length": np.array([valid], np.int32),
        "visual_index": visual,
        "text_index": np.setdiff1d(np.arange(rows, dtype=np.int32), visual),
        "keep_count": np.array([generator.integers(1, len(visual) + 1)], np.int32),
    }


def in_numpy(feeds: dict[str, npt.NDArray[Any]], scale: float) -> Selected:
    query, key, past_key = (feeds[name][0].astype(np.float32) for name in FLOATS)
    rows = (feeds["visual_index"], feeds["text_index"], int(feeds["keep_count"][0]))
    return select_attended(query, key, past_key, int(feeds["past_length"][0]), *rows, scale)


def test_the_operator_equals_numpy() -> None:
    flips = 0
    for seed in range(100):
        feeds = random_feeds(seed)
        keep_index, score = operator(0.3).run(None, feeds)
        wanted = in_numpy(feeds, 0.3)
        np.testing.assert_allclose(score, wanted.token_score, atol=SCORE_ERROR, rtol=0)
        rows = (feeds["visual_index"], feeds["text_index"], int(feeds["keep_count"][0]))
        np.testing.assert_array_equal(keep_index, select_by_score(score, *rows).keep_index)  # exactly
        flips += not np.array_equal(keep_index, wanted.keep_index)
    assert flips <= 1  # where two scores are as good as equal


def test_float16_queries_are_scored_in_float32() -> None:
    feeds = random_feeds(7)
    feeds |= {name: feeds[name].clip(-1000, 1000).astype(np.float16) for name in FLOATS}
    _, score = operator(0.3, ir.DataType.FLOAT16).run(None, feeds)
    np.testing.assert_allclose(score, in_numpy(feeds, 0.3).token_score, atol=SCORE_ERROR, rtol=0)


def test_equal_scores_fall_to_the_lower_index() -> None:
    feeds = random_feeds(3)
    feeds["key"][:] = feeds["key"][:, :, :1]
    feeds["keep_count"][:] = half = len(feeds["visual_index"]) // 2
    keep_index, score = operator(0.3).run(None, feeds)
    assert np.ptp(score) == 0
    assert np.setdiff1d(keep_index, feeds["text_index"]).tolist() == feeds["visual_index"][:half].tolist()


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model, exported with FastV."""

    checkpoint: Path
    bundle: Bundle
    session: OnnxSession

    @staticmethod
    def make(folder: Path, name: str, layer: int | None = None) -> Tiny:
        checkpoint = make_checkpoint(folder / "checkpoint", TINY[name])
        recipe = ExportRecipe(checkpoint, folder / "bundle", layer=layer, max_visual=400, method="fastv")
        bundle = export(recipe)
        return Tiny(checkpoint, bundle, OnnxSession(bundle))

    def picture(self, width: int, height: int) -> Visual:
        m = self.bundle.manifest
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        return families.preparation(m).picture(PIL.Image.fromarray(noise), m.tokens.image)

    def shown(self, picture: Visual) -> list[int]:
        tokens = self.bundle.manifest.tokens
        marked = [tokens.vision_start, *picture.tokens, tokens.vision_end]
        return [token for token in marked if token is not None]

    @property
    def reference(self) -> Reference:
        m = self.bundle.manifest
        layout = reference_layout(self.bundle, self.checkpoint)
        return Reference(self.checkpoint, m.selection_layer, 0.4, m.selection, layout)


@pytest.fixture(scope="module", params=CASES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp(request.param), request.param)


def test_a_bundle_holds_the_rule_and_takes_no_more_than_it_needs(tiny: Tiny) -> None:
    m, prefix = tiny.bundle.manifest, tiny.bundle.manifest.graphs["prefix"]
    assert m.selection == FastVRule(whole_layers=m.selection.whole_layers) and not m.calibrated
    own = {"query_index", "ivc_priority", "thumbnail_index", "tile_map", "seed_index"}
    assert not own & {tensor.name for tensor in (*prefix.inputs, *prefix.outputs)}
    calls = [node.op_type for node in tiny.bundle.graph("prefix").graph if node.op_type.startswith("Select")]
    assert calls == ["SelectAttended"]


def test_scores_are_the_attention_that_transformers_gives(tiny: Tiny) -> None:
    """Of the unpruned model, run whole by transformers: layer k-1's weights, the last row's, averaged over heads."""
    m, picture, reference = tiny.bundle.manifest, tiny.picture(280, 120), tiny.reference
    tokens = [1, 2, 3, *tiny.shown(picture), 4, 5, 6]
    step = HostConversation(tiny.session, 0.4).run(tokens, [picture])
    ids = torch.tensor([tokens])
    given = dict(reference_picture(tiny.bundle, picture).inputs)
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == m.tokens.image).int()
    with torch.no_grad():
        found = reference.model(input_ids=ids, output_attentions=True, use_cache=False, **given)
    attention = found.attentions[m.selection_layer - 1][0, :, -1].mean(dim=0).numpy()
    visual = step.run.visual_index
    np.testing.assert_allclose(step.prefix["token_score"], attention[visual], atol=SCORE_ERROR, rtol=0)
    chosen = visual[np.argsort(-attention[visual], kind="stable")[: step.run.keep_count]]
    kept = np.sort(np.concatenate([step.run.text_index, chosen]))
    np.testing.assert_array_equal(step.keep_index, kept)


@pytest.mark.parametrize("capacity", [None, 1600], ids=["exact-length", "fixed-capacity"])
def test_turns_with_pictures_equal_the_reference(tiny: Tiny, capacity: int | None) -> None:
    conversation, reference = HostConversation(tiny.session, 0.4, capacity), tiny.reference
    wide, high = tiny.picture(280, 120), tiny.picture(100, 230)
    turns: list[tuple[list[int], list[Visual]]] = [
        ([1, 2, *tiny.shown(wide), 3, 4, 5], [wide]),
        ([17], []),
        ([6, *tiny.shown(high), 7, *tiny.shown(wide), 8], [high, wide]),
        ([9, 10], []),
    ]
    for tokens, pictures in turns:
        step = conversation.run(tokens, pictures)
        turn = reference.run(tokens, [reference_picture(tiny.bundle, picture) for picture in pictures])
        np.testing.assert_array_equal(step.keep_index, turn.keep_index.numpy())
        np.testing.assert_allclose(step.prefix["token_score"], turn.token_score.numpy(), atol=SCORE_ERROR, rtol=0)
        assert np.abs(step.logits - turn.logits.numpy()).max() < LOGIT_TOLERANCE


def test_a_layer_that_is_kept_whole_can_be_looked_at(tmp_path: Path) -> None:
    llava = Tiny.make(tmp_path, "llava", layer=1)
    picture, conversation, reference = llava.picture(200, 200), HostConversation(llava.session, 0.4), llava.reference
    turns: list[tuple[list[int], list[Visual]]] = [([1, *llava.shown(picture), 2], [picture])]
    for tokens, pictures in [*turns, ([3], []), *turns]:
        step = conversation.run(tokens, pictures)
        turn = reference.run(tokens, [reference_picture(llava.bundle, one) for one in pictures])
        np.testing.assert_array_equal(step.keep_index, turn.keep_index.numpy())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("qwen"), "qwen2_vl")


def test_parity_is_checked_and_a_wrong_choice_found(qwen: Tiny) -> None:
    report = check(qwen.bundle, qwen.checkpoint, ratio=0.4, steps=1)
    assert report.passed and report.method == "fastv"
    names = [comparison.name for comparison in report.comparisons]
    assert "token_score" in names and "keep_index, of the graph's own scores" in names and "seed_index" not in names
    picture = qwen.picture(280, 120)
    step = HostConversation(qwen.session, 0.4).run([1, *qwen.shown(picture), 2, 3], [picture])
    wanted = {name: step.prefix[name] for name in ("keep_index", "token_score")}
    assert all(comparison.passed for comparison in compare_ranking(step, wanted, SCORE_ERROR))
    score, kept = wanted["token_score"], np.isin(step.run.visual_index, wanted["keep_index"])
    best, worst = step.run.visual_index[score.argmax()], step.run.visual_index[score.argmin()]
    assert kept[score.argmax()] and not kept[score.argmin()]
    exchanged = np.sort(np.append(np.setdiff1d(wanted["keep_index"], best), worst)).astype(np.int32)
    wrong = replace(step, prefix={**step.prefix, "keep_index": exchanged})
    assert [comparison.passed for comparison in compare_ranking(wrong, wanted, SCORE_ERROR)] == [True, False, False]
    off = {**wanted, "token_score": score + np.float32(1e-4)}
    assert [comparison.passed for comparison in compare_ranking(step, off, SCORE_ERROR)] == [False, True, True]


def test_commands_export_run_and_check_it(qwen: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bundle"
    export_it = ["--model", str(qwen.checkpoint), "--output", str(folder), "--method", "fastv"]
    assert cli.ivc_export([*export_it, "--dry-run"]) == 0
    assert "selected by fastv" in " ".join(capsys.readouterr().out.split())
    assert cli.ivc_export([*export_it, "--testdata", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["estimate"]["method"]) == ("fastv", "fastv")
    question = [str(folder), "--image", str(SHAPES), "--prompt", "Where?", "--max-tokens", "2", "--ratio", "0.25"]
    assert cli.ivc_run([*question, "--json", "--show", str(tmp_path / "kept.png"), "--method", "fastv"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["method"], answer["method_seed"]) == ("fastv", None)
    assert answer["visual_tokens"] == {"total": 192, "kept": 48, "attended": 48, "pruned": 144}
    assert cli.ivc_check([str(folder), "--against", str(qwen.checkpoint), "--steps", "1"]) == 0
    assert ", fastv" in capsys.readouterr().out
    assert cli.ivc_check([str(folder), "--onnx-only"]) == 0
    assert json.loads((folder / "report" / "parity.json").read_text())["method"] == "fastv"


@pytest.mark.parametrize("method", ["ivc-prune", "foreground", "random"])
def test_such_a_bundle_refuses_other_methods(
    qwen: Tiny, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = (
        "this bundle was exported with --method fastv, and its graphs select by that only: leave out "
        f"{method}, or export the model with ivc-export --method ivc-prune"
    )
    folder = str(qwen.bundle.folder)
    assert cli.ivc_run([folder, "--prompt", "Where?", "--method", method]) == 2
    assert cli.ivc_check([folder, "--against", str(qwen.checkpoint), "--method", method]) == 2
    assert capsys.readouterr().err.count(sentence) == 2
    with pytest.raises(UserError, match="exported with --method fastv"):
        Chat(qwen.session, method=method)
    with pytest.raises(UserError, match="exported with --method fastv"):
        FusedSession(qwen.bundle, "cpu").converse(method=Method(method))


def test_other_bundles_say_to_export_with_it(
    sample_bundle: Bundle, sample_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "this bundle's graphs cannot select by fastv: export the model with ivc-export --method fastv"
    folder = str(sample_bundle.folder)
    assert cli.ivc_run([folder, "--prompt", "Where?", "--method", "fastv"]) == 2
    assert cli.ivc_check([folder, "--against", str(sample_checkpoint), "--method", "fastv"]) == 2
    assert capsys.readouterr().err.count(sentence) == 2


def test_an_export_refuses_what_is_chosen_at_run_time(sample_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method 'random' is unknown: give one of ivc-prune, fastv"):
        ExportRecipe(sample_checkpoint, tmp_path / "b", method="random")


def test_kept_tokens_are_told_apart(qwen: Tiny) -> None:
    chat = Chat(qwen.session, 0.5)
    "".join(chat.ask("Where?", [SHAPES]))
    assert chat.step is not None
    assert count_kinds(chat.step) == {"attended": 96, "pruned": 96}
