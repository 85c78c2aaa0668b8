"""The model `ivc` of lmms-eval; what needs lmms-eval runs where it is installed (make eval)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.evaluate import __main__ as launcher
from ivc_export.evaluate import plugin
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.backends import open_session
from ivc_export.runtime.chat import Chat
from ivc_export.text.sampling import Sampling
from tests.conftest import SHAPES

ROOT = Path(__file__).parents[2]
RATIO, LAYER = 0.02, 1
"""At which some of the answers of the sample are wrong."""
TASKS = ("attribute", "relation", "counting", "grounding", "pointing", "reading")
QUESTION = "Where is the ring?"


def make_model(bundle: Bundle, more: str = "") -> Any:
    model = pytest.importorskip("ivc_export.evaluate.model", reason="lmms-eval is not installed: make eval")
    return model.BundleModel.create_from_arg_string(f"bundle={bundle.folder}{more}", {"batch_size": 1})


def told(*messages: tuple[str, object]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in messages]


def picture_and(text: str) -> list[dict[str, object]]:
    return [{"type": "image", "url": PIL.Image.open(SHAPES)}, {"type": "text", "text": text}]


def request(messages: list[dict[str, object]], **settings: object) -> SimpleNamespace:
    ask: Callable[[object], object] = lambda document: messages if document == "a document" else None  # noqa: E731
    return SimpleNamespace(args=("context", ask, settings, 0, "task", "test"))


def answers(model: Any, *requests: SimpleNamespace) -> list[str]:
    model.task_dict = {"task": {"test": ["a document"]}}
    return [found.text for found in model.generate_until(requests)]


@pytest.mark.parametrize(
    ("environment", "visible"),
    [
        ({"LOCAL_RANK": "3"}, "3"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}, "6"),
        ({"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "4,6"}, "4"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "GPU-ab"}, "GPU-ab"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": ""}, ""),
    ],
)
def test_each_process_sees_a_gpu_of_its_own(environment: dict[str, str], visible: str) -> None:
    launcher.take_gpu(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == visible and environment["ACCELERATE_USE_CPU"] == "true"


def test_the_entry_point_names_a_class_that_there_is() -> None:
    registry = SimpleNamespace(ModelManifest=lambda **given: given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib, "import_module", lambda name: registry)
        manifest = plugin.manifest()
    assert manifest["model_id"] == "ivc"
    module, _, name = manifest["chat_class_path"].rpartition(".")
    assert f"class {name}(lmms)" in (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def test_two_processes_answer_the_held_out_questions_as_our_own_evaluation_does(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make eval")
    from samples.lmms_eval.questions import write_questions
    from samples.spatial.held_out import LONGEST_ANSWER, held_out, scores

    write_questions(tmp_path / "demo" / "spatial-vl-questions.parquet", 3)
    recipe = ExportRecipe(ROOT / "samples" / "spatial-vl", tmp_path / "bundle", layer=LAYER)
    session = open_session(export(recipe), threads=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "ivc_export.evaluate", "--model", "ivc", "--batch_size", "1", "--tasks", "spatial_vl"]
    command += ["--model_args", f"bundle={tmp_path}/bundle,ratio={RATIO},threads=1", "--log_samples"]
    command += ["--include_path", str(ROOT / "samples" / "lmms_eval"), "--output_path", "results"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "results").rglob("*_results.json")
    (samples,) = (tmp_path / "results").rglob("*_samples_spatial_vl.jsonl")
    found = json.loads(results.read_text())["results"]["spatial_vl"]
    logged = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples.read_text().splitlines())}

    examples = held_out("test", 3)
    own = []
    for example in examples:
        chat = Chat(session, RATIO, sampling=Sampling(max_tokens=LONGEST_ANSWER))
        own.append("".join(chat.ask(example.question.text, [example.picture])))
    assert [logged[number] for number in range(len(examples))] == own
    accuracy = {task: score.accuracy for task, score in scores(examples, own).items()}
    assert 0 < accuracy["all"] < 1
    assert found["accuracy,none"] == pytest.approx(accuracy["all"], abs=1e-9)
    assert {task: found[f"{task},none"] for task in TASKS} == pytest.approx({t: accuracy[t] for t in TASKS}, abs=1e-9)


def test_a_question_is_asked_as_a_chat_asks_it(sample_bundle: Bundle) -> None:
    model = make_model(sample_bundle, ",ratio=0.4,method=foreground")
    chat = Chat(model.session, 0.4, sampling=Sampling(max_tokens=6), method="foreground")
    wanted = "".join(chat.ask(QUESTION, [SHAPES]))
    (found,) = answers(model, request(told(("user", picture_and(QUESTION))), max_new_tokens=6, until=["\n\n"]))
    assert found == wanted and found


def test_stops_draws_and_earlier_turns_of_a_task_are_minded(sample_bundle: Bundle) -> None:
    model = make_model(sample_bundle)
    asked = told(("user", picture_and(QUESTION)))
    (whole,) = answers(model, request(asked, max_new_tokens=8))
    (cut,) = answers(model, request(asked, max_new_tokens=8, until=whole[2:5]))
    assert cut == whole[: whole.index(whole[2:5])]
    draws = request(asked, max_new_tokens=8, do_sample=True, temperature=5.0, top_p=0.9)
    assert len(set(answers(model, draws, draws, draws))) > 1  # each repeat draws anew
    assert answers(model, draws, draws) == answers(model, draws, draws)
    later = [*told(("system", "Be brief.")), *asked, *told(("assistant", "There."), ("user", "Why?"))]
    (turn,) = answers(model, request(later, max_new_tokens=8))
    assert turn != whole


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "no bundle was given: add bundle=FOLDER to --model_args"),
        ("bundle=nowhere", "is not a bundle"),
        ("bundle=B,ratio=2", "2 is out of range"),
        ("bundle=B,ratio=half", "ratio=half is not a number: give a number in --model_args"),
        ("bundle=B,max_frames=2.5", "max_frames=2.5 is not a whole number"),
        ("bundle=B,threads=all", "threads=all is not a whole number"),
        ("bundle=B,method=luck", "luck"),
        ("bundle=B,backend=magic", "there is no backend magic: give one of"),
        ("bundle=B,speed=3", "onnxruntime-cpu takes no speed: leave it out"),
        ("bundle=B,batch_size=4", "ivc answers one question at a time: leave out --batch_size"),
        ("bundle=B,device=cuda:1", "leave out --device and give backend=NAME"),
    ],
)
def test_what_the_model_cannot_take_is_one_sentence(
    given: str, said: str, sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pytest.importorskip("ivc_export.evaluate.model", reason="lmms-eval is not installed: make eval")
    with pytest.raises(SystemExit) as caught:
        model.BundleModel.create_from_arg_string(given.replace("=B", f"={sample_bundle.folder}"), {})
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and said in line and line.count("\n") == 1


def test_processes_that_share_gpus_are_told_how_to_start(
    sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit):
        make_model(sample_bundle, ",backend=onnxruntime-cuda")
    assert "start them with torchrun -m ivc_export.evaluate instead of lmms-eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("messages", "settings", "said"),
    [
        ([("user", [{"type": "audio", "url": "x.wav"}])], {}, "ivc supports pictures and videos, not audio"),
        ([("user", [{"type": "image", "url": "no.png"}])], {}, "no.png"),
        ([("user", "Why?")], {"num_beams": 4}, "ivc has no beam search"),
        ([("user", "Why?")], {"do_sample": True, "temperature": -1}, "temperature -1.0 is out of range"),
    ],
)
def test_what_a_task_asks_in_vain_names_the_question(
    messages: list[tuple[str, object]],
    settings: dict[str, object],
    said: str,
    sample_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model(sample_bundle)
    with pytest.raises(SystemExit):
        answers(model, request(told(*messages), **settings))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: question 0 of task: ") and said in line


def test_likelihoods_and_rounds_are_refused(sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(sample_bundle)
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(SystemExit):
            ask([])
    assert "not likelihoods" in (said := capsys.readouterr().err) and "several rounds" in said
