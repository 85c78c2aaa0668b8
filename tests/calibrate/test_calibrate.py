from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.calibrate.sweep import (
    Case,
    Example,
    calibrate,
    default_examples,
    greedy_answer,
    layers_to_try,
    prompt_bundle,
    read_examples,
)
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.contract.calibration import Calibration, Rival, Trial, propose, read_calibration, shortfall, verdict
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.processor import Processor
from ivc_export.selection.method import Method
from ivc_export.verify.oracle import reference_picture
from ivc_export.verify.reference import Reference
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

MODEL = Path(__file__).parents[2] / "samples" / "spatial-vl"


def trial(layer: int, agreement: float, divergence: float, ratio: float = 0.5) -> Trial:
    return Trial(layer=layer, ratio=ratio, divergence=divergence, agreement=agreement, overlap=None, saved=0.2)


def test_the_lowest_layer_that_agrees_is_proposed_or_else_the_nearest() -> None:
    trials = [trial(1, 0.5, 0.3), trial(2, 0.99, 0.02), trial(3, 1.0, 0.01), trial(1, 1.0, 0.0, ratio=0.9)]
    assert propose(trials, 0.5) == 2
    assert propose(trials, 0.9) == 1
    assert propose(trials, 0.5, enough=1.0) == 3
    assert propose([trial(1, 0.5, 0.3), trial(2, 0.4, 0.2), trial(3, 0.5, 0.25)], 0.5) == 2


def test_layers_of_a_large_model_lie_in_its_middle() -> None:
    assert layers_to_try(range(1, 8)) == [1, 2, 3, 4, 5, 6, 7]
    found = layers_to_try(range(1, 28))
    assert found[0] == 7 and found[-1] == 21 and len(found) == 12


@pytest.fixture(scope="module")
def found() -> Calibration:
    return calibrate(MODEL, read_examples(default_examples())[:6], [0.5, 1.0], [1, 2, 3], tokens=4)


def test_keeping_everything_changes_nothing(found: Calibration) -> None:
    whole = [one for one in found.trials if one.ratio == 1.0]
    assert len(whole) == 3
    assert all(one.agreement == 1 and one.divergence < 1e-6 and one.saved == 0 for one in whole)
    assert [one.overlap for one in whole] == [None, 1.0, 1.0]


def test_pruning_costs_more_at_a_lower_layer_and_saves_more(found: Calibration) -> None:
    half = [one for one in found.trials if one.ratio == 0.5]
    assert half[0].divergence > half[2].divergence > 0
    assert half[0].saved > half[1].saved > half[2].saved > 0
    assert all(one.overlap is not None and 0.3 < one.overlap <= 1 for one in half[1:])
    assert found.layer == propose(found.trials, 0.5)


def test_other_methods_stand_beside_the_proposed_layer(found: Calibration) -> None:
    foreground, random = found.rivals
    assert (foreground.method, foreground.draws, foreground.divergence_spread) == ("foreground", 1, 0)
    assert (random.method, random.draws) == ("random", 5) and random.divergence_spread > 0
    own = next(one for one in found.trials if (one.layer, one.ratio) == (found.layer, 0.5))
    for rival in found.rivals:
        assert (rival.layer, rival.ratio) == (found.layer, 0.5)
        assert rival.divergence > 0 and rival.divergence != own.divergence
    assert Calibration.model_validate_json(found.model_dump_json()) == found


def test_any_method_is_swept_and_compared_at_any_layers() -> None:
    example, seen = read_examples(default_examples())[0], list[tuple[int, int]]()
    given = {
        "progress": lambda done, total: seen.append((done, total)),
        "compare": "all",
        "method": Method("random", 4),
    }
    found = calibrate(MODEL, [example], [0.5], [2, 3], 1, **given)  # type: ignore[arg-type]
    assert (found.method, found.method_seed) == ("random", 4)
    assert [(rival.method, rival.layer) for rival in found.rivals] == [("foreground", 2), ("foreground", 3)]
    assert seen == [(done, 6) for done in range(1, 7)] and verdict(found) is None


def test_what_is_scored_is_compared_where_the_official_code_scores_no_values(tmp_path: Path) -> None:
    checkpoint, (example,) = (
        make_checkpoint(tmp_path / "c", TINY["internvl_chat"]),
        read_examples(default_examples())[:1],
    )
    for scored, other in ((None, "values"), ("values", "unnormed-values")):
        given: Any = {"compare": "proposed", "method": Method("foreground"), "scored": scored}
        found = calibrate(checkpoint, [example], [0.5], [2], 1, **given)
        assert found.scored == scored
        assert [rival.name for rival in found.rivals] == ["random", f"foreground by {other}"]
        assert found.rivals[1].divergence != found.trials[0].divergence
        path = tmp_path / "calibration.json"
        path.write_text(found.model_dump_json())
        bundle = export(ExportRecipe(checkpoint, tmp_path / "b", calibration=path, force=True))
        assert bundle.manifest.calibrated
        assert bundle.manifest.selection.scored == (scored or "unnormed-values")


def compared(agreement: float, mean: float, spread: float, layer: int = 2) -> tuple[Trial, Rival]:
    figures: Any = {"divergence": 0.1, "divergence_spread": 0.1, "agreement": mean, "agreement_spread": spread}
    return trial(layer, agreement, 0.1), Rival(method="random", layer=layer, ratio=0.5, draws=5, **figures)


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        (
            [compared(0.9, 0.9, 0.0)],
            "makes no difference at layer 2, ratio 0.5: the fraction of unchanged answers of ivc-prune is within 2",
        ),
        ([compared(0.9, 0.8, 0.06)], "makes no difference at layer 2,"),
        ([compared(0.9, 0.8, 0.04)], "makes a difference at layer 2,"),
        ([compared(0.7, 0.8, 0.04)], "answers of ivc-prune is not within 2 standard deviations of random's"),
        (
            [compared(0.9, 0.5, 0.1), compared(0.9, 0.9, 0.1, 3), compared(1, 1, 0, 4)],
            "no difference at layers 3, 4,",
        ),
        ([], None),
    ],
)
def test_the_verdict_says_where_chance_does_as_well(
    cases: list[tuple[Trial, Rival]], words: str | None, found: Calibration
) -> None:
    changes = {"trials": tuple(one for one, _ in cases), "rivals": tuple(rival for _, rival in cases)}
    said = verdict(found.model_copy(update=changes))
    assert (said is None) if words is None else (said is not None and words in said)


@pytest.mark.parametrize(("enough", "reached"), [(0.8, True), (0.81, False)])
def test_a_layer_that_falls_short_is_told(found: Calibration, enough: float, reached: bool) -> None:
    trials = (trial(2, 0.7, 0.2), trial(3, 0.8, 0.1))
    layer = propose(trials, 0.5, enough)
    said = shortfall(found.model_copy(update={"trials": trials, "layer": layer, "ratio": 0.5}), enough)
    assert (said is None) == reached
    assert said is None or ("no layer keeps 0.81 of the answers at ratio 0.5: layer 3" in said and "keeps 0.8;" in said)


def test_divergence_is_that_of_bundles(tmp_path: Path) -> None:
    """Measured again on onnxruntime: the first token's distribution, and one more."""
    example = read_examples(default_examples())[3]
    (measured,) = calibrate(MODEL, [example], [0.4], [2], tokens=2, compare="none").trials
    bundle = export(ExportRecipe(MODEL, tmp_path / "bundle", layer=2, dtype="float32"))
    processor, session = Processor(bundle), OnnxSession(bundle)
    picture = processor.picture(example.picture)
    prompt = processor.question(example.prompt, [picture])
    logs, token = [], 0
    for ratio in (1.0, 0.4):
        conversation = HostConversation(session, ratio)
        first = conversation.run(prompt, [picture]).logits
        token = int(first.argmax()) if ratio == 1.0 else token
        logs.append(torch.from_numpy(np.stack([first, conversation.run([token]).logits])).log_softmax(-1))
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert measured.divergence == pytest.approx(divergence, abs=1e-4)


def test_the_command_writes_a_file_that_an_export_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    read_examples(default_examples())[0].picture.save(data / "a.png")
    (data / "prompts.json").write_text('[{"picture": "a.png", "prompt": "What color is the heart?"}]')
    options = ["--model", str(MODEL), "--data", str(data), "--layer", "3", "--tokens", "1"]
    assert cli.ivc_calibrate(options) == 0
    printed = capsys.readouterr()
    assert "layer 3 is proposed" in printed.err and "prefill saved" in printed.out
    assert "difference at layer 3, ratio 0.5: the fraction of unchanged answers of ivc-prune is" in printed.err
    assert "foreground" in printed.out and "random, 5 draws" in printed.out
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert read_calibration(tmp_path / "calibration.json").layer == 3
    export_options = ["--model", str(MODEL), "--calibration", "calibration.json", "--output", "b", "--weights", "link"]
    assert cli.ivc_export(export_options) == 0
    manifest = Bundle.load(tmp_path / "b").manifest
    assert manifest.selection_layer == 3 and manifest.calibrated
    assert cli.ivc_calibrate(options) == 2 and "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "prompts.json is missing"),
        (["--data", "damaged"], "prompts.json is damaged"),
        (["--data", "empty"], "has no examples"),
        (["--data", "gone"], "there is no picture at"),
        (["--ratio", "1.5"], "ratio 1.5 is out of range"),
        (["--layer", "8"], "layers 8 to 8 are out of range"),
        (["--tokens", "0"], "--tokens 0 is out of range: give 1 or more"),
        (["--method-seed", "1"], "--method-seed works only with --method random: leave it out with ivc-prune"),
        (["--agreement", "nan"], "agreement nan is out of range: give 0 to 1"),
        (["--output", "no/calibration.json"], "the folder of no/calibration.json does not exist"),
        (["--output", "empty", "--force"], "empty is a folder"),
        (["--output", "plot.png"], "plot.png is the plot's name: give the file another one, such as plot.json"),
        (["--output", "mine.json"], "mine.png exists"),
    ],
)
def test_mistakes_cost_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {"damaged": "{", "empty": "[]", "gone": '[{"picture": "no.png", "prompt": "What?"}]'}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.json").write_text(content)
    (tmp_path / "mine.png").write_text("a picture")
    assert cli.ivc_calibrate(["--model", str(MODEL), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not (tmp_path / "calibration.json").exists()


def test_a_calibration_of_another_model_is_refused(found: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(UserError, match=r"calibration\.json is missing: write a calibration with ivc-calibrate"):
        read_calibration(path)
    path.write_text(json.dumps({"layer": 2}))
    with pytest.raises(UserError, match="is not a calibration"):
        read_calibration(path)
    other = found.model_copy(update={"decoder": found.decoder.model_copy(update={"layers": 28})})
    path.write_text(other.model_dump_json())
    with pytest.raises(UserError, match="is the calibration of another model"):
        export(ExportRecipe(MODEL, tmp_path / "b", calibration=path))
    with pytest.raises(UserError, match="both a layer and a calibration"):
        ExportRecipe(MODEL, tmp_path / "b", layer=2, calibration=path)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (8, "proposes layer 8, but this model of 8 layers takes 1 to 7: calibrate it again with ivc-calibrate"),
        (99, "proposes layer 99, but this model of 8 layers takes 1 to 7"),
        (10**30, "proposes layer 1000000000000000000000000000000, but this model of 8 layers takes"),
        (0, "calibration.json is not a calibration (layer"),
        (None, "calibration.json is not a regular file: write a calibration with ivc-calibrate"),
    ],
    ids=["all layers", "no layer", "a huge one", "none", "a pipe"],
)
@pytest.mark.parametrize("mode", ["--dry-run", "--quiet"])
def test_a_calibrations_layer_is_checked_as_the_options(
    found: Calibration, tmp_path: Path, layer: int | None, sentence: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calibration.json"
    if layer is None:
        os.mkfifo(path)
    else:
        path.write_text(found.model_copy(update={"layer": layer}).model_dump_json())
    arguments = ["--model", str(MODEL), "--calibration", str(path), "--output", str(tmp_path / "b"), mode]
    assert cli.ivc_export(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_default_set_is_complete() -> None:
    examples = read_examples(default_examples())
    assert len(examples) == 24 and all(isinstance(example, Example) and example.prompt for example in examples)


def test_kept_rows_are_those_of_visual_tokens_alone() -> None:
    example, checkpoint = read_examples(default_examples())[0], Checkpoint.open(MODEL)
    with prompt_bundle(checkpoint) as bundle:
        processor, m = Processor(bundle), bundle.manifest
        picture = processor.picture(example.picture)
        prompt = processor.question(example.prompt, [picture])
        reference, given = Reference(MODEL, 1, 1.0, m.selection), reference_picture(bundle, picture)
        base = greedy_answer(reference, prompt, given, m.tokens.stop, 1)
        found = base.compare(reference, prompt, given, Case(0.5, 2), m.tokens.image)
    assert len(found.kept) == round(0.5 * picture.grid.visual)
    assert all(prompt[row] == m.tokens.image for row in found.kept)
