from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ivc_export import families
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.chat import Chat, Sampling
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from samples import evaluate
from samples.spatial import train as training
from samples.spatial.batches import Batch, Batches, frame, normalise
from samples.spatial.checkpoint import FILES, load_network
from samples.spatial.held_out import LONGEST_ANSWER, Answering, Pruning, held_out, scale, scores
from samples.spatial.language import word_tokenizer
from samples.spatial.learning import Probe, loss_of, orthogonal
from samples.spatial.network import CONFIG, patches_of
from samples.spatial.pruning import METHODS
from samples.spatial.questions import TASKS, Question, is_correct
from samples.spatial.stock import StockAnswers

MODEL = Path(__file__).parents[2] / "samples" / "spatial-vl"


@pytest.fixture(scope="module")
def answering() -> Answering:
    return Answering(load_network(MODEL), word_tokenizer(), batch=16)


def test_the_checkpoint_is_small_and_has_the_files_that_its_code_writes() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 16_000_000
    for name, content in FILES.items():
        assert json.loads((MODEL / name).read_text(encoding="utf-8")) == content
    stored = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert stored.get_vocab() == word_tokenizer().get_vocab()


def test_its_network_is_qwen2_vl() -> None:
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    network, generator = load_network(MODEL), torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 8 * 28, 10 * 28, generator=generator)
    frames = patches_of(pixels)[0].view(-1, 3, 1, 14, 14).repeat(1, 1, 2, 1, 1).flatten(1)
    embeds, positions = torch.randn(1, 30, 256, generator=generator), torch.arange(30).expand(3, 1, -1)
    visible = torch.ones(30, 30, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        wanted = torch.cat(list(model.model.get_image_features(frames, torch.tensor([[1, 16, 20]])).pooler_output))
        torch.testing.assert_close(network.visual(pixels)[0], wanted, atol=1e-4, rtol=1e-4)
        wanted = model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        torch.testing.assert_close(network(embeds, positions, lambda _: visible), wanted, atol=1e-4, rtol=1e-4)


def test_questions_are_about_what_is_drawn() -> None:
    examples = held_out("test", 4)
    assert [example.question.task for example in examples] == list(TASKS) * 4
    for example in examples:
        plain = example.question.answer.replace("<|box_start|>", "").replace("<|box_end|>", "")
        assert is_correct(example.question, plain)
        assert not is_correct(example.question, "(0,0),(1,1)")
        assert 64 <= np.prod(example.grid) <= 256
    again = held_out("test", 1)
    assert [example.question for example in again] == [example.question for example in examples[:6]]
    assert {e.question.text for e in held_out("calibration", 4)} != {e.question.text for e in examples}


def test_a_box_counts_from_half_an_overlap_on() -> None:
    question = Question("grounding", "Find it.", "", (100, 100, 200, 200))
    assert is_correct(question, "(100,100),(200,150)")
    assert not is_correct(question, "(100,100),(200,149)")
    assert not is_correct(question, "(100,100)") and not is_correct(question, "no") and not is_correct(question, "")
    pointing = Question("pointing", "Point to it.", "", (100, 100, 200, 200))
    assert is_correct(pointing, "(200,100)") and not is_correct(pointing, "(201,100)")


def test_pictures_are_scaled_as_a_bundle_scales_them() -> None:
    family, preprocessor = families.of("qwen2_vl"), FILES["preprocessor_config.json"]
    pictures = family.read(CONFIG, preprocessor).encoder.pictures
    for example in held_out("calibration", 2):
        rows, columns = example.grid
        wanted = pictures.picture(example.picture, 0)
        assert (wanted.grid.rows, wanted.grid.columns) == (rows, columns)
        pixels = normalise(torch.from_numpy(scale(example.picture, rows, columns)[None]))
        frames = patches_of(pixels)[0].view(-1, 3, 1, 196).repeat(1, 1, 2, 1).flatten(1)
        np.testing.assert_allclose(frames.numpy(), wanted.inputs["pixel_values"][0], atol=1e-6)


def test_labels_name_what_a_token_shows() -> None:
    batch = Batches(word_tokenizer().to_str(), 2, 10, seed=0)[3]
    rows, columns = (side // 28 for side in batch.pixels.shape[1:3])
    assert batch.shown.shape[:2] == batch.box.shape[:2] == (2, rows * columns)
    inside = batch.shown[..., 1] >= 0
    assert 0.02 < inside.float().mean() < 0.9
    row, column = (torch.from_numpy(part.ravel().copy()) for part in np.indices((rows, columns)))
    middle = torch.stack([(column + 0.5) / columns, (row + 0.5) / rows], dim=-1)
    slack = torch.tensor([1 / columns, 1 / rows])
    near = (middle >= batch.box[..., :2] - slack) & (middle <= batch.box[..., 2:] + slack)
    assert bool(near[inside].all())


def test_branches_do_not_see_each_other() -> None:
    """The loss of two conversations about a picture is the mean of their losses alone."""
    batch = Batches(word_tokenizer().to_str(), 1, 10, seed=0)[1]
    network, shared = load_network(MODEL), frame(word_tokenizer())
    probe = Probe(CONFIG["hidden_size"])
    parts = []
    with torch.no_grad():
        for branch in (0, 1):
            one = Batch(**{**vars(batch), "weight": batch.weight * (batch.branch == branch)})
            alone = vars(one).copy()
            rows = batch.branch[0] == branch
            for name in ("tokens", "branch", "offset", "weight", "late"):
                alone[name] = alone[name][:, rows]
            together = loss_of(network, probe, one, shared, hide=False)[0]
            parts.append((together, loss_of(network, probe, Batch(**alone), shared, hide=False)[0]))
    for together, alone_loss in parts:
        torch.testing.assert_close(together, alone_loss, atol=1e-5, rtol=1e-4)


def test_the_trained_model_answers(answering: Answering) -> None:
    examples = held_out("test", 3)
    images = answering.encode(examples)
    assert scores(examples, answering.answer(examples, images))["all"].right >= 17
    whole = answering.converse(examples, images, None)
    for name, rank in METHODS.items():
        kept = answering.converse(examples, images, Pruning(0 if "DART" in name else 2, 1.0, rank))
        assert kept == whole, f"{name} keeps everything at ratio 1"


def test_orthogonal_matrices() -> None:
    matrices = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonal(matrices))
    assert bool(((singular > 0.6) & (singular < 1.3)).all())
    torch.testing.assert_close(orthogonal(matrices.mT), orthogonal(matrices).mT)


def test_a_resumed_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def train(folder: Path, **options: object) -> dict[str, torch.Tensor]:
        defaults = {"output": folder, "start": None, "steps": 2, "batch": 1, "rate": 1e-3, "workers": 0, "seed": 3}
        defaults |= {"every": 1, "exam": 1, "stop_after": 1e9, "compile": False}
        training.train(argparse.Namespace(**(defaults | options)))
        done = folder / "model.safetensors"
        return load_file(done) if done.exists() else {}

    whole = train(tmp_path / "whole")
    assert not train(tmp_path / "parts", stop_after=0)
    parts = train(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    second = train(tmp_path / "second", start=tmp_path / "whole", steps=1)
    assert any(not torch.equal(whole[name], second[name]) for name in whole)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_masked_batches_bundles_and_stock_transformers_answer_alike(
    ratio: float, answering: Answering, tmp_path: Path
) -> None:
    bundle = export(ExportRecipe(MODEL, tmp_path / "bundle", layer=2, dtype="float32"))
    session, stock = OnnxSession(bundle), StockAnswers(MODEL, bundle, ratio)
    examples = held_out("test", 1)
    masked = answering.converse(examples, answering.encode(examples), Pruning(2, ratio, METHODS["IVC-Prune"]))
    for number, example in enumerate(examples):
        chat = Chat(session, ratio, sampling=Sampling(max_tokens=LONGEST_ANSWER), follow_up="compacted")
        found = ["".join(chat.ask(example.question.text, [example.picture]))]
        found.append("".join(chat.ask(example.second.text)))
        assert found == [masked[0][number], masked[1][number]]
        assert found[0] == stock.answer(example)


def test_evaluation_writes_what_it_found(tmp_path: Path) -> None:
    options = argparse.Namespace(model=MODEL, output=tmp_path, calibration=1, test=1)
    evaluate.evaluate_methods(options)
    found = json.loads((tmp_path / "spatial-vl-pruning.json").read_text(encoding="utf-8"))
    assert found["test_questions"] == 6 and set(found["methods"]) == {"none", *METHODS}
    assert found["methods"]["none"]["1.0"]["first"]["all"]["accuracy"] > 0.8
    assert 1 <= found["layer"] <= 7
