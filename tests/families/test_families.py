"""What works for one family works for every one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import PIL.Image
import pytest
import torch
import transformers

from ivc_export import cli, families
from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.weights import PlannedWeights
from ivc_export.contract.operators import verify_graph
from ivc_export.errors import UserError
from ivc_export.exporter.graphs import build_graphs
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.family import Family
from ivc_export.families.pictures import Visual
from ivc_export.lowering import lower
from ivc_export.report.overlay import count_kinds, overlay
from ivc_export.runtime.chat import Chat, FollowUp, Sampling
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.processor import Processor
from ivc_export.selection.method import Method
from ivc_export.verify.oracle import reference_layout, reference_picture
from ivc_export.verify.parity import check
from ivc_export.verify.reference import Reference
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import LOGIT_TOLERANCE, PIXEL_TOLERANCE, SHAPES, rows_first
from tests.families.family_cases import CASES, FamilyCase, family_of
from tools.families_doc import CONFIGS

STOCK = [name for name in CASES if family_of(name).stock_layout is None]


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family, exported."""

    name: str
    family: Family
    case: FamilyCase
    checkpoint: Path

    @cached_property
    def bundle(self) -> Bundle:
        return export(ExportRecipe(self.checkpoint, self.checkpoint.with_name("bundle"), max_visual=400))

    @cached_property
    def session(self) -> OnnxSession:
        return OnnxSession(self.bundle)

    def prepare(self, image: PIL.Image.Image) -> Visual:
        m = self.bundle.manifest
        return families.preparation(m).picture(image, m.tokens.image)

    def picture(self, width: int, height: int) -> Visual:
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        return self.prepare(PIL.Image.fromarray(noise))

    def shown(self, picture: Visual) -> list[int]:
        tokens = self.bundle.manifest.tokens
        marked = [tokens.vision_start, *picture.tokens, tokens.vision_end]
        return [token for token in marked if token is not None]


@pytest.fixture(scope="module")
def built() -> dict[str, Tiny]:
    return {}


@pytest.fixture
def tiny(request: pytest.FixtureRequest, built: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    name: str = request.param
    if name not in built:
        checkpoint = make_checkpoint(tmp_path_factory.mktemp(name) / "checkpoint", TINY[name])
        built[name] = Tiny(name, family_of(name), CASES[name], checkpoint)
    return built[name]


every_family = pytest.mark.parametrize("tiny", CASES, indirect=True)
every_stock_family = pytest.mark.parametrize("tiny", STOCK, indirect=True)


def test_every_family_has_an_entry() -> None:
    assert tuple(sorted({family_of(name).model_type for name in CASES})) == families.names()


def test_aliases_are_unique() -> None:
    aliases = [alias for name in families.names() for alias in families.of(name).hub]
    assert len(aliases) == len(set(aliases))


PARAMETERS = {  # as the hub counts them
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "llava-1.5-7b": 7_063_427_072 - 12_598_272,  # without CLIP's last layer and norm, which give no features
    "internvl2.5-2b": 2_205_754_368,
    "internvl2.5-4b": 3_712_637_952,
    "internvl2.5-8b": 8_075_365_376,
    "internvl3.5-1b": 1_060_897_792,
    "internvl3.5-2b": 2_348_347_392,
    "internvl3.5-4b": 4_732_489_216,
    "internvl3.5-8b": 8_528_318_464,
    "internvl3.5-14b": 15_119_523_840,
}


@pytest.mark.parametrize("alias", PARAMETERS)
def test_graphs_of_published_checkpoints_hold_all_of_their_parameters(alias: str) -> None:
    config = json.loads((CONFIGS / f"{alias}.json").read_text(encoding="utf-8"))
    family, weights = families.of(config["model_type"]), PlannedWeights()
    model = family.read(config, None)
    assert alias in family.hub
    weights.external("model.embed_tokens.weight", (model.decoder.vocab_size, model.decoder.hidden_size))
    build_graphs(model, weights, 16)
    assert sum(math.prod(shape) for shape in weights.shapes.values()) == PARAMETERS[alias]


@pytest.mark.parametrize("alias", PARAMETERS)
def test_a_record_says_what_reading_its_checkpoints_gives(alias: str) -> None:
    config = json.loads((CONFIGS / f"{alias}.json").read_text(encoding="utf-8"))
    family = families.of(config["model_type"])
    model = family.read(config, None)
    assert isinstance(model.preprocessing, family.preprocessing)
    assert (len(model.rotary.sections), model.selection.tiles) == (family.axes, family.tiles)


@every_family
@pytest.mark.parametrize("ratio", [None, 1.0, 0.15])
def test_bundles_equal_pytorch(tiny: Tiny, ratio: float | None) -> None:
    report = check(tiny.bundle, tiny.checkpoint, ratio=ratio, steps=2)
    assert report.passed, [c for c in report.comparisons if not c.passed]
    wanted = tiny.family.default_ratio if ratio is None else ratio
    assert report.kept_tokens == round(wanted * report.visual_tokens)


@every_family
def test_unpruned_logits_equal_stock_transformers(tiny: Tiny) -> None:
    """The whole model in one call, of two pictures that are not square."""
    pictures, words = [tiny.picture(280, 120), tiny.picture(100, 230)], [1, 2, 3, 4, 5]
    tokens = [*words, *tiny.shown(pictures[0]), 7, *tiny.shown(pictures[1]), *words]
    layout, m = reference_layout(tiny.bundle, tiny.checkpoint), tiny.bundle.manifest
    model = Reference(tiny.checkpoint, 1, 1.0, m.selection, layout).model
    given = [reference_picture(tiny.bundle, picture).inputs for picture in pictures]
    inputs = {name: torch.cat([one[name] for one in given]) for name in given[0]}
    ids = torch.tensor([tokens])
    if hasattr(model.model, "get_rope_index"):
        inputs["mm_token_type_ids"] = (ids == m.tokens.image).int()
    with torch.no_grad():
        wanted = model(input_ids=ids, **inputs).logits[0, -1].numpy()
    assert np.abs(HostConversation(tiny.session, 1.0).run(tokens, pictures).logits - wanted).max() < LOGIT_TOLERANCE


def test_a_cut_behind_the_layer_that_is_kept_whole(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", TINY["llava"])
    bundle = export(ExportRecipe(checkpoint, tmp_path / "b", layer=1))
    assert not [t.name for t in bundle.manifest.graphs["decoder"].outputs if t.name.startswith("compact_")]
    report = check(bundle, checkpoint, steps=2)
    assert report.passed, [c for c in report.comparisons if not c.passed]


@every_family
@pytest.mark.parametrize("capacity", [None, 1600], ids=["exact-length", "fixed-capacity"])
def test_turns_with_pictures_equal_the_reference(tiny: Tiny, capacity: int | None) -> None:
    m = tiny.bundle.manifest
    conversation = HostConversation(tiny.session, 0.4, capacity)
    layout = reference_layout(tiny.bundle, tiny.checkpoint)
    reference = Reference(tiny.checkpoint, m.selection_layer, 0.4, m.selection, layout)
    wide, high = tiny.picture(280, 120), tiny.picture(100, 230)
    words = np.random.default_rng(0).integers(0, 490, 40).tolist()
    turns: list[tuple[list[int], list[Visual]]] = [
        ([*words[:9], *tiny.shown(wide), *words[9:15]], [wide]),
        ([17], []),
        ([*words[20:24], *tiny.shown(high), *words[25:27], *tiny.shown(wide), *words[30:]], [high, wide]),
        (words[:5], []),
        ([99], []),
    ]
    for tokens, pictures in turns:
        step = conversation.run(tokens, pictures)
        turn = reference.run(tokens, [reference_picture(tiny.bundle, picture) for picture in pictures])
        np.testing.assert_array_equal(step.keep_index, turn.keep_index.numpy())
        assert np.abs(step.logits - turn.logits.numpy()).max() < LOGIT_TOLERANCE
        assert conversation.next_position == reference.next_position


@every_family
def test_other_methods_choose_as_the_reference_does(tiny: Tiny) -> None:
    m, layout = tiny.bundle.manifest, reference_layout(tiny.bundle, tiny.checkpoint)
    reference = Reference(tiny.checkpoint, m.selection_layer, 0.4, m.selection, layout)
    pictures, words = [tiny.picture(280, 120), tiny.picture(100, 230)], [1, 2, 3, 4, 5]
    tokens = [*words, *tiny.shown(pictures[0]), 7, *tiny.shown(pictures[1]), *words]
    chosen = []
    for method in (Method(), Method("foreground"), Method("random"), Method("random", 2_000_000_000)):
        reference.restart(m.selection_layer, 0.4, method.name, method.seed)
        step = HostConversation(tiny.session, 0.4, method=method).run(tokens, pictures)
        turn = reference.run(tokens, [reference_picture(tiny.bundle, picture) for picture in pictures])
        np.testing.assert_array_equal(step.keep_index, turn.keep_index.numpy())
        assert np.abs(step.logits - turn.logits.numpy()).max() < LOGIT_TOLERANCE
        chosen.append(tuple(step.keep_index.tolist()))
    assert len({*chosen}) == 4 and len({len(one) for one in chosen}) == 1


@every_family
def test_the_vision_encoder_takes_pictures_of_any_shape(tiny: Tiny) -> None:
    m = tiny.bundle.manifest
    layout = reference_layout(tiny.bundle, tiny.checkpoint)
    model = Reference(tiny.checkpoint, 1, 1.0, m.selection, layout).model.model
    for size in ((28, 28), (40, 700), (700, 40), (333, 170), (113, 225)):
        picture = tiny.picture(*size)
        found = tiny.session.run("vision", picture.inputs)
        with torch.no_grad():
            features = model.get_image_features(**reference_picture(tiny.bundle, picture).inputs)
        wanted = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
        for rows, parts in zip(found.values(), wanted, strict=True):
            assert np.abs(rows.reshape(-1, rows.shape[-1]) - torch.cat(list(parts)).numpy()).max() < LOGIT_TOLERANCE


@every_family
def test_frames_of_one_size_run_as_one_batch(tiny: Tiny) -> None:
    picture = tiny.picture(120, 100)
    pixels = picture.inputs["pixel_values"]
    inputs = {**picture.inputs, "pixel_values": np.concatenate([pixels, 2 * pixels, -pixels])}
    if "token_source" in inputs:  # the pictures one behind the other, of which the separators are the same
        source, tokens = inputs["token_source"], len(pixels) * picture.grid.tile**2
        inputs["token_source"] = np.concatenate([np.where(source < 2, source, source + i * tokens) for i in range(3)])
    found = tiny.session.run("vision", inputs)
    alone = tiny.session.run("vision", {**picture.inputs, "pixel_values": -pixels})
    for name, rows in alone.items():
        assert np.abs(found[name].reshape(3, *rows.shape)[2] - rows).max() < LOGIT_TOLERANCE


@every_stock_family
def test_what_transformers_saves_is_the_same_model(tiny: Tiny, tmp_path: Path) -> None:
    """Names and config.json of transformers 5, against those of 4.4x."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny.checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    saved = export(ExportRecipe(tmp_path / "saved", tmp_path / "bundle", max_visual=400))
    assert saved.manifest.decoder == tiny.bundle.manifest.decoder
    assert saved.manifest.tokens.image == tiny.bundle.manifest.tokens.image
    picture = tiny.picture(120, 100)
    tokens = [1, 2, *tiny.shown(picture), 7, 8, 9, 10]
    wanted = HostConversation(tiny.session, 0.5).run(tokens, [picture]).logits
    np.testing.assert_array_equal(HostConversation(OnnxSession(saved), 0.5).run(tokens, [picture]).logits, wanted)


@every_family
@pytest.mark.parametrize("size", [(448, 336), (113, 340), (700, 90), (31, 29)], ids=str)
def test_pixels_equal_the_official_processors(
    tiny: Tiny, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image, preprocessing = PIL.Image.fromarray(noise), tiny.bundle.manifest.preprocessing
    picture = tiny.prepare(image)
    found = families.preparation(tiny.bundle.manifest).stock_inputs(picture)["pixel_values"]
    with monkeypatch.context() as patched:
        patched.setattr(PIL.Image.Image, "resize", rows_first)
        wanted = tiny.case.official(preprocessing)(image, return_tensors="np")["pixel_values"]
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < PIXEL_TOLERANCE
    assert picture.grid.visual <= tiny.bundle.manifest.max_visual


@every_family
@pytest.mark.parametrize("follow_up", get_args(FollowUp))
def test_a_chat_shows_pictures_in_any_turn(tiny: Tiny, follow_up: FollowUp) -> None:
    chat = Chat(tiny.session, 0.3, sampling=Sampling(max_tokens=4), follow_up=follow_up)
    image = open_picture(SHAPES)
    told: list[PIL.Image.Image] = []
    for images in ([image], [], [image, image]):
        list(chat.ask("Where is the ring?", images))
        told = [*told, *images] if follow_up == "again" else images
        assert chat.tokens and chat.step is not None
        assert [look.part for look in chat.looks] == told
        visual = sum(grid.visual for grid in chat.step.run.grids)
        assert visual == len(told) * tiny.prepare(image).grid.visual
        counts = count_kinds(chat.step)
        assert visual - counts["pruned"] == len(told) * round(0.3 * visual / max(1, len(told)))
        if told:
            drawn = overlay([chat.processor.shown(image) for image in told], chat.step)
            assert drawn.width > 500
    assert len(chat.messages) == 6
    assert chat.conversation.timings.runs["vision"] == 3


@every_family
def test_every_token_has_its_place_in_the_picture(tiny: Tiny) -> None:
    """A patch of another colour changes the embeddings of the tokens that lie there more than those of any others."""
    plain = PIL.Image.new("RGB", (448, 448), "white")
    changed = plain.copy()
    changed.paste("black", (336, 112, 448, 224))
    embeds = []
    for image in (plain, changed):
        picture = tiny.prepare(image)
        found = tiny.session.run("vision", picture.inputs)["image_embeds"]
        embeds.append(found.reshape(-1, found.shape[-1]))
    grid = picture.grid
    change = np.abs(embeds[1] - embeds[0]).mean(axis=1)
    inside = np.array([c / grid.columns >= 0.75 and 0.25 <= r / grid.rows < 0.5 for r, c in grid.cells])
    change = change[grid.detail]
    assert change[inside].mean() > 1.5 * change[~inside].mean()


@every_family
def test_the_commands_take_every_family(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = tmp_path / "kept.png"
    question = ["--image", str(SHAPES), "--prompt", "Where?", "--max-tokens", "3", "--ratio", "0.25", "--json"]
    assert cli.ivc_run([str(tiny.bundle.folder), *question, "--show", str(shown)]) == 0
    visual = json.loads(capsys.readouterr().out)["visual_tokens"]
    assert visual["kept"] == round(0.25 * visual["total"]) > 0
    assert open_picture(shown).width > 500


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2_5_vl", {"vision_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu'"),
    ("qwen2_5_vl", {"vision_config": {"hidden_size": 30}}, "is not divisible by"),
    ("llava", {"text_config": {"model_type": "mistral"}}, "text_config.model_type 'mistral'"),
    (
        "llava",
        {"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
        "text_config.rope_scaling.type 'linear'",
    ),
    ("llava", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
    ("llava", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
    ("llava", {"vision_config": {"hidden_act": "relu"}}, "hidden_act 'relu'"),
    ("internvl", {"text_config": {"model_type": "qwen3_moe"}}, "text_config.model_type 'qwen3_moe'"),
    ("internvl", {"text_config": {"model_type": "gpt_oss"}}, "text_config.model_type 'gpt_oss'"),
    ("internvl3_5", {"text_config": {"attention_bias": True}}, "text_config.attention_bias True"),
    (
        "internvl3_5",
        {"text_config": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}},
        "use_sliding_window True",
    ),
    ("internvl", {"vision_config": {"use_qk_norm": True}}, "vision_config.use_qk_norm True"),
    ("internvl", {"vision_config": {"image_size": [112, 224]}}, "only squares"),
    ("internvl", {"downsample_ratio": 0.25}, "downsample_ratio 0.25"),
]


@pytest.mark.parametrize(("name", "changes", "sentence"), BAD, ids=[f"{n}: {s}" for n, _, s in BAD])
def test_what_is_not_supported_says_so(name: str, changes: dict[str, Any], sentence: str) -> None:
    tiny: Any = TINY[name]
    merged = {key: {**tiny[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=sentence):
        family_of(name).read({**tiny, **merged}, None)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_picture_of_fixed_size_needs_its_tokens(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", TINY[name])
    with pytest.raises(UserError, match="max_visual 12 is too small: a picture gives this model at least"):
        export(ExportRecipe(checkpoint, tmp_path / "b", max_visual=12))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@every_family
def test_narrow_checkpoints_run_widened(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", TINY[tiny.name], dtype="bfloat16")
    bundle = export(ExportRecipe(checkpoint, tmp_path / "b", max_visual=400))
    assert bundle.manifest.dtype == "bfloat16"
    picture = tiny.picture(120, 100)
    tokens = [1, 2, *tiny.shown(picture), 7, 8, 9, 10]
    found = HostConversation(OnnxSession(bundle), 0.5).run(tokens, [picture]).logits
    wide = HostConversation(tiny.session, 0.5).run(tokens, [picture]).logits
    assert np.corrcoef(found, wide)[0, 1] > 0.99  # the weights differ by their rounding


@every_family
def test_native_graphs_keep_the_contract(tiny: Tiny) -> None:
    for name, info in tiny.bundle.manifest.graphs.items():
        model = lower(ir.load(tiny.bundle.folder / info.file), "native")
        assert not model.functions
        verify_graph(name, model, info)


@every_family
def test_the_familys_template_marks_each_picture_once(tiny: Tiny) -> None:
    processor = Processor(tiny.bundle)
    picture = processor.picture(SHAPES)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    tokens = processor.encode(processor.render([{"role": "user", "content": content}]), [picture, picture])
    marked = tiny.shown(picture)
    found = [i for i in range(len(tokens)) if tokens[i : i + len(marked)] == marked]
    assert len(found) == 2
    assert tokens.count(marked[0]) == (2 if len(set(marked)) > 1 else 2 * len(marked))
