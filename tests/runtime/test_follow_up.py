"""Conversations that prune again for each question, from embeddings of pictures that were kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.families.pictures import Grid, Visual
from ivc_export.runtime.chat import Chat, Sampling
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.interface import Seen, Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.verify.oracle import reference_picture
from ivc_export.verify.reference import Reference
from tests.conftest import LOGIT_TOLERANCE, SHAPES, Golden
from tests.runtime.test_conversation import FIRST, SECOND, oracle, shown, text

SHORT = Sampling(max_tokens=6)
OTHER = SHAPES.with_name("scene-1.png")
TURNS: tuple[tuple[str, list[Path]], ...] = (
    ("Where is the ring?", [SHAPES]),
    ("And the square?", []),
    ("And here?", [OTHER]),
    ("Again?", []),
)


@pytest.fixture(params=["onnxruntime-cpu", "fused"])
def session(request: pytest.FixtureRequest, sample_bundle: Bundle, sample_session: OnnxSession) -> Session:
    return sample_session if request.param == "onnxruntime-cpu" else FusedSession(sample_bundle, "cpu")


def test_an_answer_is_that_of_the_conversation_told_at_once(session: Session) -> None:
    chat = Chat(session, 0.4, sampling=SHORT)
    for number, (question, pictures) in enumerate(TURNS):
        told, seen = [*chat.messages], [*chat.seen]
        answer = "".join(chat.ask(question, pictures))
        fresh = Chat(session, 0.4, sampling=SHORT)
        asked = [fresh.processor.picture(picture) for picture in pictures]
        assert "".join(fresh.answer([*told, chat.messages[-2]], [*seen, *asked])) == answer
        assert fresh.tokens == chat.tokens and chat.step is not None and fresh.step is not None
        np.testing.assert_array_equal(fresh.step.keep_index, chat.step.keep_index)
        assert chat.conversation.timings.runs["vision"] == len(chat.seen) == (1, 1, 2, 2)[number]
        assert [look.part for look in chat.looks] == [SHAPES, OTHER][: len(chat.seen)]


def test_the_last_question_alone_votes(sample_session: OnnxSession) -> None:
    chat = Chat(sample_session, 0.4, sampling=SHORT)
    voters = []
    for question, pictures in TURNS:
        list(chat.ask(question, pictures))
        assert chat.step is not None
        run = chat.step.run
        assert run.query_index[-1] == run.rows - 1
        ids = run.tokens[run.query_index].tolist()
        voters.append(chat.processor.tokenizer.decode(ids, skip_special_tokens=False))
    assert voters[1::2] == [f"{question}<|im_end|>\n<|im_start|>assistant\n" for question, _ in TURNS[1::2]]
    first = Chat(sample_session, 0.4).processor.question("Where is the ring?", [chat.processor.picture(SHAPES)])
    place = len(first) - first[::-1].index(503) + sample_session.bundle.manifest.selection.query_offset
    assert voters[0] == chat.processor.tokenizer.decode(first[place:], skip_special_tokens=False)


def test_pruning_again_equals_the_reference(golden: Golden, golden_session: OnnxSession) -> None:
    """Rows from the question on vote, which here are fewer than those behind the last picture."""
    tokens = [*text(1, 12), *shown(FIRST), *text(2, 9), *shown(SECOND), *text(4, 30)]
    conversation = HostConversation(golden_session, 0.4)
    reference: Reference = oracle(golden, golden_session, 0.4)
    pictures = [reference_picture(golden_session.bundle, picture) for picture in (FIRST, SECOND)]
    kept = []
    seen: Sequence[Visual | Seen] = (FIRST, SECOND)
    for question in (0, len(tokens) - 8, 5):
        conversation.restart()
        reference.restart(golden_session.bundle.manifest.selection_layer, 0.4)
        step = conversation.run(tokens, seen, question=question)
        turn = reference.run(tokens, pictures, question)
        np.testing.assert_array_equal(step.keep_index, turn.keep_index.numpy())
        assert np.abs(step.logits - turn.logits.numpy()).max() < LOGIT_TOLERANCE
        kept.append(step.keep_index.tolist())
        seen = step.seen
    assert kept[0] == kept[2] != kept[1]
    assert conversation.timings.runs["vision"] == 2


def test_a_restarted_conversation_is_a_new_one(session: Session) -> None:
    wanted = session.converse(0.5).run([1, 2, 3]).logits
    for capacity in (None, 600):
        conversation = session.converse(0.5, capacity)
        conversation.run([4] * 40)
        conversation.restart()
        assert (conversation.cache.length, conversation.next_position) == (0, 0)
        assert np.abs(conversation.run([1, 2, 3]).logits - wanted).max() < LOGIT_TOLERANCE
        assert conversation.cache.length == 3


def test_a_conversation_that_outgrows_its_cache_says_what_to_do(session: Session) -> None:
    chat = Chat(session, 0.4, capacity=300, sampling=SHORT)
    assert "".join(chat.ask("Where?", [SHAPES]))
    told = [*chat.messages]
    with pytest.raises(
        UserError, match=r"larger capacity, or continue on the compacted cache \(--follow-up compacted\)$"
    ):
        list(chat.ask("And now?" * 90))
    assert chat.messages == told
    assert "".join(chat.ask("And?"))
    with pytest.raises(UserError, match=r"larger capacity$"):  # a first question has no cache to go on over
        list(Chat(session, capacity=50, sampling=SHORT).ask("Where?", [SHAPES]))


def test_pictures_that_another_bundle_saw_are_refused(golden_session: OnnxSession, sample_session: OnnxSession) -> None:
    tokens = [*text(1, 3), *shown(FIRST), *text(2, 9)]
    (seen,) = golden_session.converse().run(tokens, [FIRST]).seen
    assert seen.nbytes == FIRST.grid.visual * golden_session.bundle.manifest.decoder.hidden_size * 4
    narrow = type(seen)({"image_embeds": seen.outputs["image_embeds"][..., :-1]}, seen.grid, seen.token_id)
    other = type(seen)(seen.outputs, Grid(2, 2), seen.token_id)
    for wrong in (narrow, other):
        with pytest.raises(UserError, match="a picture was prepared by another bundle"):
            golden_session.converse().run(tokens, [wrong])


def test_a_template_that_rewrites_earlier_turns_is_followed(sample_bundle: Bundle, tmp_path: Path) -> None:
    """As those that drop what an earlier answer thought: a cache could not go on."""
    for file in sample_bundle.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "chat_template.jinja"
    path.unlink()
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if loop.last %}!{% endif %}\n"
        "{% for p in m.content %}{{ p.text if p.type == 'text' else '<|image_pad|>' }}{% endfor %}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    session = OnnxSession(Bundle(sample_bundle.folder, sample_bundle.manifest))
    session.bundle = Bundle(tmp_path, sample_bundle.manifest)
    compacted = Chat(session, sampling=SHORT, follow_up="compacted")
    list(compacted.ask("Where?", [SHAPES]))
    with pytest.raises(UserError, match="rewrites earlier turns"):
        list(compacted.ask("And now?"))
    chat = Chat(session, sampling=SHORT)
    list(chat.ask("Where?", [SHAPES]))
    assert "".join(chat.ask("And now?")) and chat.step is not None
    voters = chat.step.run.tokens[chat.step.run.query_index].tolist()
    assert chat.processor.tokenizer.decode(voters).startswith("And now?")
