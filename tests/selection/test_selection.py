from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.utils
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from ivc_export import families
from ivc_export.contract.manifest import RotarySizes, SelectionRule
from ivc_export.contract.names import OPSET
from ivc_export.contract.ratio import kept_tokens
from ivc_export.families.pictures import Grid
from ivc_export.families.positions import mrope_positions
from ivc_export.graph.functions import function
from ivc_export.runtime.plan import TILE_INPUTS, VIEW_INPUTS, plan_run, thumbnail_inputs
from ivc_export.selection import ivc_prune as selection
from ivc_export.selection.operators import selection_operator
from ivc_export.verify import reference, reference_picture
from samples.tiny import TINY
from tests.conftest import GOLDENS, SCORE_TOLERANCE
from tests.families.family_cases import CASES

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Feeds = dict[str, npt.NDArray[Any]]
Runner = Callable[[Feeds], list[npt.NDArray[Any]]]
INPUTS = ("values", "ivc_priority", "visual_index", "text_index", "query_index", "keep_count", *VIEW_INPUTS)
OUTPUTS = ("keep_index", "token_score", "seed_index")
FLOAT_INPUTS = ("values", "ivc_priority", "token_score")
RULE = SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=2)
RULES = {
    "visual": RULE,
    "all": RULE.model_copy(update={"softmax": "all"}),
    "tiles": RULE.model_copy(update={"softmax": "all", "tiles": True}),
    "views": RULE.model_copy(update={"softmax": "thumbnail", "views": True, "row_fraction": 0.15}),
}


def body_model(rule: SelectionRule = RULE, *spelling: str) -> onnx.ModelProto:
    """A body of the rule's operator as a graph, its attributes replaced by the rule's."""
    body = ir.to_proto(function(selection_operator(rule), *spelling))
    values = {"seed_divisor": rule.seed_divisor, "softmax_all": int(rule.softmax == "all")}
    nodes = []
    for node in body.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if copy.attribute and copy.attribute[0].ref_attr_name:
            value = values[copy.attribute[0].ref_attr_name]
            copy.attribute[0].CopyFrom(onnx.helper.make_attribute("value_int", value))
        nodes.append(copy)

    def info(name: str) -> onnx.ValueInfoProto:
        kind = onnx.TensorProto.FLOAT if name in FLOAT_INPUTS else onnx.TensorProto.INT32
        return onnx.helper.make_tensor_value_info(name, kind, [None] * (4 if name == "values" else 1))

    inputs, outputs = [info(name) for name in body.input], [info(name) for name in body.output]
    graph = onnx.helper.make_graph(nodes, "select", inputs, outputs)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)


def runner(model: onnx.ModelProto) -> Runner:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    wanted = {i.name for i in session.get_inputs()}
    return lambda feeds: session.run(None, {n: a for n, a in feeds.items() if n in wanted})


@pytest.fixture(scope="module")
def run_rule() -> dict[str, Runner]:
    """Each rule's operator in onnxruntime, and the body that sorts."""
    found = {name: runner(body_model(rule)) for name, rule in RULES.items()}
    return found | {"sorted": runner(body_model(RULE, "sorted"))}


@pytest.fixture(scope="module")
def select_onnx(run_rule: dict[str, Runner]) -> Runner:
    return run_rule["visual"]


@pytest.fixture(scope="module")
def rank_rule() -> dict[str, Runner]:
    """The part of each operator behind the scores: from token_score and seed_index to keep_index."""
    found = {}
    for name, rule in RULES.items():
        model = onnx.shape_inference.infer_shapes(body_model(rule))
        inputs = ["token_score", "seed_index", *INPUTS[1:4], "keep_count"]
        inputs += VIEW_INPUTS if rule.views else TILE_INPUTS if rule.tiles else ()
        found[name] = runner(onnx.utils.Extractor(model).extract_model(inputs, ["keep_index"]))
    return found


@dataclass(frozen=True)
class Case:
    values: Floats  # [kv_heads, S, head_dim]
    priority: Floats
    visual: Ints
    text: Ints
    query: Ints
    keep_count: int
    rule: SelectionRule = RULE
    grid: Grid | None = None  # of a picture in tiles

    @property
    def tiles(self) -> dict[str, Ints] | None:
        return thumbnail_inputs([self.grid], self.rule) if self.grid else None

    @property
    def picture(self) -> reference_picture.ReferencePicture:
        assert self.grid is not None
        return reference_picture.ReferencePicture({}, *self.grid[:3], self.grid.content)

    @property
    def shown(self) -> list[int]:
        return self.picture.shown if self.grid else []

    @property
    def feeds(self) -> Feeds:
        count = np.array([self.keep_count], np.int32)
        arrays = [self.values[None], self.priority, self.visual, self.text, self.query, count]
        return dict(zip(INPUTS, arrays, strict=False)) | (self.tiles or {})

    def in_numpy(self) -> selection.Selected:
        return selection.select(
            self.values, self.priority, self.visual, self.text, self.query, self.keep_count, self.rule, self.tiles
        )

    def in_torch(self) -> tuple[Floats, Ints]:
        arrays = (self.values, self.visual, self.query, self.text if self.rule.softmax == "all" else self.text[:0])
        values, visual, query, others = map(torch.from_numpy, arrays)
        if self.rule.views:
            score, seeds = reference_picture.scores_of_views(
                values, visual, query, 100, self.shown, self.picture.candidates
            )
            return score.numpy(), seeds.numpy().astype(np.int32)
        score, seeds = reference.token_scores(values, visual, query, 100, others, self.shown)
        return score.numpy(), seeds.numpy().astype(np.int32)

    def torch_fill(self, score: Floats, seeds: Ints) -> Ints:
        """Kept rows by the reference's list: seeds, IVC tokens best first, the rest by score."""
        order = np.argsort(-self.priority, kind="stable")[: np.count_nonzero(self.priority)]
        arguments = (torch.from_numpy(score), seeds.tolist(), order.tolist(), self.keep_count, self.shown)
        if self.rule.views:
            ends = [token for token in order.tolist() if self.priority[token] >= selection.SEPARATOR_PRIORITY]
            chosen = reference_picture.fill_views(*arguments, self.picture.candidates, ends)
        else:
            chosen = reference.fill(*arguments)
        return np.sort(np.concatenate([self.text, self.visual[chosen.numpy()]]))


SELECTIONS = [
    (name, path)
    for name, family in CASES.items()
    if family.selection
    for path in sorted((GOLDENS / "selection").glob(f"{family.selection}-*.npz"))
]


@pytest.mark.parametrize(("name", "path"), SELECTIONS, ids=[f"{name}-{path.stem}" for name, path in SELECTIONS])
def test_selection_equals_the_official_code(name: str, path: Path, run_rule: dict[str, Runner]) -> None:
    golden, family = np.load(path), families.of(name)
    model, grid = family.read(TINY[family.model_type], None), CASES[name].grid(golden)
    image_token = 503 if model.image_token is None else model.image_token
    start, length, rows = int(golden["visual_start"]), int(golden["visual_len"]), len(golden["values"])
    kept = len(golden["keep_indices"]) - (rows - length)
    tokens = np.zeros(rows, np.int32)
    tokens[start : start + length] = image_token
    half = golden["cos"].shape[-1] // 2
    sections = model.rotary.sections if len(model.rotary.sections) > 1 else (half,)
    if sum(sections) != half:  # only their sum counts here
        sections = (*sections[:-1], half - sum(sections[:-1]))
    assert isinstance(model.selection, SelectionRule)
    manifest: Any = SimpleNamespace(
        family=name,
        decoder=model.decoder.model_copy(update={"head_dim": golden["values"].shape[-1]}),
        rotary=model.rotary.model_copy(update={"theta": float(golden["rope_theta"]), "sections": sections}),
        selection=model.selection,
        visual_tokens=[image_token],
    )
    run = plan_run(manifest, tokens, [grid], 0, kept / length)
    np.testing.assert_array_equal(run.position_ids[:, 0], np.atleast_2d(golden["positions"]))
    assert run.keep_count == kept
    assert family.default_ratio != 0.5 or kept == kept_tokens(length, 0.5)
    case = Case(
        values=np.ascontiguousarray(golden["values"].transpose(1, 0, 2)),
        priority=run.ivc_priority,
        visual=run.visual_index,
        text=run.text_index,
        query=run.query_index,
        keep_count=kept,
        rule=model.selection,
        grid=grid if model.selection.tiles or model.selection.views else None,
    )
    rule = next((n for n in ("views", "tiles") if getattr(model.selection, n)), model.selection.softmax)
    allowed = [] if golden["robust"] else golden["fragile_indices"].tolist()
    bodies = (rule, "sorted") if rule == "visual" else (rule,)
    in_onnx = [run_rule[body](case.feeds)[0] for body in bodies]
    for found in (case.in_numpy().keep_index, *in_onnx, case.torch_fill(*case.in_torch())):
        assert set(np.setxor1d(found, golden["keep_indices"])) <= set(allowed)
        assert len(found) == len(golden["keep_indices"])


def random_case(seed: int, rule: SelectionRule = RULE) -> Case:
    """Visual tokens anywhere among the rows; every third case repeats value vectors and priorities."""
    generator = np.random.default_rng(seed)
    grid = None
    if rule.tiles:
        tile, high, wide = (int(n) for n in generator.integers(1, (7, 4, 4)))
        grid = Grid(tile * high, tile * wide, tile)
    if rule.views:
        tile, high, wide = (int(n) for n in generator.integers(1, (15, 3, 3)))
        top, left = (int(n) for n in generator.integers(0, tile, 2))
        bottom, right = (int(n) for n in generator.integers((top + 1, left + 1), tile + 1))
        grid = Grid(tile * high, tile * wide, tile, content=(top, left, bottom, right))
    length, text = int(generator.integers(1, 400)), int(generator.integers(1, 40))
    length = grid.visual if grid else length
    heads, size = int(generator.integers(1, 5)), int(generator.choice([8, 16, 64, 128]))
    rows = generator.permutation(length + text).astype(np.int32)
    visual, others = np.sort(rows[:length]), np.sort(rows[length:])
    values = generator.standard_normal((heads, length + text, size), np.float32)
    if seed % 3 == 0:
        values[:, visual] = values[:, generator.choice(visual, length)]
    ivc = generator.permutation(length)[: length // 5]
    priority = np.zeros(length, np.float32)
    priority[ivc] = np.arange(len(ivc) + 1, 1, -1) // (2 if seed % 3 == 0 else 1) + 2
    if grid and grid.content:
        priority[grid.separators] = selection.SEPARATOR_PRIORITY
    query = np.sort(generator.choice(others, int(generator.integers(1, text + 1)), replace=False))
    return Case(values, priority, visual, others, query, int(generator.integers(1, length + 1)), rule, grid)


@pytest.mark.parametrize("name", RULES)
def test_500_random_cases_agree_in_numpy_onnx_and_pytorch(
    run_rule: dict[str, Runner],
    rank_rule: dict[str, Runner],
    record_property: Callable[[str, object], None],
    name: str,
) -> None:
    rule, select_onnx, rank_onnx = RULES[name], run_rule[name], rank_rule[name]
    near_ties, worst = 0, 0.0
    for seed in range(500):
        case = random_case(seed, rule)
        numpy = case.in_numpy()
        keep, score, _ = select_onnx(case.feeds)
        torch_score, torch_seeds = case.in_torch()
        assert len(keep) == len(case.text) + case.keep_count
        assert np.all(np.diff(keep) > 0)
        error = max(float(np.abs(x - numpy.token_score).max()) for x in (score, torch_score))
        assert error < SCORE_TOLERANCE, seed
        worst = max(worst, error)

        # from the same scores, the same rows everywhere, also where scores tie exactly
        coarse = np.round(numpy.token_score * 50 * len(score)) / np.float32(50 * len(score))
        for scores in (numpy.token_score, coarse.astype(np.float32)):
            given = (scores, numpy.seed_index)
            order = scores
            if case.tiles and rule.tiles:
                order = selection.tile_scores(scores, case.priority, case.keep_count, **case.tiles)
            if case.tiles and rule.views:
                order = selection.view_order(scores, numpy.seed_index, case.priority, **case.tiles)
            others = (case.priority, case.visual, case.text, case.keep_count)
            wanted = selection.kept_rows(order, numpy.seed_index, *others)
            (ranked,) = rank_onnx(case.feeds | dict(zip(OUTPUTS[1:], given, strict=True)))
            np.testing.assert_array_equal(ranked, wanted)
            np.testing.assert_array_equal(case.torch_fill(*given), wanted)

        # end to end the same rows, unless scores at the boundary are closer than the measured error
        for found in (keep, case.torch_fill(torch_score, torch_seeds)):
            flipped = np.isin(case.visual, np.setxor1d(found, numpy.keep_index))
            if flipped.any():
                near_ties += 1
                # a tie in a thumbnail changes what it shows, so these need not tie themselves
                assert case.grid or np.ptp(numpy.token_score[flipped]) <= 2 * error, seed
    record_property(
        f"500 random cases, {name}", f"largest score error {worst:.1e}, {near_ties} of 1000 choices flip at a near-tie"
    )


def test_exact_ties_go_to_the_lowest_index(select_onnx: Runner) -> None:
    values = np.ones((2, 30, 8), np.float32)
    visual, text = np.arange(5, 25, dtype=np.int32), np.r_[0:5, 25:30].astype(np.int32)
    case = Case(values, np.zeros(20, np.float32), visual, text, text[-2:], 7)
    wanted = [*range(12), *range(25, 30)]
    assert case.in_numpy().keep_index.tolist() == wanted
    assert select_onnx(case.feeds)[0].tolist() == wanted


def test_a_small_budget_takes_seeds_then_the_best_ivc_tokens(select_onnx: Runner) -> None:
    case = random_case(7)
    seeds = case.in_numpy().seed_index
    ivc = [i for i in np.argsort(-case.priority, kind="stable") if i not in seeds and case.priority[i] > 0]
    for budget in (1, len(seeds), len(seeds) + 1, len(seeds) + 5):
        small = Case(case.values, case.priority, case.visual, case.text, case.query, budget)
        wanted = np.sort(case.visual[[*seeds, *ivc][:budget]])
        for found in (small.in_numpy().keep_index, select_onnx(small.feeds)[0]):
            np.testing.assert_array_equal(np.setdiff1d(found, case.text), wanted)


def test_seed_count_rounds_half_to_even_up_to_16384(select_onnx: Runner) -> None:
    for length in range(1, 16385):
        assert max(1, (length + 49 + (length // 100) % 2) // 100) == max(1, round(0.01 * length)), length
    for length in (1, 49, 50, 51, 149, 150, 151, 250, 350):
        visual = np.arange(length, dtype=np.int32)
        text = np.array([length], np.int32)
        values = np.random.default_rng(0).standard_normal((1, length + 1, 4), np.float32)
        case = Case(values, np.zeros(length, np.float32), visual, text, text, 1)
        assert len(select_onnx(case.feeds)[2]) == len(case.in_numpy().seed_index) == max(1, round(0.01 * length))


def test_a_decode_step_keeps_its_only_row(select_onnx: Runner) -> None:
    row = np.zeros(1, np.int32)
    case = Case(np.ones((2, 1, 8), np.float32), np.zeros(1, np.float32), row, row[:0], row, 1)
    assert select_onnx(case.feeds)[0].tolist() == [0] == case.in_numpy().keep_index.tolist()


def test_ivc_tokens_tie_across_the_diagonal_and_rank_by_index() -> None:
    position_ids, _ = mrope_positions([Grid(12, 12)], 0)
    priority = selection.ivc_priority(position_ids, RotarySizes(theta=1e6, sections=(4, 6, 6)), 32, RULE)
    ranked = np.argsort(-priority, kind="stable")[: np.count_nonzero(priority)]
    assert np.all(np.diff(priority[ranked]) == -1)
    assert priority[ranked[0]] == selection.IVC_PRIORITY
    assert priority[ranked[-1]] >= 2
    assert ranked[0] == 0  # the first token of a picture is not rotated at all
    rank = {int(token): i for i, token in enumerate(ranked)}
    mirrored = [(t, 12 * (t % 12) + t // 12) for t in rank if t // 12 < t % 12]
    both = [(token, mirror) for token, mirror in mirrored if mirror in rank]
    assert len(both) > 3
    assert all(rank[token] < rank[mirror] for token, mirror in both)


def test_the_reference_picks_the_same_ivc_tokens() -> None:
    for grid, start, head_dim in ((Grid(8, 8), 10, 64), (Grid(34, 20), 3, 128), (Grid(1, 7), 0, 32)):
        position_ids, _ = mrope_positions([start, grid], 0)
        picture = position_ids[:, start:]
        priority = selection.ivc_priority(picture, RotarySizes(theta=1e6, sections=(1, 1, 1)), head_dim, RULE)
        wanted = reference.ivc_tokens(torch.from_numpy(picture), 1e6, head_dim, 0.1)
        assert np.argsort(-priority, kind="stable")[: np.count_nonzero(priority)].tolist() == wanted
