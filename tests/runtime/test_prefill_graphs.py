"""Short prefills whose form comes again, over a stream that does on the host, at once, what it is given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.interface import Conversation, Picture, Step
from ivc_export.runtime.onnxruntime import prefill_graphs, staging
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.fused_graphs import SHORT, FusedGraphs
from ivc_export.runtime.onnxruntime.shown import ShownSession
from ivc_export.runtime.onnxruntime.staging import Staging
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.runtime.test_picture_graphs import HostStream, draw

Play = Callable[[FusedSession, int], list[Step]]
"""Conversations in a session, with contents drawn from a seed."""
COUNTED = (*SHORT, *SHORT.values())


class AgainSession(ShownSession):
    """A session on such a stream, with all tensors in its Steps.

    runs: for each prefill the number of the CUDA graphs that it would replay, or None if it is launched. broken: a
    graph that fails.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "cpu")
        self.runs: list[int | None] = []
        self.broken = ""
        self.stream = HostStream()  # type: ignore[assignment]
        self._staging = Staging(self.stream, "cpu")  # type: ignore[arg-type]
        self.captures_prefills = self._open_again({SHORT[name]: self.lowered(name, self.lowering) for name in SHORT})

    def run_bound(self, name: str, binding: Any, captured: int | None = None, wait: bool = True) -> None:
        if name == self.broken:
            raise UserError(f"{name} cannot run")
        super().run_bound(name, binding, captured, wait)
        if name in COUNTED:
            assert (captured is None) == (name in SHORT)
            self._number = captured

    def prefill(self, *given: Any) -> Any:
        found = super().prefill(*given)
        self.runs.append(self._number)
        return found


@pytest.fixture(autouse=True)
def _host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(library: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        del library
        return np.zeros(shape, dtype)

    monkeypatch.setattr(staging, "shared_array", zeros)


def make_bundle(family: str, folder: Path) -> Bundle:
    return export(ExportRecipe(make_checkpoint(folder / "checkpoint", TINY[family]), folder / "bundle"))


# with features of layers; in tiles, and in views, where a layer keeps all rows; without a shared embedding table
@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "llava", "deepseek_vl_v2", "internvl"])
def any_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle("qwen2_vl", tmp_path_factory.mktemp("qwen2_vl"))


def prompt(bundle: Bundle, seed: int, pictures: Sequence[Picture] = (), text: int = 3) -> list[int]:
    marks, draws = bundle.manifest.tokens, np.random.default_rng(seed)
    before, behind = ([t] if t is not None else [] for t in (marks.vision_start, marks.vision_end))
    shown = [token for picture in pictures for token in (*before, *picture.tokens, *behind)]
    return [1, 2, *shown, *draws.integers(3, 400, text).tolist()]


def ask(one: Conversation, seed: int, sizes: Sequence[tuple[int, int]] = ((3, 2),), text: int = 3) -> Step:
    """Pictures and text drawn from a seed."""
    bundle = one.session.bundle
    pictures = [draw(bundle, 100 * seed + i, *size) for i, size in enumerate(sizes)]
    return one.run(prompt(bundle, seed, pictures, text), pictures)


def answer(one: Conversation, steps: int = 2) -> list[Step]:
    """Decode steps, which read what a prefill has left in the caches."""
    return [one.run([5 + step]) for step in range(steps)]


def outputs(step: Step) -> dict[str, npt.NDArray[Any]]:
    vision = {f"{name}/{i}": array for i, found in enumerate(step.vision) for name, array in found.items()}
    return {**vision, **step.prefix, **step.decoder, "keep_index": step.keep_index}


def check(
    bundle: Bundle,
    play: Play,
    wanted: Sequence[int | None],
    session: AgainSession | None = None,
    differ: bool = True,
) -> None:
    """Play three times, and compare all tensors with those of launched prefills, after all have run. differ: whether no
    two steps have the same logits."""
    again, launched = session or AgainSession(bundle), ShownSession(bundle, "cpu")
    steps = [pair for seed in range(3) for pair in zip(play(again, seed), play(launched, seed), strict=True)]
    assert again.runs == [*wanted]
    assert not again._pending
    for found, reference in steps:
        ours, theirs = outputs(found), outputs(reference)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert not differ or len({found.logits.tobytes() for found, _ in steps}) == len(steps)


def test_a_form_that_comes_again_is_captured(any_bundle: Bundle) -> None:
    def play(session: FusedSession, seed: int) -> list[Step]:
        one = session.converse(0.5)
        return [ask(one, seed), *answer(one)]

    check(any_bundle, play, [None, 1, 1])


def test_turns_are_captured_by_what_the_caches_hold(any_bundle: Bundle) -> None:
    """In either set of buffers, behind rows of any number, with pictures or text alone."""

    def play(session: FusedSession, seed: int) -> list[Step]:
        one = session.converse(0.5)
        steps = [ask(one, seed), *answer(one), ask(one, seed + 10, ()), ask(one, seed + 20, ())]
        return [*steps, *answer(one), ask(one, seed + 30), *answer(one)]

    check(any_bundle, play, [None] * 4 + [1, 2, 3, 4] * 2)


def test_conversations_by_turns_have_their_own(bundle: Bundle) -> None:
    """Each has a workspace, to which the next conversation comes back."""

    def play(session: FusedSession, seed: int) -> list[Step]:
        first, second = session.converse(0.5, 64), session.converse(0.5, 64)
        steps = [ask(first, seed), ask(second, seed + 10), *answer(first), *answer(second)]
        return [*steps, ask(first, seed + 20, ()), ask(second, seed + 30, ()), *answer(first), *answer(second)]

    check(bundle, play, [None, 1, None, 2, 3, 1, 4, 2, 3, 1, 4, 2])


def test_forms_are_captured_apart(bundle: Bundle) -> None:
    """By how many rows of each kind there are, and how many are kept. Sizes and order of pictures are content."""

    def play(session: FusedSession, seed: int) -> list[Step]:
        asked = [(0.5, [(3, 2)], 3), (0.5, [(3, 2)], 4), (0.25, [(3, 2)], 3), (0.5, [(3, 2), (4, 4)], 3)]
        asked += [(0.5, [(4, 4), (3, 2)], 3), (0.5, [(2, 3)], 3)]
        return [ask(session.converse(ratio), seed, sizes, text) for ratio, sizes, text in asked]

    check(bundle, play, [None, None, None, None, 1, 2] + [2, 3, 4, 1, 1, 2] * 2)


def test_rows_that_vote_make_a_form(bundle: Bundle) -> None:
    def play(session: FusedSession, seed: int) -> list[Step]:
        picture = draw(bundle, seed)
        tokens = prompt(bundle, seed, [picture], 6)
        return [session.converse(0.5).run(tokens, [picture], None, len(tokens) - voting) for voting in (3, 2, 3)]

    check(bundle, play, [None, None, 1] + [1, 2, 1] * 2, differ=False)


def test_either_set_of_buffers_makes_a_form(bundle: Bundle) -> None:
    """Behind equally many rows."""

    def play(session: FusedSession, seed: int) -> list[Step]:
        steps = []
        for turns in ([7, 3], [3, 4, 3]):
            one = session.converse(0.5)
            steps += [ask(one, 10 * seed + i, (), rows - 2) for i, rows in enumerate(turns)]
        return steps

    check(bundle, play, [None] * 5 + [1, 2, 3, 4, 5] * 2)


def test_caches_of_another_size_make_a_form(bundle: Bundle) -> None:
    def play(session: FusedSession, seed: int) -> list[Step]:
        return [ask(session.converse(0.5, capacity), 10 * seed + capacity) for capacity in (64, 96)]

    check(bundle, play, [None, None, 1, 2, 1, 2])


def test_other_contents_of_one_form(bundle: Bundle) -> None:
    """Rows that a caller chooses, methods, and pictures that were seen before."""

    def play(session: FusedSession, seed: int) -> list[Step]:
        picture, one = draw(bundle, seed), session.converse(0.5)
        tokens = prompt(bundle, seed, [picture])
        steps = [one.run(tokens, [picture], np.array([0, 2 + seed, 5, len(tokens) - 1])), *answer(one)]
        for method in ("ivc-prune", "foreground"):
            one = session.converse(0.5, method=method)
            steps += [one.run(tokens, steps[0].seen), *answer(one)]
        return steps

    check(bundle, play, [None, None, 1] + [2, 1, 1] * 2)


def test_a_cache_that_grows_is_another(bundle: Bundle) -> None:
    def play(session: FusedSession, seed: int) -> list[Step]:
        one = session.converse(0.5)
        one.headroom = 0
        return [ask(one, seed), ask(one, seed + 10, (), 600), *answer(one), ask(one, seed + 20)]

    check(bundle, play, [None] * 3 + [1, 2, 3] * 2)


def test_a_conversation_starts_again(bundle: Bundle) -> None:
    def play(session: FusedSession, seed: int) -> list[Step]:
        one = session.converse(0.5, 64)
        steps = [ask(one, seed), *answer(one)]
        one.restart()
        return [*steps, ask(one, seed + 10), *answer(one)]

    check(bundle, play, [None, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("kind", ["long", "of a further form", "forgotten", "not captured"])
def test_other_prefills_are_launched(bundle: Bundle, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session, more = AgainSession(bundle), kind in ("of a further form", "forgotten")
    if kind == "long":
        monkeypatch.setattr(prefill_graphs, "MOST_ROWS", len(prompt(bundle, 0, [draw(bundle, 0)])) - 1)
    if kind == "forgotten":
        monkeypatch.setattr(prefill_graphs, "REMEMBERED", 1)
    if kind == "of a further form":
        monkeypatch.setattr(prefill_graphs, "MOST_FORMS", 1)
        for seed in range(2):
            ask(session.converse(0.5), seed, (), 9)
        session.runs.clear()
    if kind == "not captured":
        session.captures_prefills = False

    def play(session: FusedSession, seed: int) -> list[Step]:
        between = [ask(session.converse(0.5), seed, (), 5)] if more else []
        return [*between, ask(session.converse(0.5), seed)]

    check(bundle, play, [None] * 3 * (1 + more), session)


@pytest.mark.parametrize("broken", SHORT.values())
def test_a_run_that_cannot_be_captured_is_launched(bundle: Bundle, broken: str) -> None:
    """From then on nothing is captured."""
    session = AgainSession(bundle)
    session.broken = broken

    def play(session: FusedSession, seed: int) -> list[Step]:
        one = session.converse(0.5)
        return [ask(one, seed), *answer(one)]

    check(bundle, play, [None, None, None], session)
    assert not session.captures_prefills


@pytest.mark.parametrize("broken", SHORT.values())
def test_a_captured_run_that_fails_is_told(bundle: Bundle, broken: str) -> None:
    """The next one is as ever."""
    session = AgainSession(bundle)
    for seed in range(2):
        ask(session.converse(0.5), seed)
    session.broken = broken
    with pytest.raises(UserError, match="cannot run"):
        ask(session.converse(0.5), 2)
    assert not session._pending
    session.broken = ""
    session.runs.clear()

    def play(session: FusedSession, seed: int) -> list[Step]:
        one = session.converse(0.5)
        return [ask(one, seed), *answer(one)]

    check(bundle, play, [1, 1, 1], session)


def test_each_thread_captures_for_itself(bundle: Bundle) -> None:
    session = AgainSession(bundle)
    for seed in range(2):
        ask(session.converse(0.5), seed)
    thread = threading.Thread(target=lambda: [ask(session.converse(0.5), seed) for seed in range(3)])
    thread.start()
    thread.join()
    ask(session.converse(0.5), 5)
    assert session.runs == [None, 1, None, 2, 2, 1]


def test_captured_runs_share_memory(bundle: Bundle) -> None:
    """A larger form takes more."""
    session = AgainSession(bundle)
    for text in (30, 3, 60):
        for seed in range(2):
            ask(session.converse(0.5), seed, (), text)
    assert session.runs == [None, 1, None, 2, None, 3] and len(session._memory) == 2


def test_stages_are_timed(bundle: Bundle) -> None:
    session = AgainSession(bundle)
    for seed in range(3):
        one = session.converse(0.5)
        ask(one, seed)
        assert one.timings.runs == {"vision": 1, "prefill.prefix": 1, "prefill.decoder": 1}
    assert session.runs == [None, 1, 1]


def test_what_onnxruntime_does_not_capture_has_no_second_session(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FusedGraphs._open

    def refuse(self: FusedGraphs, model: Any, cuda_graph: bool = False) -> Any:
        if self.stream and model.graph.name == "decoder":
            raise UserError("decoder does not open in onnxruntime (cannot use the graph capture feature)")
        return opened(self, model, cuda_graph)

    monkeypatch.setattr(FusedGraphs, "_open", refuse)
    session = AgainSession(bundle)
    assert not session.captures_prefills and not {*SHORT.values()} & {*session._sessions}
