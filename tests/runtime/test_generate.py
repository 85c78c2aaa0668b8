from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.chat import Chat, FollowUp, Sampling, continue_from, generate
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.processor import Processor, user_message
from ivc_export.text.sampling import Sampler
from tests.conftest import SHAPES, make_overflowing_checkpoint

SHORT = Sampling(max_tokens=6)


def test_a_chat_feeds_what_the_template_adds(sample_session: OnnxSession) -> None:
    """The cache after two turns holds the whole rendered conversation, but for what was pruned and the last id."""
    chat, processor = Chat(sample_session, 0.5, sampling=SHORT, follow_up="compacted"), Processor(sample_session.bundle)
    first = "".join(chat.ask("Where is the ring?", [SHAPES]))
    tokens = chat.tokens
    assert (len(tokens), chat.finish) == (6, "length")
    assert chat.conversation.cache.length == chat.step.run.rows - 96 + 5  # type: ignore[union-attr]
    rows = chat.conversation.cache.length
    second = "".join(chat.ask("And now?", [SHAPES]))
    assert first and second
    messages = [
        user_message("Where is the ring?", 1),
        {"role": "assistant", "content": first},
        user_message("And now?", 1),
    ]
    rendered = processor.render(messages).removeprefix(processor.render(messages[:1]) + first)
    added = processor.encode(rendered, [processor.picture(SHAPES)])
    assert chat.step is not None
    assert chat.step.run.tokens.tolist() == added
    assert chat.conversation.cache.length == rows + 1 + len(added) - 96 + 5  # 1: the last id of the first answer
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize("follow_up", get_args(FollowUp))
def test_a_chat_abandoned_mid_answer_goes_on(sample_session: OnnxSession, follow_up: FollowUp) -> None:
    chat = Chat(sample_session, sampling=SHORT, follow_up=follow_up)
    answer = chat.ask("Where?", [SHAPES])
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    said = len(chat.tokens)
    assert 0 < said < 6
    assert "".join(chat.ask("Again?"))
    assert len(chat.tokens) == 6


def test_the_same_question_has_the_same_answer(sample_session: OnnxSession) -> None:
    for sampling in (SHORT, Sampling(temperature=0.8, top_p=0.9, seed=3, max_tokens=6)):
        answers = {"".join(Chat(sample_session, sampling=sampling).ask("Where?", [SHAPES])) for _ in range(2)}
        assert len(answers) == 1


def test_turns_of_a_conversation_draw_on_and_runs_repeat(
    sample_session: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(temperature=2.0, max_tokens=8, seed=5)

    def turns(sampler: Sampling | Sampler) -> list[list[int]]:
        """The same prompt twice, each over a cache of its own, so that only the random numbers differ."""
        return [list(generate(HostConversation(sample_session), [1, 2, 3], sampling=sampler, stop=())) for _ in "ab"]

    first, second = turns(Sampler(sampling))
    assert first != second
    assert turns(Sampler(sampling)) == [first, second]
    assert turns(sampling) == [first, first]
    begun: list[int] = []
    whole = np.random.default_rng

    def begin(seed: int) -> np.random.Generator:
        begun.append(seed)
        return whole(seed)

    monkeypatch.setattr(np.random, "default_rng", begin)
    chat = Chat(sample_session, sampling=sampling)
    for _ in range(3):
        list(chat.ask("Where?"))
    assert begun == [5]


def test_stop_tokens_end_an_answer_and_are_not_run(sample_session: OnnxSession) -> None:
    free = list(generate(HostConversation(sample_session), [1, 2, 3], sampling=SHORT, stop=()))
    conversation = HostConversation(sample_session)
    stopped = list(generate(conversation, [1, 2, 3], sampling=SHORT, stop=(free[2],)))
    assert stopped == [*itertools.takewhile(lambda token: token != free[2], free), free[2]]
    assert conversation.cache.length == 3 + len(stopped) - 1


def test_an_answer_ends_at_the_models_last_position(sample_session: OnnxSession) -> None:
    conversation = HostConversation(sample_session)
    conversation.run([5] * 4093)
    assert len(list(generate(conversation, [6], sampling=Sampling(max_tokens=50), stop=()))) == 3
    with pytest.raises(UserError, match="this model has 4,096 positions"):
        conversation.run([7])


def test_an_answer_ends_at_the_caches_last_row(sample_session: OnnxSession) -> None:
    conversation = HostConversation(sample_session, capacity=6)
    assert len(list(generate(conversation, [1, 2, 3], stop=()))) == 4
    assert conversation.cache.room == 0
    assert HostConversation(sample_session).cache.room is None


def test_logits_that_are_no_numbers_end_an_answer(tmp_path: Path) -> None:
    checkpoint = make_overflowing_checkpoint(tmp_path / "checkpoint")
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", dtype="float16"))
    assert len(list(generate(OnnxSession(bundle).converse(), [7, 8, 9, 10], sampling=SHORT, stop=()))) == 6
    narrow = OnnxSession(bundle, dtype="float16").converse()
    with pytest.raises(
        UserError, match=r"exceed the range of float16 on onnxruntime-cpu: compute in float32, which is the"
    ):
        next(generate(narrow, [7, 8, 9, 10]))


@pytest.mark.parametrize(
    ("backend", "dtype", "advice"),
    [
        ("onnxruntime-cpu", "float32", r"NaN logits in float32 on onnxruntime-cpu, so its weights are damaged"),
        (
            "onnxruntime-cpu",
            "float16",
            r"range of float16 on onnxruntime-cpu: compute in float32, which is the default on this backend$",
        ),
        ("onnxruntime-cuda", "float16", r"range of float16 on onnxruntime-cuda: use --backend onnxruntime-cpu"),
        (
            "tensorrt",
            "float16",
            r"range of float16 on tensorrt: use --backend onnxruntime-cpu, or build engines with --dtype float32",
        ),
        ("tensorrt", "float32", r"NaN logits in float32 on tensorrt, so its weights are damaged"),
    ],
)
def test_advice_on_such_logits_is_never_what_is_done_already(
    sample_bundle: Bundle, backend: str, dtype: FloatName, advice: str
) -> None:
    session = OnnxSession(sample_bundle)
    session.backend, session.dtype = backend, dtype
    conversation = session.converse()
    step = conversation.run([7, 8, 9])
    step.decoder["logits"][0, 0, 5] = np.nan
    with pytest.raises(UserError, match=advice):
        next(continue_from(conversation, step, Sampler()))


def test_an_answer_of_image_tokens_does_not_end_the_chat(sample_session: OnnxSession) -> None:
    chat = Chat(sample_session, sampling=SHORT, follow_up="compacted")
    assert "".join(chat.ask("Where?", [SHAPES]))
    chat.tokens[-1] = 503  # as if the model had drawn it last
    assert "".join(chat.ask("And here?", [SHAPES]))


@pytest.mark.parametrize(
    ("answer", "rest", "added"),
    [
        ("It is.", "It is.<|im_end|>\nuser", "<|im_end|>\nuser"),
        ("It is.", " It is. USER: And now?", " USER: And now?"),  # Llama's templates write the blanks themselves
        ("It is.\n", "It is.<|im_end|>", "<|im_end|>"),  # others strip them
        ("", "<|im_end|>", "<|im_end|>"),
        ("<think>Hm.</think>\n\nIt is.", "It is.<|im_end|>", "<|im_end|>"),  # templates that drop thoughts
        ("<think>Hm.</think>", "<|im_end|>", "<|im_end|>"),
        ("It is.", "It was.<|im_end|>", None),
        ("is", "It is.", None),
    ],
)
def test_a_template_may_set_blanks_around_an_answer(
    sample_session: OnnxSession, answer: str, rest: str, added: str | None
) -> None:
    chat = Chat(sample_session)
    chat._prompt, chat._answer = "Where? ASSISTANT:", answer
    if added is None:
        with pytest.raises(UserError, match="rewrites earlier turns"):
            chat._added(f"Where? ASSISTANT:{rest}")
    else:
        assert chat._added(f"Where? ASSISTANT:{rest}") == added
    with pytest.raises(UserError, match="rewrites earlier turns"):
        chat._added(f"Who? ASSISTANT:{rest}")


def test_an_empty_question_is_refused(sample_session: OnnxSession) -> None:
    with pytest.raises(UserError, match="empty"):
        next(iter(Chat(sample_session).ask("  ")))


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.01, float("nan")])
def test_ratios_out_of_range(sample_session: OnnxSession, ratio: float) -> None:
    with pytest.raises(UserError, match="out of range"):
        HostConversation(sample_session, ratio)


def test_chats_of_a_session_share_one_tokenizer(sample_bundle: Bundle) -> None:
    """tokenizers keeps what each of its instances has cached for good: memory would grow with every chat."""
    one, other = OnnxSession(sample_bundle), OnnxSession(sample_bundle)
    assert Chat(one).processor is Chat(one).processor
    assert Chat(one).processor is not Chat(other).processor
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
