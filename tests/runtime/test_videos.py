"""Videos that are read, sampled and scaled, and those that cannot be."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_run
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.patches import PatchPictures
from ivc_export.families.pictures import Grid
from ivc_export.families.videos import Clip, taken_frames
from ivc_export.runtime.processor import Processor
from ivc_export.runtime.videos import Video
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import SHAPES
from tests.families.clips import frame, frame_folder, video_file


@pytest.fixture(scope="module")
def processor(sample_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor(
        export(ExportRecipe(sample_checkpoint, tmp_path_factory.mktemp("video") / "bundle", max_visual=300))
    )


def test_a_video_file_is_read_as_its_frames(processor: Processor, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = video_file(av, tmp_path / "clip.mp4", 47, 96, 64)
    seen, _ = processor.video(Video(path, fps=2))
    m = processor.bundle.manifest
    assert m.video is not None
    assert seen.frames == taken_frames(m.video, 2, 47, 10.0, 2, None) and seen.size == (96, 64)
    with av.open(str(path)) as file:
        frames = [image.to_ndarray(format="rgb24") for image in file.decode(video=0)]
    for image, number in zip(Video(path).open().frames(seen.frames), seen.frames, strict=True):
        np.testing.assert_array_equal(np.asarray(image), frames[number])


def test_frames_are_scaled_to_max_visual(processor: Processor, tmp_path: Path) -> None:
    long = Video(frame_folder(tmp_path / "long", 61, 192, 128))
    seen, _ = processor.video(long)
    assert 150 < sum(grid.visual for grid in seen.grids) <= 300
    fewer, _ = processor.video(Video(long.path, max_frames=8))
    assert len(fewer.frames) == 8 and sum(grid.visual for grid in fewer.grids) <= 300


def test_a_folder_of_10_000_frames_is_sampled(processor: Processor, tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "one", 1, 32, 32)
    for number in range(1, 10_000):
        (folder / f"{number:05}.png").hardlink_to(folder / "00000.png")
    seen, _ = processor.video(Video(folder, max_frames=64))
    assert len(seen.frames) == 64 and seen.frames[-1] > 9_000
    with pytest.raises(
        UserError, match=r"gives at least 384 visual tokens in 768 frames of 32 x 32, but this bundle takes 300"
    ):
        processor.video(Video(folder))


def test_videos_that_cannot_be(processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    mixed = frame_folder(tmp_path / "mixed", 3, 40, 40)
    PIL.Image.new("RGB", (50, 40)).save(mixed / "9.png")
    torn = frame_folder(tmp_path / "torn", 3, 40, 40)
    (torn / "00001.png").write_bytes((torn / "00001.png").read_bytes()[:900])
    long = frame_folder(tmp_path / "strip", 2, 2100, 10)
    for path, sentence in (
        (tmp_path / "none.mp4", "there is no video at"),
        (tmp_path / "empty", "has no video frames: give a folder of PNG or JPEG files, or a video file"),
        (mixed, "is 50 x 40, but the first frame of the video is 40 x 40: give frames of one size"),
        (torn, "cannot be read as a picture"),
        (long, "too elongated"),
    ):
        with pytest.raises(UserError, match=sentence):
            processor.video(Video(path))
    for numbers, sentence in (
        ({"fps": 0}, "0 frames per second are out of range"),
        ({"fps": float("nan")}, "nan frames per second are out of range"),
        ({"max_frames": 0}, "a limit of 0 frames is out of range"),
    ):
        with pytest.raises(UserError, match=sentence):
            Video(tmp_path, **numbers)


def test_files_that_are_no_videos(processor: Processor, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    whole = video_file(av, tmp_path / "whole.mp4", 20, 96, 64).read_bytes()
    for name, content in {
        "text.txt": b"What moves here? Nothing does.\n" * 9,
        "text.mp4": b"#EXTM3U\nfile:///etc/passwd\n",
        "empty.mp4": b"",
        "half.mp4": whole[: len(whole) // 2],
        "picture.mp4": SHAPES.read_bytes(),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read as a video .*: give a whole video") as caught:
            processor.video(Video(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1
    with av.open(str(tmp_path / "sound.mkv"), "w") as file:
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        file.mux(file.add_stream("pcm_s16le", rate=8000, layout="mono").encode(silence))
    with pytest.raises(UserError, match=r"sound.mkv has no video in it: give a video file"):
        processor.video(Video(tmp_path / "sound.mkv"))


def test_what_was_cut_off_a_file_in_place_does_not_count(tmp_path: Path) -> None:
    """As phones trim: the frames are stored, and the file says that it begins behind them."""
    av = pytest.importorskip("av")
    whole, trimmed = video_file(av, tmp_path / "whole.mp4", 47, 96, 64), tmp_path / "trimmed.mp4"
    with av.open(str(whole)) as source, av.open(str(trimmed), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (time - 5 * packet.duration for time in (packet.pts, packet.dts))
                packet.stream = stream
                file.mux(packet)
    footage = Video(trimmed).open()
    assert footage.total == 42 and len([*footage.frames([0, 20, 41])]) == 3
    found, wanted = (next(Video(path).open().frames([n])) for path, n in ((trimmed, 0), (whole, 5)))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_a_file_may_end_a_second_early_and_no_more(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    footage: Any = Video(video_file(av, tmp_path / "clip.mp4", 20, 96, 64)).open()
    longer = replace(footage, total=29)
    *_, before, last = longer.frames([0, 19, 28])
    np.testing.assert_array_equal(np.asarray(before), np.asarray(last))
    with pytest.raises(UserError, match=r"is damaged \(frame 40 of 29 is missing\): give a whole video"):
        [*longer.frames([0, 40])]


def test_without_pyav_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"reading a video file needs PyAV: install ivc-export\[video\]"):
        Video(tmp_path / "clip.mp4").open()


def test_other_families_take_no_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY["llava"])
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    with pytest.raises(
        UserError, match="does not support videos: give pictures, or export a model that supports videos"
    ):
        Processor(bundle).video(Video(frame_folder(tmp_path / "clip", 2, 40, 40)))
    assert run(bundle, "--video", str(tmp_path / "clip")) == 2
    assert "does not support videos: give pictures" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 4, 5])
def test_pixels_are_those_of_the_frames_as_pictures(count: int) -> None:
    """Two in a temporal patch, the last one twice where the number is odd."""
    p = families.of("qwen2_vl").read(TINY["qwen2_vl"], None).preprocessing
    pictures = families.of("qwen2_vl").pictures(p)
    assert isinstance(pictures, PatchPictures)
    frames = [PIL.Image.fromarray(frame(number, 112, 84)) for number in range(count)]
    clip, found = Clip("clip", (112, 84), tuple(range(count)), count, 10.0, frames), families.of("qwen2_vl").video
    assert found is not None
    settings = found({"vision_config": {}}, {"min_pixels": 112 * 84, "max_pixels": 112 * 84}, 504)
    (video,) = pictures.video(clip, settings, 10**9)
    assert video.grid == Grid(3, 4, time=-(-count // 2))
    pixels = video.inputs["pixel_values"].reshape(-1, 48, 3, 2, 196)
    for number in range(2 * video.grid.time):
        alone = pictures.picture(frames[min(number, count - 1)], 503).inputs
        np.testing.assert_array_equal(
            pixels[number // 2, :, :, number % 2], alone["pixel_values"].reshape(48, 3, 2, 196)[:, :, 0]
        )
        np.testing.assert_array_equal(video.inputs["patch_position"], alone["patch_position"])


def run(bundle: Bundle, *options: str) -> int:
    return ivc_run([str(bundle.folder), "--prompt", "What moves?", "--max-tokens", "2", *options])


def test_the_command_answers_about_videos_and_pictures(
    processor: Processor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, drawn = frame_folder(tmp_path / "clip", 5, 90, 64), tmp_path / "kept.png"
    options = ("--video", str(folder), "--fps", "3", "--max-frames", "4", "--image", str(SHAPES))
    assert run(processor.bundle, *options, "--json", "--show", str(drawn)) == 0
    record = json.loads(capsys.readouterr().out)
    assert [video["frames"] for video in record["videos"]] == [[0, 1, 2, 3]]
    assert record["videos"][0]["fps"] == pytest.approx(4 / 5 * 3)
    assert record["videos"][0]["original"] == {"width": 90, "height": 64} and record["videos"][0]["grid"]["time"] == 2
    assert len(record["pictures"]) == 1 and drawn.is_file()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--fps", "2"), "--fps and --max-frames are for a video: give one with --video"),
        (("--video", "nowhere.mp4"), "there is no video at nowhere.mp4: check the path"),
        (("--video", "nowhere", "--fps", "-1"), "-1 frames per second are out of range"),
        (("--video", "nowhere", "--max-frames", "0"), "a limit of 0 frames is out of range"),
        (("--video", str(Path(__file__).parent / "__init__.py")), "cannot be read as a video"),
        (("--video", str(Path(__file__).parent)), "has no video frames"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    options: tuple[str, ...], sentence: str, processor: Processor, capsys: pytest.CaptureFixture[str]
) -> None:
    if "__init__.py" in options[-1]:
        pytest.importorskip("av")
    assert run(processor.bundle, *options) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_a_chat_takes_videos(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = frame_folder(tmp_path / "clip", 3, 60, 60)
    asked = tmp_path / "asked.txt"
    asked.write_text(f"/video {folder}\nWhat moves?\nWhere?\n/quit\n")
    with asked.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert ivc_run([str(processor.bundle.folder), "--chat", "--max-tokens", "1", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(answer["videos"]) for answer in answers] == [1, 1]
