"""Small pictures whose size comes again, over a stream that does on the host, at once, what it is given."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Levels, Visual
from ivc_export.runtime.interface import Step
from ivc_export.runtime.onnxruntime import picture_graphs
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.fused_graphs import SMALL_VISION, FusedGraphs
from ivc_export.runtime.onnxruntime.pixel_types import take_float32
from ivc_export.runtime.onnxruntime.stream import Place
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

UNIT = 28
"""Pixels of a visual token's side."""


class HostStream:
    """As Stream, on the host."""

    address, op_library = 0, Path()

    def wait(self) -> bool:
        return True

    def copy(self, to: int, start: int, size: int) -> None:
        ctypes.memmove(to, start, size)

    def make_pixels(self, levels: Levels, start: int, to: int) -> None:
        del start
        ctypes.memmove(to, levels.pixel_values.ctypes.data, levels.pixel_values.nbytes)

    def take_rows(self, table: Any, index: Place, to: Any) -> None:
        tokens = np.ctypeslib.as_array((ctypes.c_int32 * index.shape[0]).from_address(index.address))
        rows = np.ascontiguousarray(table.numpy()[tokens])
        ctypes.memmove(to.data_ptr(), rows.ctypes.data, rows.nbytes)

    def mark(self) -> HostStream:
        return self

    def seconds_since(self, other: HostStream) -> float:
        del other
        return 0.0


class StreamSession(FusedSession):
    """A session on such a stream.

    seen: the number of the CUDA graph that each run of vision would replay, or None if it is launched.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "cpu")
        self.seen: list[int | None] = []
        self.broken = False
        self.stream = HostStream()  # type: ignore[assignment]
        vision = self.lowered("vision", self.lowering)
        take_float32(vision)
        self.captures_vision = self._open_again({SMALL_VISION: vision})

    def run_bound(self, name: str, binding: Any, captured: int | None = None, wait: bool = True) -> None:
        if name == SMALL_VISION and self.broken:
            raise UserError("vision.small cannot run")
        super().run_bound(name, binding, captured, wait)
        if name in ("vision", SMALL_VISION):
            assert (captured is not None) == (name == SMALL_VISION)
            self.seen.append(captured)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "llava"])  # with features of layers, and in tiles
def any_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    return export(ExportRecipe(make_checkpoint(folder / "checkpoint", TINY[request.param]), folder / "bundle"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("qwen2_vl")
    return export(ExportRecipe(make_checkpoint(folder / "checkpoint", TINY["qwen2_vl"]), folder / "bundle"))


def draw(bundle: Bundle, seed: int, columns: int = 3, rows: int = 2) -> Visual:
    noise = np.random.default_rng(seed).integers(0, 256, (rows * UNIT, columns * UNIT, 3), np.uint8)
    return families.preparation(bundle.manifest).picture(PIL.Image.fromarray(noise), bundle.manifest.tokens.image)


def ask(session: FusedSession, pictures: Sequence[Visual]) -> Step:
    marks = session.bundle.manifest.tokens
    before, behind = ([t] if t is not None else [] for t in (marks.vision_start, marks.vision_end))
    tokens = [token for picture in pictures for token in (*before, *picture.tokens, *behind)]
    return session.converse(0.5).run([1, 2, *tokens, 7, 8, 9], [*pictures])


def outputs(step: Step) -> list[npt.NDArray[Any]]:
    """Everything that pictures may change, read after all of them were seen."""
    return [step.logits, step.keep_index, *(picture[name] for picture in step.vision for name in sorted(picture))]


def same(found: Step, wanted: Step) -> None:
    for ours, theirs in zip(outputs(found), outputs(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_size_that_comes_again_is_captured(any_bundle: Bundle) -> None:
    """Its pictures have their own tokens, also several in one prompt."""
    session, launched = StreamSession(any_bundle), FusedSession(any_bundle, "cpu")
    prompts = [[draw(any_bundle, 0)], [draw(any_bundle, 1)], [draw(any_bundle, seed) for seed in (2, 3, 4)]]
    steps = [(ask(session, pictures), ask(launched, pictures)) for pictures in prompts]
    assert session.seen == [None, 1, 1, 1, 1]
    for found, wanted in steps:
        same(found, wanted)
    assert not np.array_equal(steps[0][0].image_embeds[0], steps[1][0].image_embeds[0])


def test_sizes_are_captured_apart(bundle: Bundle) -> None:
    """A larger one too, in other memory; and six tokens in three rows are no three in two."""
    session, launched = StreamSession(bundle), FusedSession(bundle, "cpu")
    sizes = [(3, 2), (3, 2), (2, 3), (2, 3), (4, 4), (4, 4), (3, 2), (2, 3)]
    for seed, size in enumerate(sizes):
        picture = draw(bundle, seed, *size)
        same(ask(session, [picture]), ask(launched, [picture]))
    assert session.seen == [None, 1, None, 2, None, 3, 1, 2]
    assert len(session._memory) == 2


@pytest.mark.parametrize("kind", ["large", "without levels", "of a further size", "forgotten", "not captured"])
def test_other_pictures_are_launched(bundle: Bundle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "forgotten":
        monkeypatch.setattr(picture_graphs, "REMEMBERED", 1)
    session, picture = StreamSession(bundle), draw(bundle, 0)
    if kind == "large":
        monkeypatch.setattr(picture_graphs, "MOST_TOKENS", picture.grid.visual - 1)
    if kind == "without levels":
        picture = Visual({**picture.inputs}, picture.grid, picture.token_id)
    if kind == "of a further size":
        monkeypatch.setattr(picture_graphs, "MOST_SIZES", 1)
        for _ in range(2):
            ask(session, [draw(bundle, 0, 4, 4)])
        session.seen.clear()
    if kind == "not captured":
        session.captures_vision = False
    for _ in range(3):
        ask(session, [picture])
        if kind == "forgotten":
            ask(session, [draw(bundle, 0, 4, 4)])
    assert set(session.seen) == {None}


def test_a_run_that_cannot_be_captured_is_launched(bundle: Bundle) -> None:
    """From then on nothing is captured."""
    session, launched = StreamSession(bundle), FusedSession(bundle, "cpu")
    pictures = [draw(bundle, seed) for seed in range(3)]
    session.broken = True
    same(ask(session, pictures), ask(launched, pictures))
    session.broken = False
    same(ask(session, pictures), ask(launched, pictures))
    assert session.seen == [None] * 6 and not session.captures_vision


def test_a_captured_run_that_fails_is_told(bundle: Bundle) -> None:
    """The next one is as ever."""
    session, picture = StreamSession(bundle), draw(bundle, 0)
    wanted, _ = ask(session, [picture]), ask(session, [picture])
    session.broken = True
    with pytest.raises(UserError, match="cannot run"):
        ask(session, [picture])
    assert not session._pending
    session.broken = False
    same(ask(session, [picture]), wanted)
    assert session.seen == [None, 1, 1]


def test_each_thread_captures_for_itself(bundle: Bundle) -> None:
    session, picture = StreamSession(bundle), draw(bundle, 0)
    for _ in range(2):
        ask(session, [picture])
    thread = threading.Thread(target=lambda: [ask(session, [picture]) for _ in range(3)])
    thread.start()
    thread.join()
    ask(session, [picture])
    assert session.seen == [None, 1, None, 2, 2, 1]


def test_what_onnxruntime_does_not_capture_has_no_second_session(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FusedGraphs._open

    def refuse(self: FusedGraphs, model: Any, cuda_graph: bool = False) -> Any:
        if self.stream:
            raise UserError("vision does not open in onnxruntime (cannot use the graph capture feature)")
        return opened(self, model, cuda_graph)

    monkeypatch.setattr(FusedGraphs, "_open", refuse)
    session = StreamSession(bundle)
    assert not session.captures_vision and SMALL_VISION not in session._sessions
