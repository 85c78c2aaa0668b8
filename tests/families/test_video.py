"""Videos, in the families that take them, against stock transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_check
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families import patch_settings, qwen3_vl
from ivc_export.families.patches import frame_size
from ivc_export.families.pictures import Visual
from ivc_export.families.videos import Clip, taken_frames
from ivc_export.report.overlay import overlay
from ivc_export.runtime.chat import Chat, Sampling
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.processor import Processor
from ivc_export.runtime.videos import Video
from ivc_export.text.template import parts_message
from ivc_export.verify.oracle import reference_picture
from ivc_export.verify.reference import Reference
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import GOLDENS, LOGIT_TOLERANCE, SHAPES
from tests.families.clips import frame, frame_folder
from tests.runtime.test_tensorrt import opened

FAMILIES = [name for name in families.names() if families.of(name).video is not None]


@dataclass(frozen=True)
class Filmed:
    """A tiny model that takes videos, exported."""

    name: str
    root: Path

    @cached_property
    def checkpoint(self) -> Path:
        return make_checkpoint(self.root / "checkpoint", TINY[self.name])

    @cached_property
    def bundle(self) -> Bundle:
        return export(ExportRecipe(self.checkpoint, self.root / "bundle", max_visual=300))

    @cached_property
    def session(self) -> OnnxSession:
        return OnnxSession(self.bundle)

    @cached_property
    def processor(self) -> Processor:
        return Processor(self.bundle)

    @cached_property
    def odd(self) -> Video:
        """Five frames, all of which are taken."""
        return Video(frame_folder(self.root / "odd", 5, 90, 64), fps=3)

    @cached_property
    def high(self) -> Video:
        """Three frames of another shape, at another rate."""
        return Video(frame_folder(self.root / "high", 3, 40, 130), fps=0.7)

    def prompt(self, *parts: Any) -> tuple[list[int], list[Visual]]:
        visuals = [visual for part in parts for visual in self.processor.look(part)[1]]
        return self.processor.question("What moves here?", visuals), visuals


@pytest.fixture(scope="module")
def built() -> dict[str, Filmed]:
    return {}


@pytest.fixture
def filmed(
    request: pytest.FixtureRequest, built: dict[str, Filmed], tmp_path_factory: pytest.TempPathFactory
) -> Filmed:
    name: str = request.param
    return built.setdefault(name, Filmed(name, tmp_path_factory.mktemp(name)))


every_family = pytest.mark.parametrize("filmed", FAMILIES, indirect=True)
one_family = pytest.mark.parametrize("filmed", ["qwen2_vl"], indirect=True)


@every_family
def test_unpruned_logits_equal_stock_transformers(filmed: Filmed) -> None:
    """By the whole stock model: two clips of odd frame counts, a picture among them, and what follows."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(filmed.checkpoint, dtype=torch.float32)
    m = filmed.bundle.manifest
    assert m.video is not None
    for capacity, parts in ((None, (filmed.odd,)), (None, (filmed.high,)), (900, (filmed.high, SHAPES, filmed.odd))):
        tokens, visuals = filmed.prompt(*parts)
        conversation, ids, inputs = HostConversation(filmed.session, 1.0, capacity), list[int](), dict[str, Any]()
        for visual in visuals:
            for name, array in families.preparation(m).stock_inputs(visual).items():
                inputs.setdefault(name, []).append(torch.from_numpy(array))
        inputs = {name: torch.cat(arrays) for name, arrays in inputs.items()}
        for turn, pictures in ((tokens, visuals), ([17], []), ([18, 19, 20], []), ([21], [])):
            step = conversation.run(turn, pictures)
            ids += turn
            row = torch.tensor([ids])
            kinds = (row == m.tokens.image).int() + 2 * (row == m.video.token).int()
            with torch.no_grad():
                found = model(input_ids=row, mm_token_type_ids=kinds, **inputs).logits[0, -1]
            assert np.abs(step.logits - found.numpy()).max() < LOGIT_TOLERANCE


@every_family
@pytest.mark.parametrize("method", ["ivc-prune", "random", "foreground"])
def test_pruned_videos_equal_the_reference(filmed: Filmed, method: str) -> None:
    m = filmed.bundle.manifest
    reference = Reference(filmed.checkpoint, m.selection_layer, 0.4, m.selection)
    for parts in ((filmed.odd,), (SHAPES, filmed.high)):
        reference.restart(m.selection_layer, 0.4, method)
        conversation = HostConversation(filmed.session, 0.4, method=method)
        turns = [filmed.prompt(*parts), ([17], []), ([5, 6, 7], []), ([21], []), filmed.prompt(filmed.high)]
        for tokens, visuals in turns:
            step = conversation.run(tokens, visuals)
            turn = reference.run(tokens, [reference_picture(filmed.bundle, visual) for visual in visuals])
            np.testing.assert_array_equal(step.keep_index, turn.keep_index.numpy())
            assert np.abs(step.logits - turn.logits.numpy()).max() < LOGIT_TOLERANCE
            assert conversation.next_position == reference.next_position


@every_family
def test_all_frames_are_ranked_as_one(filmed: Filmed) -> None:
    """Implicit visual coordinates are each frame's, and what is kept beside them is not spread evenly."""
    tokens, visuals = filmed.prompt(filmed.odd)
    step = HostConversation(filmed.session, 0.4).run(tokens, visuals)
    blocks = [block for visual in visuals for block in visual.grid.blocks]
    assert len(blocks) == 3 and len({*blocks}) == 1
    kept = np.isin(step.run.visual_index, step.keep_index).reshape(3, -1)
    coordinates = (step.run.ivc_priority > 0).reshape(3, -1)
    assert len({*coordinates.sum(axis=1).tolist()}) == 1 and coordinates.any()
    assert len({*kept.sum(axis=1).tolist()}) > 1


@every_family
def test_other_runtimes_equal_the_portable_one(filmed: Filmed, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = FusedSession(filmed.bundle, "cpu")
    engines, device = opened(filmed.bundle, monkeypatch, max_visual=300, max_text=200)
    prompt, more = filmed.prompt(filmed.odd), filmed.prompt(SHAPES_SMALL, filmed.high)
    for session in (fused, engines):
        found, wanted = session.converse(0.4, 1024 if session is fused else None), HostConversation(filmed.session, 0.4)
        for tokens, visuals in (prompt, ([17], []), more, ([21], [])):
            step, reference = found.run(tokens, visuals), wanted.run(tokens, visuals)
            assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
            if visuals:
                np.testing.assert_array_equal(step.keep_index, reference.keep_index)
                np.testing.assert_allclose(
                    np.concatenate(step.image_embeds), np.concatenate(reference.image_embeds), atol=LOGIT_TOLERANCE
                )
    device.check()


SHAPES_SMALL = PIL.Image.fromarray(frame(99, 60, 60))


@every_family
def test_a_chat_shows_videos_in_any_turn(filmed: Filmed) -> None:
    chat = Chat(filmed.session, 0.3, sampling=Sampling(max_tokens=3))
    turns: list[tuple[list[Path | Video], str]] = [
        ([filmed.odd], "Where is it?"),
        ([], "And now?"),
        ([SHAPES, filmed.high], "Is <image> in <video>?"),
    ]
    for images, question in turns:
        list(chat.ask(question, images))
        assert chat.tokens and chat.step is not None
        if images:
            panels = [panel for look in chat.looks for panel in chat.processor.panels(look)]
            assert len(panels) == sum(len(grid.frames) for grid in chat.step.run.grids)
            assert overlay(panels, chat.step).width > 500
    assert len(chat.messages) == 6


@one_family
def test_many_frames_are_drawn_in_lines(filmed: Filmed, tmp_path: Path) -> None:
    chat = Chat(filmed.session, 0.3, sampling=Sampling(max_tokens=1))
    list(chat.ask("Where?", [Video(frame_folder(tmp_path / "long", 41, 90, 64))]))
    assert chat.step is not None
    drawn = overlay(chat.processor.panels(chat.looks[0]), chat.step)
    assert len(chat.step.run.grids[0].frames) == 21 and drawn.width < 3000 and drawn.height > 250


@every_family
def test_ids_equal_those_of_transformers(filmed: Filmed) -> None:
    """The text around frames is that of the family's own processor, without its torchvision."""
    m, processor = filmed.bundle.manifest, filmed.processor
    assert m.video is not None
    looks = [processor.video(video) for video in (filmed.odd, filmed.high)]
    visuals = [visual for _, found in looks for visual in found]
    text = processor.render([parts_message([filmed.odd, "Then", filmed.high, "What moves here?"])])
    official: Any = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[
        filmed.name
    ]
    official = official.__new__(official)
    official.video_token, official.video_processor = (
        "<|video_pad|>",
        SimpleNamespace(merge_size=2, temporal_patch_size=2),
    )
    official.vision_start_token, official.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    for (look, _), fps in zip(looks, (3.0, 0.7), strict=True):
        shape = torch.tensor([[look.grid.time, 2 * look.grid.rows, 2 * look.grid.columns]])
        metadata = VideoMetadata(len(look.frames), fps, frames_indices=[*look.frames])
        written = official.replace_video_token({"video_grid_thw": shape, "video_metadata": [metadata]}, 0)
        text = text.replace("<|video_pad|>", written.replace("<|video_pad|>", "<|unused|>"), 1)
    wanted = processor.tokenizer.encode(text.replace("<|unused|>", "<|video_pad|>"), add_special_tokens=False).ids
    assert processor.question("<video>Then<video>What moves here?", visuals) == wanted
    assert wanted.count(m.video.token) == sum(visual.grid.visual for visual in visuals)


@pytest.mark.parametrize("case", json.loads((GOLDENS / "video.json").read_text(encoding="utf-8"))["times"], ids=str)
def test_times_are_written_as_transformers_writes_them(case: Any) -> None:
    p = families.of("qwen3_vl").read(TINY["qwen3_vl"], None).preprocessing
    pictures, count = families.of("qwen3_vl").pictures(p), len(case["indices"])
    total = round(1 + case["indices"][-1])
    frames = [PIL.Image.fromarray(frame(number, 64, 64)) for number in range(count)]
    clip = Clip("clip", (64, 64), tuple(case["indices"]), total, case["native"], frames)
    visuals = pictures.video(clip, settings(timestamps=True, pixels_of="video"), 10**9)
    assert [visual.before for visual in visuals] == case["written"]
    assert [visual.more for visual in visuals] == [*reversed(range(len(visuals)))]


GOLDEN: Any = json.loads((GOLDENS / "video.json").read_text(encoding="utf-8"))
"""Of transformers' video processors."""


def settings(**changes: Any) -> Any:
    found = families.of("qwen2_vl").video
    assert found is not None
    return found({"vision_config": {}}, None, 504).model_copy(update=changes)


@pytest.mark.parametrize("name", GOLDEN["defaults"])
def test_settings_that_a_checkpoint_leaves_out_are_transformers(name: str) -> None:
    table: Any = {"qwen2_vl": patch_settings.Videos, "qwen3_vl": qwen3_vl.Videos}[name]
    wanted = {**GOLDEN["defaults"][name], "cap_pixels_per_frame": False}  # None there, which is the same
    found = table().model_dump(include={*wanted})
    assert {key: [*value] if isinstance(value, tuple) else value for key, value in found.items()} == wanted


@pytest.mark.parametrize("case", GOLDEN["sampling"], ids=lambda case: f"{case['total']}-{case['fps']}")
@pytest.mark.parametrize("choice", ["steps", "ends"])
def test_frames_are_those_that_transformers_takes(choice: str, case: Any) -> None:
    found = taken_frames(settings(choice=choice), 2, case["total"], case["native"], case["fps"], case["max_frames"])
    assert list(found) == case[choice]


@pytest.mark.parametrize("case", GOLDEN["sizes"], ids=lambda case: f"{case['width']}x{case['height']}")
def test_frames_have_the_size_that_transformers_gives_them(case: Any) -> None:
    clip = Clip("clip", (case["width"], case["height"]), tuple(range(case["frames"])), case["frames"], 10.0, ())
    p = families.of("qwen2_vl").read(TINY["qwen2_vl"], None).preprocessing
    assert frame_size(clip, settings(), p, 10**9) == tuple(case["frame"])  # type: ignore[arg-type]
    p = p.model_copy(update={"patch_size": 16})
    for key, least, most in (("video", 4096, 25165824), ("video_default", 131072, 786432)):
        whole = settings(pixels_of="video", min_pixels=least, max_pixels=most)
        assert frame_size(clip, whole, p, 10**9) == tuple(case[key])  # type: ignore[arg-type]


@every_family
def test_a_bundle_is_checked_on_a_clip(filmed: Filmed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against PyTorch, and against what that left, beside a picture."""
    bundle = shutil.copytree(filmed.bundle.folder, tmp_path / "bundle")
    options = ["--video", str(filmed.odd.path), "--fps", "3", "--max-frames", "4", "--image", str(SHAPES)]
    question = ["--prompt", "Is <image> in <video>?", "--steps", "1", "--ratio", "0.4"]
    assert ivc_check([str(bundle), "--against", str(filmed.checkpoint), *options, *question]) == 0
    left = bundle / "report" / "reference"
    assert [*left.glob("picture-*")] == [left / "picture-0.png"] and len([*left.glob("video-1/*.png")]) == 4
    assert ivc_check([str(bundle), "--onnx-only"]) == 0
    report = json.loads((bundle / "report" / "parity.json").read_text())
    assert report["passed"] and report["visual_tokens"] > 192
    capsys.readouterr()
    assert ivc_check([str(bundle), "--onnx-only", "--fps", "2"]) == 2
    assert "leave out --fps" in capsys.readouterr().err
    assert ivc_check([str(bundle), "--against", str(filmed.checkpoint), "--max-frames", "2"]) == 2
    assert "are for a video: give one with --video" in capsys.readouterr().err
