from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.runtime.pictures import open_picture
from samples.make_sample import make_checkpoint
from tests.conftest import SHAPES, Golden


def test_export_run_and_check_from_the_shell(
    sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, picture = str(tmp_path / "bundle"), tmp_path / "kept.png"
    assert cli.ivc_export(["--model", str(sample_checkpoint), "--ratio", "0.5", "--output", bundle]) == 0
    message = capsys.readouterr().err
    assert (
        "qwen2_vl, float32" in message
        and "the selection layer is not calibrated for this model" in message
        and "the others keep 500 of the 999 visual tokens" in message
    )
    question = [bundle, "--image", str(SHAPES), "--prompt", "Where is the ring?", "--max-tokens", "5"]
    assert cli.ivc_run([*question, "--show", str(picture)]) == 0
    text = capsys.readouterr().out
    assert open_picture(picture).width > 500
    assert cli.ivc_run([*question, "--json", "--ratio", "0.25"]) == 0
    answer = json.loads(capsys.readouterr().out)
    visual = answer["visual_tokens"]
    assert (visual["total"], visual["kept"], visual["pruned"], visual["seed"]) == (192, 48, 144, 2)
    assert visual["seed"] + visual["ivc"] + visual["foreground"] == 48
    assert len(answer["tokens"]) == 5 and answer["ratio"] == 0.25 and answer["finish"] == "length"
    assert {"vision", "prefill.prefix", "prefill.decoder", "decode_per_token"} <= set(answer["milliseconds"])
    assert text.strip()
    assert cli.ivc_check([bundle, "--against", str(sample_checkpoint), "--steps", "2"]) == 0
    assert "passed" in capsys.readouterr().out
    assert json.loads((tmp_path / "bundle" / "report" / "parity.json").read_text())["passed"] is True
    own = ["--image", str(SHAPES), "--prompt", "What?", "--steps", "1"]
    assert cli.ivc_check([bundle, "--against", str(sample_checkpoint), *own]) == 0


def test_several_pictures_and_none(sample_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, picture = str(sample_bundle.folder), tmp_path / "two.png"
    both = ["--image", str(SHAPES), "--image", str(SHAPES), "--show", str(picture)]
    assert cli.ivc_run([folder, "--prompt", "Compare.", "--max-tokens", "3", "--json", *both]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"]["kept"] == 192
    assert open_picture(picture).width > 1200
    assert cli.ivc_run([folder, "--prompt", "Hello?", "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"]["total"] == 0


@pytest.mark.parametrize(("follow_up", "totals"), [([], [192, 384]), (["--follow-up", "compacted"], [192, 192])])
def test_a_chat_takes_another_picture_later(
    follow_up: list[str],
    totals: list[int],
    sample_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = f"What is it?\n/image {SHAPES}\n\nAnd here?\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    options = ["--chat", "--json", "--max-tokens", "3", "--image", str(SHAPES), *follow_up]
    assert cli.ivc_run([str(sample_bundle.folder), *options]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["visual_tokens"]["total"] for answer in answers] == totals
    assert [len(answer["pictures"]) for answer in answers] == [total // 192 for total in totals]
    assert answers[1]["cache"]["rows"] > answers[0]["cache"]["rows"] + 96


BAD: list[tuple[list[str], str]] = [
    (["GOLDEN_BUNDLE", "--against", "TMP"], "has no config.json"),
    (["GOLDEN_BUNDLE", "--against", "SAMPLE"], "differs from that of"),
    (["GOLDEN_BUNDLE", "--against", "GOLDEN", "--steps", "-3"], "-3 decode steps"),
    (["BUNDLE", "--against", "GOLDEN", "--image", "PICTURE"], "give one with --prompt"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_mistakes_cost_check_one_sentence_and_exit_code_2(
    golden: Golden,
    golden_bundle: Bundle,
    sample_bundle: Bundle,
    sample_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    places = {"GOLDEN_BUNDLE": golden_bundle.folder, "BUNDLE": sample_bundle.folder, "GOLDEN": golden.folder}
    places |= {"TMP": tmp_path, "PICTURE": SHAPES, "SAMPLE": sample_checkpoint}
    assert cli.ivc_check([str(places.get(argument, argument)) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert len(message.strip().splitlines()) == 1


def test_check_without_torch_names_the_extra(
    golden: Golden, golden_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.ivc_check([str(golden_bundle.folder), "--against", str(golden.folder)]) == 2
    assert (
        capsys.readouterr().err
        == "error: ivc-check --against needs torch and transformers: install ivc-export[check], "
        "or use --onnx-only on a bundle that was checked on another machine\n"
    )


def test_check_exits_1_out_of_tolerance(
    sample_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sample_bundle.folder, folder)
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert cli.ivc_check([str(folder), "--against", str(other), "--steps", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_markup_and_emoji_in_paths_are_printed_as_they_are(
    sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x[red]:smile:"
    assert cli.ivc_export(["--model", str(sample_checkpoint), "--output", str(output)]) == 0
    assert "x[red]:smile:" in capsys.readouterr().err
    assert cli.ivc_check([str(output), "--against", str(sample_checkpoint), "--steps", "0"]) == 0
    assert "x[red]:smile:" in capsys.readouterr().out


def test_a_checkpoint_without_processor_files_warns(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.ivc_export(["--model", str(golden.folder), "--output", str(tmp_path / "b")]) == 0
    message = capsys.readouterr().err
    for name in ("tokenizer.json", "preprocessor_config.json", "end-of-sequence"):
        assert name in message


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_interruptions_and_full_disks_have_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr("ivc_export.cli.export.command", fail)
    assert cli.ivc_export([]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "options"), [("ivc_run", ["--prompt", "Where?", "--max-tokens", "400"]), ("ivc_check", ["--weights"])]
)
def test_a_reader_that_left_ends_the_command_quietly(command: str, options: list[str], sample_bundle: Bundle) -> None:
    program = (
        "import os, sys; from ivc_export import cli; r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r); "
        f"sys.exit(cli.{command}(sys.argv[1:]))"
    )
    arguments = [str(sample_bundle.folder), *options]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_file_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.check_output(tmp_path / "new.json")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=r"new\.json cannot be written: check its permissions"):
        cli.check_output(tmp_path / "new.json")


@pytest.mark.parametrize(
    ("options", "closed", "code", "said"),
    [
        (["--chat"], 0, 2, "error: --chat reads questions from standard input, which is closed"),
        (["--prompt", "Where?", "--max-tokens", "1"], 1, 0, ""),
    ],
)
def test_closed_streams_end_in_no_traceback(
    options: list[str], closed: int, code: int, said: str, sample_bundle: Bundle
) -> None:
    program = "import sys; from ivc_export import cli; sys.exit(cli.ivc_run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, str(sample_bundle.folder), *options]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(closed))
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_question_that_is_no_text_is_one_sentence(sample_bundle: Bundle) -> None:
    program = "import sys; from ivc_export import cli; sys.exit(cli.ivc_run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, str(sample_bundle.folder), "--chat"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"caf\xe9?\n", capture_output=True, env=strict)
    assert (done.returncode, done.stderr) == (2, b"error: the prompt is not UTF-8 text: write it in UTF-8\n")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "the machine has too little memory: close other programs, or use a smaller model or picture"),
        (RecursionError(), "a file is nested too deeply to be read: download or create it again"),
        (UserError("two\nlines of \x1b[31mred\x07: \u202emend"), "two lines of  [31mred :  mend"),
        (UserError("a" * 9999 + ": mend it"), f"{'a' * 500} ... {'a' * 491}: mend it"),
    ],
)
def test_whatever_fails_is_told_on_one_line(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: object) -> None:
        raise error

    monkeypatch.setattr(Bundle, "load", fail)
    assert cli.ivc_run(["bundle", "--prompt", "Where?"]) == 2
    assert capsys.readouterr().err == f"error: {told}\n"
