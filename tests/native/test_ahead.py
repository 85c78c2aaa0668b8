"""Decode steps that run ahead of the host, over emulated kernels: a step then ends before the host goes on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import TooLongError, UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.chat import Sampling, generate
from ivc_export.runtime.onnxruntime import small_graphs
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.onnxruntime.session_options import replays_alone
from ivc_export.runtime.onnxruntime.stream import Mark, Stream
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import wide
from tests.conftest import LOGIT_TOLERANCE

PROMPT = [1, 2, 3, 4, 5, 6]


class Watched(FusedSession):
    """Notes its decode steps, and what is waited for."""

    def __init__(self, bundle: Bundle, library: Path) -> None:
        self.notes: list[str] = []
        super().__init__(bundle, "cpu", op_library=library)

    def run_bound(self, name: str, binding: object, captured: int | None = None, wait: bool = True) -> None:
        if name == "decode":
            self.notes.append("waits" if wait else "begins")
        super().run_bound(name, binding, captured, wait)

    def begun(self) -> int:
        """Decode steps since the last question."""
        found, self.notes = self.notes.count("begins"), []
        return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With tied embeddings, and a layer that keeps all rows."""
    folder, config = tmp_path_factory.mktemp("tied"), wide("qwen2_vl", heads=4) | {"tie_word_embeddings": True}
    return export(ExportRecipe(make_checkpoint(folder / "checkpoint", config), folder / "bundle"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("untied")
    return export(ExportRecipe(make_checkpoint(folder / "checkpoint", wide("qwen2_vl", heads=4)), folder / "bundle"))


@pytest.fixture(scope="module")
def plain(bundle: Bundle) -> FusedSession:
    return FusedSession(bundle, "cpu")


@pytest.fixture(scope="module")
def opened(bundle: Bundle, library: Path) -> Watched:
    return Watched(bundle, library)


@pytest.fixture
def session(opened: Watched) -> Iterator[Watched]:
    assert opened.runs_ahead
    opened.notes.clear()
    yield opened
    gc.collect()
    assert "waits" not in opened.notes


def answer(one: FusedConversation, token: int, count: int) -> list[int]:
    """The best tokens behind a token."""
    found, one.logits_wanted = [token], False
    for _ in range(count):
        found.append(one.run(found[-1:]).token)
    one.logits_wanted = True
    return found


def same(pair: Sequence[FusedConversation], tokens: list[int]) -> int:
    """Run tokens in both with logits, which are the same. Returns the best next token."""
    found, wanted = pair
    found.logits_wanted = wanted.logits_wanted = True
    step, reference = found.run(tokens), wanted.run(tokens)
    assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
    assert (found.cache.length, found.next_position) == (wanted.cache.length, wanted.next_position)
    assert step.token == reference.token
    return step.token


def test_an_answer_is_the_same_and_no_step_is_void(bundle: Bundle, session: Watched, plain: FusedSession) -> None:
    _, tokens, picture = make_prompt(bundle, draw_picture())
    for ratio in (0.4, 1.0):
        answers = [
            list(generate(one.converse(ratio), tokens, [picture], Sampling(max_tokens=9), ()))
            for one in (session, plain)
        ]
        assert answers[0] == answers[1] and len(answers[0]) == 9
        assert session.begun() == 8


def test_a_stop_token_leaves_one_void_step(bundle: Bundle, session: Watched, plain: FusedSession) -> None:
    """The conversation goes on as if there were none."""
    _, tokens, picture = make_prompt(bundle, draw_picture())
    conversations = [one.converse(0.4) for one in (session, plain)]
    known = list(generate(plain.converse(0.4), tokens, [picture], Sampling(max_tokens=9), ()))
    stop = next(token for i, token in enumerate(known[2:], 2) if token not in known[:i])
    said = [list(generate(one, tokens, [picture], Sampling(max_tokens=9), (stop,))) for one in conversations]
    assert said[0] == said[1] == known[: known.index(stop) + 1]
    assert session.begun() == len(said[0])
    same(conversations, [*said[0][-1:], 5, 6])


def test_no_step_runs_ahead_of_a_sampled_token(bundle: Bundle, session: Watched, plain: FusedSession) -> None:
    _, tokens, picture = make_prompt(bundle, draw_picture())
    sampling = Sampling(max_tokens=9, temperature=0.8, seed=3)
    said = [list(generate(one.converse(0.4), tokens, [picture], sampling, ())) for one in (session, plain)]
    assert said[0] == said[1]
    assert session.begun() == 8


def test_where_replays_wait_each_step_does(bundle: Bundle, library: Path, plain: FusedSession) -> None:
    session = Watched(bundle, library)
    session.runs_ahead = False
    conversations = [FusedConversation(one, capacity=30) for one in (session, plain)]
    token = same(conversations, PROMPT)
    said = [answer(one, token, 5) for one in conversations]
    assert said[0] == said[1]
    assert session.notes == ["waits"] * 5


@pytest.mark.parametrize("scarce", [False, True])
def test_without_tied_embeddings_the_table_is_shared(
    untied: Bundle, library: Path, scarce: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So steps run ahead. Where host memory is scarce, each step gets the row of its token, and is waited for."""
    table = untied.manifest.embedding.shape
    free = 4 * 4 * table[0] * table[1]
    monkeypatch.setattr(small_graphs, "available_bytes", lambda: free - scarce)
    monkeypatch.setattr(small_graphs, "SHARED_ROWS", 100)
    session, plain = Watched(untied, library), FusedSession(untied, "cpu")
    assert session.runs_ahead == bool(session.table) != scarce
    _, tokens, picture = make_prompt(untied, draw_picture())
    answers = [
        list(generate(one.converse(0.4), tokens, [picture], Sampling(max_tokens=9), ())) for one in (session, plain)
    ]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1
    assert session.notes == ["waits" if scarce else "begins"] * 8
    inputs = {value.name for value in session._sessions["decode"].get_inputs()}
    assert ({"row", "table", "before"} & inputs) == ({"row"} if scarce else {"table", "before"})


def test_a_table_of_another_dtype_is_not_shared(tmp_path: Path, library: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", wide("qwen2_vl", heads=4))
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype="float16"))
    assert small_graphs.shared_table(bundle, "float32", library) is None
    found = small_graphs.shared_table(bundle, "float16", library)
    assert found is not None
    tokens = np.arange(found.shape[0], dtype=np.int32)
    np.testing.assert_array_equal(found.owner, bundle.embed(tokens, np.dtype(np.float16)))


def test_a_step_begins_before_the_answer_of_the_one_before(session: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host then waits for the earlier one alone: its mark stands before the other's."""
    conversation = FusedConversation(session, capacity=20)
    conversation.run(PROMPT)
    wait, move = Mark.wait, Mark.move
    marks: list[Mark] = []

    def moved(mark: Mark) -> None:
        session.notes.append("marks")
        marks.append(mark)
        move(mark)

    def waited(mark: Mark) -> bool:
        session.notes.append("waited")
        assert mark is marks[-2] and mark is not marks[-1]
        return wait(mark)

    monkeypatch.setattr(Mark, "move", moved)
    monkeypatch.setattr(Mark, "wait", waited)
    answer(conversation, 7, 3)
    begins = ["begins", "marks"]
    assert session.notes == [*begins, *begins, "waited", *begins, "waited", *begins, "waited"]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    ("then", "begun"),
    [
        (lambda token: [token + 1], 0),
        (lambda token: [token], 0),
        (lambda token: [token, 9, 8], None),
    ],
    ids=["another token", "the same with logits", "a prompt"],
)
def test_a_void_step_leaves_nothing(
    session: Watched, plain: FusedSession, steps: int, then: Callable[[int], list[int]], begun: int | None
) -> None:
    conversations = [FusedConversation(one, capacity=60) for one in (session, plain)]
    token = same(conversations, PROMPT)
    for _ in range(3):
        said = [answer(one, token, steps) for one in conversations]
        assert said[0] == said[1] and session.begun() == steps + 1
        token = same(conversations, [t % 500 for t in then(said[0][-1])])
        assert session.begun() == (begun is not None)


def test_a_caller_who_never_takes_the_best_token_wastes_every_other_step(session: Watched, plain: FusedSession) -> None:
    conversations = [FusedConversation(one, capacity=60) for one in (session, plain)]
    same(conversations, PROMPT)
    for one in conversations:
        one.logits_wanted = False
    for number in range(8):
        best = [one.run([number + 20]).token for one in conversations]
        assert best[0] == best[1] != number + 21
    assert session.begun() == 8 + 4
    same(conversations, [5])


def test_conversations_by_turns_do_not_mix(session: Watched, plain: FusedSession) -> None:
    pairs = [[FusedConversation(one, capacity=60) for one in (session, plain)] for _ in range(3)]
    tokens = [same(pair, PROMPT[i:]) for i, pair in enumerate(pairs)]
    for one in (one for pair in pairs for one in pair):
        one.logits_wanted = False
    session.begun()
    for _ in range(6):
        for i, pair in enumerate(pairs):
            found = [one.run([tokens[i]]).token for one in pair]
            assert found[0] == found[1]
            tokens[i] = found[0]
    assert session.begun() == 3 * 7
    for i, pair in enumerate(pairs):
        same(pair, [tokens[i]])


def test_no_step_runs_ahead_of_the_caches_end(session: Watched, plain: FusedSession) -> None:
    conversations = [FusedConversation(one, capacity=len(PROMPT) + 4) for one in (session, plain)]
    token = same(conversations, PROMPT)
    said = [answer(one, token, 4) for one in conversations]
    assert said[0] == said[1] and session.begun() == 4
    with pytest.raises(TooLongError, match="give it a larger capacity"):
        conversations[0].run([1])


def test_no_step_runs_ahead_of_the_last_position(session: Watched) -> None:
    conversation = FusedConversation(session, capacity=20)
    token = conversation.run(PROMPT).token
    conversation.next_position = session.bundle.manifest.decoder.max_positions - 3
    answer(conversation, token, 3)
    assert session.begun() == 3


def test_caches_grow_behind_a_step_ahead(session: Watched, plain: FusedSession) -> None:
    conversations = [one.converse() for one in (session, plain)]
    token = same(conversations, PROMPT)
    said = [answer(one, token, 3) for one in conversations]
    assert said[0] == said[1]
    capacity = conversations[0].cache.capacity
    same(conversations, [*range(300)] * 3)
    assert conversations[0].cache.capacity > capacity
    same(conversations, [5])


def test_a_restarted_conversation_is_a_new_one(session: Watched, plain: FusedSession) -> None:
    conversations = [FusedConversation(one, capacity=30) for one in (session, plain)]
    for _ in range(2):
        token = same(conversations, PROMPT)
        said = [answer(one, token, 3) for one in conversations]
        assert said[0] == said[1]
        for one in conversations:
            one.restart()


@pytest.mark.parametrize("way", ["ended", "restarted"])
def test_caches_are_not_used_again_if_a_void_step_left_nan(session: Watched, way: str) -> None:
    conversation = FusedConversation(session, capacity=33)
    answer(conversation, conversation.run(PROMPT).token, 2)
    spoilt = conversation._workspace
    assert spoilt is not None and spoilt.ahead is not None and spoilt.last.host is not None
    spoilt.last.host.best[1] = 0
    if way == "ended":
        del conversation
        conversation = FusedConversation(session, capacity=33)
    else:
        conversation.restart()
        assert conversation.cache.capacity == 33 and conversation.cache.length == 0
    assert conversation._workspace is not spoilt and spoilt not in session._idle
    answer(conversation, conversation.run(PROMPT).token, 2)


def test_what_a_step_ahead_uses_is_freed_behind_it(
    bundle: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[bool] = []
    wait = Stream.wait

    def noted(stream: Stream) -> bool:
        waited.append(True)
        return wait(stream)

    monkeypatch.setattr(Stream, "wait", noted)
    session = FusedSession(bundle, "cpu", op_library=library)
    conversation = FusedConversation(session, capacity=20)
    answer(conversation, conversation.run(PROMPT).token, 2)
    waited.clear()
    del conversation
    gc.collect()
    assert not waited and len(session._idle) == 1
    session._idle.clear()
    gc.collect()
    assert waited


def test_a_step_that_the_device_cannot_finish_is_one_sentence(
    session: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = FusedConversation(session, capacity=20)
    token = conversation.run(PROMPT).token
    with monkeypatch.context() as broken:
        broken.setattr(Mark, "wait", lambda _: False)
        with pytest.raises(UserError, match="cannot finish a run: check that the GPU and its driver work"):
            answer(conversation, token, 1)
    assert conversation.cache.length == len(PROMPT)


def test_a_failed_step_voids_the_one_ahead(
    session: Watched, plain: FusedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = [FusedConversation(one, capacity=40) for one in (session, plain)]
    token = same(conversations, PROMPT)
    said = [answer(one, token, 2) for one in conversations]

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr(session, "run", fail)
        with pytest.raises(MemoryError):
            conversations[0].run([1, 2, 3])
    session.begun()
    said = [answer(one, tokens[-1], 2) for one, tokens in zip(conversations, said, strict=True)]
    assert said[0] == said[1] and session.begun() == 3


@pytest.mark.parametrize(("version", "alone"), [("1.24.1", False), ("1.30.0", False), ("1.31.1", True), ("2.0", True)])
def test_older_replays_of_cuda_graphs_wait(version: str, alone: bool) -> None:
    assert replays_alone(version) == alone
