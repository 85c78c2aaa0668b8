"""Qwen3-VL: what it adds to the other families, against stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from ivc_export import families
from ivc_export.bench.peers import TorchPeer, load
from ivc_export.bench.prompts import Prompt
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.recording import Key, Recording
from ivc_export.calibrate.sweep import Example, calibrate
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.cli import ivc_export as command
from ivc_export.contract.manifest import RotarySizes
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid, Visual
from ivc_export.graph.rotary import rotary_frequencies
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.source.configuration import read_description
from ivc_export.verify.oracle import record
from ivc_export.verify.parity import check, compare
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import LOGIT_TOLERANCE

FAMILY = families.of("qwen3_vl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3") / "checkpoint", TINY["qwen3_vl"])


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    return export(ExportRecipe(checkpoint, checkpoint.with_name("bundle"), max_visual=400))


def picture(bundle: Bundle, width: int, height: int) -> Visual:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return families.preparation(bundle.manifest).picture(PIL.Image.fromarray(noise), 503)


def shown(one: Visual) -> list[int]:
    return [500, *one.tokens, 501]


@pytest.mark.parametrize("capacity", [None, 512], ids=["exact-length", "fixed-capacity"])
def test_unpruned_logits_equal_stock_transformers(bundle: Bundle, checkpoint: Path, capacity: int | None) -> None:
    """All turns so far at once, by the whole stock model: pictures that are not square, two of them, one of one row."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    flat, wide, high = picture(bundle, 320, 30), picture(bundle, 300, 130), picture(bundle, 90, 260)
    assert flat.grid == Grid(1, 10) and wide.grid == Grid(4, 9) and high.grid == Grid(8, 3)
    turns: list[tuple[list[int], list[Visual]]] = [
        ([1, 2, *shown(wide), 3, *shown(flat), 4, 5, 6], [wide, flat]),
        ([17], []),
        ([18, 19, 20], []),
        ([7, *shown(high), 8, 9, 10], [high]),
        ([21], []),
    ]
    conversation = HostConversation(OnnxSession(bundle), 1.0, capacity)
    ids, stock = list[int](), list[dict[str, Any]]()
    for tokens, pictures in turns:
        step = conversation.run(tokens, pictures)
        ids += tokens
        stock += [bundle_inputs(bundle, one) for one in pictures]
        row = torch.tensor([ids])
        inputs = {name: torch.cat([one[name] for one in stock]) for name in stock[0]}
        with torch.no_grad():
            found = model(input_ids=row, mm_token_type_ids=(row == 503).int(), **inputs).logits[0, -1]
        assert np.abs(step.logits - found.numpy()).max() < LOGIT_TOLERANCE


def bundle_inputs(bundle: Bundle, one: Visual) -> dict[str, Any]:
    stock = families.preparation(bundle.manifest).stock_inputs(one)
    return {name: torch.from_numpy(array) for name, array in stock.items()}


@pytest.mark.parametrize("sections", [(24, 20, 20), (4, 2, 2), (3, 3, 2), (6, 1, 1)])
def test_axes_take_frequencies_in_turn(sections: tuple[int, ...]) -> None:
    size = 2 * sum(sections)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(sections)}
    stock = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=size, rope_parameters=rope))
    positions = torch.randint(0, 500, (3, 1, 40), generator=torch.Generator().manual_seed(0))
    wanted = stock(torch.zeros(1), positions)[0][0, :, : size // 2]
    table = rotary_frequencies(RotarySizes(theta=5e6, sections=sections, interleaved=True))
    assert [int((row > 0).sum()) for row in table] == list(sections)
    found = np.cos(positions[:, 0].numpy().T @ table)
    assert np.abs(found - wanted.numpy()).max() < 1e-4  # positions times frequencies in float32 there


def test_weights_have_the_names_of_transformers(checkpoint: Path) -> None:
    names = {*load_file(checkpoint / "model.safetensors")}
    assert {name.partition(".")[0] for name in names} == {"model", "lm_head"}
    assert {"model.language_model.layers.4.self_attn.q_norm.weight", "model.visual.pos_embed.weight"} <= names
    assert {FAMILY.stored_name(FAMILY.canonical_name(name)) for name in names} == names


def test_a_checkpoint_without_processor_settings_has_the_published_ones() -> None:
    preprocessing = FAMILY.read(TINY["qwen3_vl"], None).preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (preprocessing.min_pixels, preprocessing.max_pixels) == (256 * 256, 4096 * 4096)  # type: ignore[union-attr]


def test_fine_tunes_load_by_folder(checkpoint: Path) -> None:
    """A checkpoint is known by its config.json alone, whatever its folder is called."""
    description = read_description(Checkpoint.open(checkpoint))
    assert (description.family, description.model.decoder.deepstack) == (FAMILY, 3)


@pytest.mark.parametrize("layer", [1, 2, 5])
def test_a_cut_below_the_layers_that_pictures_add_to_is_refused(
    layer: int, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert command(["--model", str(checkpoint), "--output", str(output), "--layer", str(layer)]) == 2
    error = capsys.readouterr().err
    assert f"layer {layer} is out of range: this model has 5 layers, so --layer takes 3 to 4" in error
    assert len(error.splitlines()) == 1 and not output.exists()


def test_the_default_is_qwen2_5_vls_above_the_layers_that_pictures_add_to() -> None:
    sizes = FAMILY.read(TINY["qwen3_vl"], None).decoder
    for layers, deepstack, wanted in ((28, 3, 16), (36, 3, 22), (64, 3, 37), (5, 3, 3), (5, 4, 4), (28, 20, 20)):
        found = FAMILY.default_layer(sizes.model_copy(update={"layers": layers, "deepstack": deepstack}))
        assert (found.layer, found.calibrated) == (wanted, False)


def test_rows_are_scored_with_what_pictures_have_added(checkpoint: Path, tmp_path: Path) -> None:
    """Of the layer behind the last that they add to, by its values or by what enters it."""
    for scored in ("values", "unnormed-values"):
        bundle = export(ExportRecipe(checkpoint, tmp_path / scored, layer=4, max_visual=400, scored=scored))
        report = check(bundle, checkpoint, ratio=0.3, steps=1)
        assert report.passed, [one for one in report.comparisons if not one.passed]


def recorded(bundle: Bundle, checkpoint: Path) -> tuple[Recording, PIL.Image.Image]:
    image = draw_picture()
    return record(bundle, checkpoint, make_prompt(bundle, image)[1], [image], 0.5, 1), image


def test_features_that_are_added_are_compared(bundle: Bundle, checkpoint: Path) -> None:
    reference, image = recorded(bundle, checkpoint)
    key = Key("prefill", "vision", "outputs", "deepstack.1")
    changed = {**reference.tensors, key: reference.tensors[key] + np.float32(0.01)}
    report, _ = compare(OnnxSession(bundle), Recording(reference.facts, changed), [image])
    assert [one.name for one in report.comparisons if not one.passed] == ["deepstack.1"]
    missing = {name: array for name, array in reference.tensors.items() if name != key}
    with pytest.raises(UserError, match=r"damaged \(deepstack.1 and the number of pictures do not match\)"):
        compare(OnnxSession(bundle), Recording(reference.facts, missing), [image])


def test_peers_on_pytorch_see_the_added_features(bundle: Bundle, checkpoint: Path) -> None:
    one = picture(bundle, 300, 130)
    tokens = [1, 2, *shown(one), 7, 8, 9, 10]
    peer = TorchPeer(bundle, load(checkpoint)).answer(Prompt(tokens, one), 1.0, 3)
    conversation, drawn = HostConversation(OnnxSession(bundle), 1.0), list[int]()
    step = conversation.run(tokens, [one])
    for _ in range(4):
        drawn.append(int(step.logits.argmax()))
        step = conversation.run(drawn[-1:])
    assert peer.tokens == drawn


def test_calibration_tries_the_cuts_that_there_are(checkpoint: Path) -> None:
    examples = [Example(draw_picture().resize((200, 120)), "Where is the ring?")]
    found = calibrate(checkpoint, examples, [1.0], tokens=2, compare="none")
    assert [trial.layer for trial in found.trials] == [3, 4]
    assert all(trial.divergence < 1e-6 and trial.agreement == 1 for trial in found.trials)
    with pytest.raises(UserError, match="layers 2 to 3 are out of range: give 3 to 4 for this model"):
        calibrate(checkpoint, examples, [1.0], [2, 3])
