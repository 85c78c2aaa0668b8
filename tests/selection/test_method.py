"""Methods are chosen at run time, on any bundle: their priorities, their draws, and what refuses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ivc_export import Chat, Method, UserError, cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.checkpoint.weights import PlannedWeights
from ivc_export.contract.manifest import Manifest, SelectionRule
from ivc_export.exporter.graphs import prefix_graph
from ivc_export.families.pictures import Grid
from ivc_export.report.overlay import count_kinds, kinds, overlay
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.plan import plan_run
from ivc_export.selection.baselines import draws
from ivc_export.selection.ivc_prune import Blocks, Floats, Ints, ivc_priority
from ivc_export.selection.method import METHODS, SelectionMethod, exported_methods
from ivc_export.selection.operators import Operator, ivc_call, ivc_inputs
from ivc_export.source.configuration import read_description
from ivc_export.verify.drawn import splitmix64
from tests.conftest import SHAPES

PUBLISHED = {
    0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F),
    1234567: (6457827717110365317, 3203168211198807973, 9817491932198370423),
}
"""First numbers of splitmix64, as other implementations of it print them."""


@pytest.mark.parametrize("seed", PUBLISHED)
def test_draws_are_splitmix64s(seed: int) -> None:
    assert tuple(draws(seed, 3).tolist()) == PUBLISHED[seed]
    numbers = splitmix64(seed)
    assert [next(numbers) for _ in range(1000)] == draws(seed, 1000).tolist()


def plan(bundle: Bundle, grids: Sequence[Grid], method: Method) -> Floats:
    image = bundle.manifest.tokens.image
    tokens = [1, *(token for grid in grids for token in (*[image] * grid.visual, 2)), 3]
    return plan_run(bundle.manifest, np.array(tokens), grids, 0, 0.5, method).ivc_priority


def test_random_priorities_are_a_permutation_that_float32_holds(sample_bundle: Bundle) -> None:
    grids = [Grid(30, 40), Grid(9, 7)]
    first, same, other = (plan(sample_bundle, grids, Method("random", seed)) for seed in (0, 0, 1))
    assert first.dtype == np.float32 and sorted(first.tolist()) == list(range(2, 1263 + 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert first.argmax() == draws(0, 1263).argmax()
    assert abs(np.corrcoef(first, np.arange(1263))[0, 1]) < 0.1  # two pictures share one order
    whole = METHODS["random"].host_plan(sample_bundle.manifest, np.zeros((1, 100_000), np.int32), [], 7)
    assert len(np.unique(whole)) == 100_000


def test_ivc_prune_is_what_it_was_and_foreground_sets_nothing(sample_bundle: Bundle) -> None:
    grid, m = Grid(6, 8), sample_bundle.manifest
    assert not plan(sample_bundle, [grid], Method("foreground")).any()
    found = plan(sample_bundle, [grid], Method())
    assert isinstance(m.selection, SelectionRule)
    rows, columns = (part.ravel() + 1 for part in np.indices((6, 8)))
    positions = np.stack([np.ones_like(rows), rows, columns]).astype(np.int32)
    assert np.array_equal(found, ivc_priority(positions, m.rotary, m.decoder.head_dim, m.selection))


def last_first(m: Manifest, positions: Ints, blocks: Blocks, seed: int) -> Floats:
    return np.arange(2, positions.shape[1] + 2, dtype=np.float32)


def test_a_method_is_one_record(sample_session: OnnxSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "last", SelectionMethod(last_first, kinds=("ivc",)))
    chat = Chat(sample_session, 0.5, method="last")
    "".join(chat.ask("Where?", [SHAPES]))
    assert chat.step is not None
    step, length = chat.step, len(chat.step.run.visual_index)
    seeds = step.prefix["seed_index"].tolist()
    behind = [token for token in reversed(range(length)) if token not in seeds]
    wanted = sorted([*seeds, *behind][: length // 2])
    assert np.flatnonzero(np.isin(step.run.visual_index, step.keep_index)).tolist() == wanted


def test_a_method_that_looks_at_other_tensors_is_one_record(
    sample_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_key = Operator(ivc_call, looks_at=("key",), inputs=ivc_inputs)
    record = SelectionMethod(last_first, kinds=("ivc",), operator=by_key, exported_as="by-key")
    monkeypatch.setitem(METHODS, "by-key", record)
    assert exported_methods() == ("ivc-prune", "fastv", "by-key")
    model = read_description(Checkpoint.open(sample_checkpoint)).model
    own = replace(model, selection=model.selection.model_copy(update={"method": "by-key"}))
    graph = prefix_graph(own, PlannedWeights(), 2).graph
    attention = [node for node in graph if node.op_type == "Attention"][-1]
    (select,) = [node for node in graph if node.op_type == "SelectTokens"]
    taken = ["ivc_priority", "visual_index", "text_index", "query_index", "keep_count"]
    assert select.inputs[0] is attention.inputs[1]
    assert [value.name for value in select.inputs[1:] if value is not None] == taken


@pytest.mark.parametrize(
    ("method", "own"), [(Method(), {"ivc", "foreground"}), ("foreground", {"foreground"}), ("random", {"random"})]
)
def test_kept_tokens_are_told_apart_by_the_methods_kinds(
    sample_session: OnnxSession, method: str | Method, own: set[str]
) -> None:
    chat = Chat(sample_session, 0.5, method=method)
    "".join(chat.ask("Where?", [SHAPES]))
    assert chat.step is not None
    assert set(kinds(chat.step)) == {"seed", *own, "pruned"}
    counts = count_kinds(chat.step)
    assert set(counts) == {"seed", *own, "pruned"} and sum(counts.values()) == 192 and counts["pruned"] == 96
    assert overlay([open_picture(SHAPES)], chat.step).width > 500


def test_commands_choose_a_method_and_tell_it(
    sample_bundle: Bundle, sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(sample_bundle.folder, tmp_path / "bundle")
    question = [str(folder), "--image", str(SHAPES), "--prompt", "Where?", "--max-tokens", "1", "--json"]
    told = []
    for options in ([], ["--method", "foreground"], ["--method", "random", "--method-seed", "3"]):
        assert cli.ivc_run([*question, *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        told.append((answer["method"], answer["method_seed"]))
    assert told == [("ivc-prune", None), ("foreground", None), ("random", 3)]
    check = [str(folder), "--against", str(sample_checkpoint), "--steps", "1", "--method", "random"]
    assert cli.ivc_check([*check, "--method-seed", "3"]) == 0
    assert "ratio 0.5, random, seed 3:" in capsys.readouterr().out
    page = (folder / "report" / "parity.html").read_text(encoding="utf-8")
    assert "by random" in page and "Seeds and drawn tokens are kept" in page
    assert cli.ivc_check([str(folder), "--onnx-only"]) == 0
    report = json.loads((folder / "report" / "parity.json").read_text())
    assert (report["method"], report["method_seed"], report["passed"]) == ("random", 3, True)
    shutil.copy(folder / "report" / "parity.json", tmp_path / "older.json")
    capsys.readouterr()
    assert cli.ivc_check([*check, "--baseline", str(tmp_path / "older.json")]) == 2
    assert "older.json is from a run with another method seed (3, not 0): give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "best"], "invalid choice: 'best'"),
        (["--method-seed", "1"], "--method-seed works only with --method random: leave it out with ivc-prune"),
        (
            ["--method", "foreground", "--method-seed", "0"],
            "--method-seed works only with --method random: leave it out with foreground",
        ),
        (["--method", "random", "--method-seed", "-1"], "method seed -1 is out of range: give 0 to 2147483647"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_mistaken_method_costs_one_sentence(
    command: str, options: list[str], sentence: str, sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(sample_bundle.folder)
    if command == "run":
        assert cli.ivc_run([folder, "--prompt", "Where?", *options]) == 2
    else:
        assert cli.ivc_check([folder, "--against", "nowhere", *options]) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


def test_a_session_knows_its_methods(sample_session: OnnxSession) -> None:
    with pytest.raises(UserError, match=r"there is no method 'best': choose one of ivc-prune, foreground, random"):
        sample_session.converse(method="best")
