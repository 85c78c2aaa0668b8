from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process as official

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.runtime.processor import Processor, user_message
from ivc_export.text.sampling import (
    DRAWN,
    GENERATION_CONFIG,
    Sampler,
    Sampling,
    checkpoint_sampling,
    greedy_note,
    stored_sampling,
)
from tests.conftest import SHAPES


@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.7, 0.8])
@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 20, 500])
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.95, 1.0])
def test_distributions_equal_transformers(penalty: float, temperature: float, top_k: int, top_p: float) -> None:
    generator = np.random.default_rng(7)
    logits = generator.normal(0, 3, 200).astype(np.float32)
    if top_p == 1:
        logits[[3, 50]] = logits.max()  # a tie for the best, which top-k keeps; of two, top-p keeps either
    seen = [int(i) for i in generator.integers(0, 200, 60)]
    wanted = torch.tensor(logits[None])
    for processor in (
        official.RepetitionPenaltyLogitsProcessor(penalty),
        official.TemperatureLogitsWarper(temperature),
        *([official.TopKLogitsWarper(top_k)] if top_k else []),
        *([official.TopPLogitsWarper(top_p)] if top_p < 1 else []),
    ):
        wanted = processor(torch.tensor([seen]), wanted)
    found = Sampling(temperature, top_p, top_k=top_k, repetition_penalty=penalty).scores(logits, seen)
    np.testing.assert_array_equal(np.isfinite(found), torch.isfinite(wanted[0]).numpy())
    np.testing.assert_allclose(
        torch.tensor(found).softmax(0).numpy(), wanted[0].double().softmax(0).numpy(), rtol=1e-3, atol=1e-9
    )


def test_draws_come_from_the_nucleus() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for top_p, allowed in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        sampler = Sampler(Sampling(temperature=1.0, top_p=top_p))
        assert {sampler.draw(logits) for _ in range(400)} == allowed
    sampler = Sampler(Sampling(temperature=1.0))
    draws = [sampler.draw(logits) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert Sampler().draw(logits) == 0
    assert Sampler(Sampling(temperature=1e-310)).draw(logits) == 0


@pytest.mark.parametrize("penalty", [1e-3, 1e3])
@pytest.mark.parametrize("temperature", [1e-310, 1e300])
def test_extreme_settings_draw_a_token(penalty: float, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature, 0.9, top_k=2, repetition_penalty=penalty))
    sampler.read([0, 3])
    assert sampler.draw(np.array([3e38, -3e38, 1.0, -3e38], np.float32)) in range(4)


def test_a_penalty_counts_the_prompt_and_the_answer_also_where_the_best_is_taken() -> None:
    logits = np.array([3.0, 2.9, 2.8, -1.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    sampler.read([0])
    assert [sampler.draw(logits) for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"max_tokens": 0}, "max tokens"),
        ({"seed": -1}, "seed"),
        ({"top_k": -1}, "top-k"),
        ({"repetition_penalty": 0.0}, "repetition penalty"),
        ({"repetition_penalty": float("inf")}, "repetition penalty"),
        ({"repetition_penalty": 1e-308}, "repetition penalty"),
    ],
)
def test_sampling_out_of_range(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Sampling(**values)  # type: ignore[arg-type]


def test_what_a_checkpoint_leaves_out_is_as_in_transformers() -> None:
    defaults = transformers.GenerationConfig()._get_default_generation_params()
    assert {key: defaults[key] for key in DRAWN} == DRAWN == stored_sampling({"do_sample": True})
    assert stored_sampling({}) == stored_sampling({"temperature": 0.6, "top_k": 5, "repetition_penalty": 1.0}) == {}
    published = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05}
    assert stored_sampling(published) == {k: v for k, v in published.items() if k != "do_sample"}


@pytest.mark.parametrize(
    ("config", "chosen", "told"),
    [
        ({}, (), None),
        ({"do_sample": False, "temperature": 0.2, "num_beams": 1}, (), None),
        ({"repetition_penalty": 1.05}, (), "sets repetition_penalty 1.05, but answers are greedy"),
        ({"repetition_penalty": 1.05}, ("repetition_penalty",), None),
        ({"do_sample": True, "top_k": 1, "temperature": 0.1}, (), None),  # the best is all that can be drawn
        ({"do_sample": True}, ("top_p",), "sets temperature 1.0, top_k 50, but answers"),
        ({"num_beams": 4}, (), "sets num_beams 4, but answers"),
    ],
)
def test_what_greedy_answers_leave_out_is_said(
    config: dict[str, Any], chosen: tuple[str, ...], told: str | None
) -> None:
    note = greedy_note(config, chosen)
    assert note is None if told is None else note is not None and told in note


@pytest.fixture
def penalised(sample_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle whose checkpoint asks for a penalty."""
    shutil.copytree(sample_bundle.folder, tmp_path / "bundle")
    (tmp_path / "bundle" / GENERATION_CONFIG).write_text(json.dumps({"repetition_penalty": 1.3}))
    return Bundle(tmp_path / "bundle", sample_bundle.manifest)


def test_the_command_answers_as_transformers_does(
    penalised: Bundle, sample_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedily with a penalty over the prompt, image tokens included, and the answer."""
    processor = Processor(penalised)
    picture = processor.picture(SHAPES)
    ids = torch.tensor([processor.encode(processor.render([user_message("Where is it?", 1)]), [picture])])
    inputs = {"pixel_values": torch.tensor(picture.inputs["pixel_values"][0])}
    inputs["image_grid_thw"] = torch.tensor([(1, 2 * picture.grid.rows, 2 * picture.grid.columns)])
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(sample_checkpoint)

    def stock(penalty: float) -> list[int]:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 503).int()}
        out = model.generate(**given, **inputs, max_new_tokens=12, repetition_penalty=penalty, do_sample=False)
        return [int(token) for token in out[0, ids.shape[1] :]]

    def ours(*options: str) -> tuple[list[int], str]:
        arguments = [str(penalised.folder), "--image", str(SHAPES), "--prompt", "Where is it?", "--ratio", "1"]
        assert cli.ivc_run([*arguments, "--max-tokens", "12", "--json", *options]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["tokens"], err

    assert stock(1.3) != stock(1.0)
    capsys.readouterr()
    assert ours("--sampling", "checkpoint") == ours("--repetition-penalty", "1.3") == (stock(1.3), "")
    assert ours("--sampling", "greedy") == (stock(1.0), "")
    tokens, note = ours()
    assert tokens == stock(1.0) and note.count("repetition_penalty 1.3") == 1 and len(note.splitlines()) == 1
    assert ours("--sampling", "checkpoint", "--repetition-penalty", "1") == (stock(1.0), "")


def test_a_program_can_take_the_checkpoints_sampling(penalised: Bundle, tmp_path: Path) -> None:
    assert checkpoint_sampling(penalised.folder, max_tokens=5) == Sampling(max_tokens=5, repetition_penalty=1.3)
    assert checkpoint_sampling(penalised.folder, repetition_penalty=1.0) == Sampling()
    with pytest.raises(UserError, match="is missing, so the checkpoint's sampling is not known"):
        checkpoint_sampling(tmp_path)


@pytest.mark.parametrize("options", [["--quiet"], ["--json"], []], ids=str)
def test_the_export_says_what_greedy_answers_leave_out(
    sample_checkpoint: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sample_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / GENERATION_CONFIG).write_text(json.dumps({"repetition_penalty": 1.05}))
    arguments = ["--model", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "bundle")]
    assert cli.ivc_export([*arguments, *options]) == 0
    out, err = capsys.readouterr()
    assert (out if options == ["--json"] else err).count("sets repetition_penalty 1.05") == 1
