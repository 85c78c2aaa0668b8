from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ivc_export.bundle import Bundle
from ivc_export.cli import check, export, run
from ivc_export.runtime.processor import open_picture
from samples.make_sample import make_checkpoint
from tests.conftest import SHAPES, Golden


def test_export_run_and_check_from_the_shell(
    sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, picture = str(tmp_path / "bundle"), tmp_path / "kept.png"
    assert export.main(["--model", str(sample_checkpoint), "--ratio", "0.5", "--output", bundle]) == 0
    message = capsys.readouterr().err
    assert "qwen2_vl, float32" in message and "not calibrated" in message and "at most 25% of the decoder" in message
    question = [bundle, "--image", str(SHAPES), "--prompt", "Where is the ring?", "--max-tokens", "5"]
    assert run.main([*question, "--show", str(picture)]) == 0
    text = capsys.readouterr().out
    assert open_picture(picture).width > 500
    assert run.main([*question, "--json", "--ratio", "0.25"]) == 0
    answer = json.loads(capsys.readouterr().out)
    visual = answer["visual_tokens"]
    assert (visual["total"], visual["kept"], visual["pruned"], visual["seed"]) == (192, 48, 144, 2)
    assert visual["seed"] + visual["ivc"] + visual["foreground"] == 48
    assert len(answer["tokens"]) == 5 and answer["ratio"] == 0.25 and answer["finish"] == "length"
    assert {"vision", "prefill.prefix", "prefill.decoder", "decode_per_token"} <= set(answer["milliseconds"])
    assert text.strip()
    assert check.main([bundle, "--against", str(sample_checkpoint), "--steps", "2"]) == 0
    assert "passed" in capsys.readouterr().out
    assert json.loads((tmp_path / "bundle" / "report" / "parity.json").read_text())["passed"] is True
    own = ["--image", str(SHAPES), "--prompt", "What?", "--steps", "1"]
    assert check.main([bundle, "--against", str(sample_checkpoint), *own]) == 0


def test_several_pictures_and_none(sample_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, picture = str(sample_bundle.folder), tmp_path / "two.png"
    both = ["--image", str(SHAPES), "--image", str(SHAPES), "--show", str(picture)]
    assert run.main([folder, "--prompt", "Compare.", "--max-tokens", "3", "--json", *both]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"]["kept"] == 192
    assert open_picture(picture).width > 1200
    assert run.main([folder, "--prompt", "Hello?", "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"]["total"] == 0


def test_a_chat_takes_another_picture_later(
    sample_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"What is it?\n/image {SHAPES}\n\nAnd here?\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    options = ["--chat", "--json", "--max-tokens", "3", "--image", str(SHAPES)]
    assert run.main([str(sample_bundle.folder), *options]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["visual_tokens"]["total"] for answer in answers] == [192, 192]
    assert answers[1]["cache"]["rows"] > answers[0]["cache"]["rows"] + 96


BAD: list[tuple[Any, list[str], str]] = [
    (export, ["--model", "nowhere"], "nowhere is not a folder"),
    (export, ["--model", "GOLDEN", "--ratio", "0"], "ratio 0.0 is out of range"),
    (export, ["--model", "GOLDEN", "--layer", "6", "--output", "TMP/b"], "--layer takes 1 to 5"),
    (run, ["BUNDLE"], "there is no question"),
    (run, ["TMP", "--prompt", "x"], "is not a bundle"),
    (run, ["BUNDLE", "--prompt", "x", "--image", "TMP/none.png"], "there is no picture at"),
    (run, ["BUNDLE", "--prompt", ""], "the prompt is empty"),
    (run, ["BUNDLE", "--prompt", "x", "--ratio", "nan"], "ratio nan is out of range"),
    (run, ["BUNDLE", "--prompt", "x", "--max-tokens", "0"], "max tokens 0 is out of range"),
    (run, ["BUNDLE", "--prompt", "x", "--show", "TMP/no/kept.png"], "does not exist"),
    (run, ["BUNDLE", "--prompt", "x", "--image", "PICTURE", "--show", "TMP/kept.nothing"], "cannot be written"),
    (run, ["GOLDEN_BUNDLE", "--prompt", "x"], "has no tokenizer.json and no chat_template.jinja"),
    (check, ["GOLDEN_BUNDLE", "--against", "TMP"], "transformers cannot load"),
    (check, ["BUNDLE", "--against", "GOLDEN", "--image", "PICTURE"], "give one with --prompt"),
]


@pytest.mark.parametrize(("module", "arguments", "sentence"), BAD, ids=[sentence for _, _, sentence in BAD])
def test_mistakes_cost_one_sentence_and_exit_code_2(
    golden: Golden,
    golden_bundle: Bundle,
    sample_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    arguments: list[str],
    sentence: str,
) -> None:
    places = {"GOLDEN_BUNDLE": golden_bundle.folder, "BUNDLE": sample_bundle.folder, "GOLDEN": golden.folder}
    places |= {"TMP": tmp_path, "PICTURE": SHAPES}

    def place(argument: str) -> str:
        first, slash, rest = argument.partition("/")
        return f"{places[first]}{slash}{rest}" if first in places else argument

    assert module.main([place(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) == 1


def test_check_without_torch_names_the_extra(
    golden: Golden, golden_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert check.main([str(golden_bundle.folder), "--against", str(golden.folder)]) == 2
    assert capsys.readouterr().err == "error: ivc-check needs torch and transformers: pip install 'ivc-export[check]'\n"


def test_check_exits_1_out_of_tolerance(
    sample_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sample_bundle.folder, folder)
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert check.main([str(folder), "--against", str(other), "--steps", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out
