"""Answers: sampling, stopping, and chats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import PIL.Image

from ivc_export.errors import TooLongError, UserError
from ivc_export.runtime.interface import Conversation, Picture, Seen, Session, Step, check_numbers
from ivc_export.runtime.processor import Look, Processor, placed
from ivc_export.runtime.videos import Video
from ivc_export.selection.method import Method
from ivc_export.text.sampling import GREEDY, Sampler
from ivc_export.text.sampling import Sampling as Sampling
from ivc_export.text.segments import THINKING_END
from ivc_export.text.template import Message, answer_message, parts_message

Medium = Path | PIL.Image.Image | Video
"""A picture, or a video."""
Part = str | Medium
"""A part of a question: text, a picture, or a video."""


def generate(
    conversation: Conversation,
    tokens: Sequence[int],
    pictures: Sequence[Picture] = (),
    sampling: Sampling | Sampler = GREEDY,
    stop: Sequence[int] | None = None,
) -> Iterator[int]:
    """Run `tokens` and yield the ids that follow, as each is drawn, with the stop token.

    sampling: a Sampler continues the draws of the conversation's earlier turns; a Sampling starts new ones. stop: ids
    that end the answer; None takes the bundle's. The last id yielded is not in the cache yet.
    """
    sampler = sampling if isinstance(sampling, Sampler) else Sampler(sampling)
    conversation.headroom = sampler.sampling.max_tokens
    step = conversation.run(tokens, pictures)
    sampler.read(tokens)
    yield from continue_from(conversation, step, sampler, stop)


def continue_from(
    conversation: Conversation,
    step: Step,
    sampler: Sampler,
    stop: Sequence[int] | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `step`, the conversation's last run, as `generate` does. `sampler` has read the step's
    tokens.

    The answer also ends at the model's last position and at the cache's last row.

    Raises:
        UserError: a logit is infinite or NaN.
    """
    manifest = conversation.session.bundle.manifest
    stop = manifest.tokens.stop if stop is None else stop
    for left in reversed(range(sampler.sampling.max_tokens)):
        if step.best is not None and sampler.sampling.takes_best:
            token = sampler.take(step.best)
        else:
            check_numbers(conversation.session, step.logits)
            token = sampler.draw(step.logits)
        yield token
        full = conversation.next_position >= manifest.decoder.max_positions or conversation.cache.room == 0
        if token in stop or not left or full:
            return
        conversation.logits_wanted, conversation.more = not sampler.sampling.takes_best, left - 1
        try:
            step = conversation.run([token])
        finally:
            conversation.logits_wanted, conversation.more = True, None


PROCESSORS: WeakKeyDictionary[Session, Processor] = WeakKeyDictionary()


def processor_of(session: Session) -> Processor:
    """The processor that all chats of a session share.

    Reading a tokenizer takes longer than many answers, and tokenizers 0.23 never frees the caches of tokenizers.

    Raises:
        UserError: see Processor.
    """
    if session not in PROCESSORS:
        PROCESSORS[session] = Processor(session.bundle)
    return PROCESSORS[session]


FollowUp = Literal["again", "compacted"]
"""How a conversation goes on: "again" prunes all of it for each question, "compacted" keeps the compacted cache."""


class Chat:
    """Questions and answers. Any turn may have pictures.

    By default each turn prunes again. Prefix and decoder run over the whole conversation, and only the last question
    votes. The pictures' embeddings are kept, so the vision encoder runs once for each picture. The answer equals that
    of the same conversation told at once.

    With follow_up "compacted", a turn runs only the text that the chat template adds. This is faster, but visual tokens
    that an earlier turn pruned are lost.

    Args:
        session: a session of `open_session`.
        ratio: the fraction of visual tokens that is kept, above 0 and up to 1. None takes the bundle's default.
        capacity: rows of the KV cache. None leaves this to the runtime.
        sampling: how tokens are drawn.
        system: the system message. None leaves it to the chat template.
        method: how visual tokens are chosen: a name, or a `Method` with a seed. None takes the bundle's method.
        follow_up: "again" or "compacted".
        most_prompt: the most tokens that one turn may run. None sets no limit.

    Raises:
        UserError: the ratio is out of range, there is no such method, or the chat template takes no system message.
    """

    def __init__(
        self,
        session: Session,
        ratio: float | None = None,
        capacity: int | None = None,
        sampling: Sampling = GREEDY,
        system: str | None = None,
        method: str | Method | None = None,
        follow_up: FollowUp = "again",
        most_prompt: int | None = None,
    ) -> None:
        self.follow_up, self.most_prompt = follow_up, most_prompt
        self.processor = processor_of(session)
        self.conversation = session.converse(ratio, capacity, method)
        self.sampler = Sampler(sampling)
        self.messages: list[Message] = [] if system is None else [self.processor.system_message(system)]
        self.tokens: list[int] = []
        """Token ids of the last answer, with the stop token."""
        self.step: Step | None = None
        """The result of the last turn's prefill. None before the first turn."""
        self.seen: tuple[Seen, ...] = ()
        """Pictures of all turns so far, with their embeddings, if each turn prunes again."""
        self.looks: list[Look] = []
        """Pictures and videos of the last turn's prefill."""
        self._prompt = self._answer = ""  # the text up to the last turn's prefill, and its answer

    def ask(self, question: str | Sequence[Part], images: Sequence[Medium] = ()) -> Iterator[str]:
        """Ask a question, and yield the answer piece by piece.

        Args:
            question: a text, or texts, pictures and videos in order. In a text, the marks `<image>` and `<video>` say
                where `images` belong. Without marks they come first.
            images: the pictures and videos of a question that is a text: paths, PIL images or `Video`.

        Raises:
            UserError: there is no text, a picture cannot be read, the number of marks differs from the number of
                pictures, or the conversation is too long.
        """
        if isinstance(question, str):
            parts: list[Part] = placed(question, images)
        elif images:
            raise UserError("pictures are given twice, within the question and beside it: give them in one place")
        else:
            parts = [*question]
        if not any(isinstance(part, str) and part.strip() for part in parts):
            raise UserError("the prompt is empty: give some text")
        timings = self.conversation.timings
        with timings.stage("pictures"):
            found = [self.processor.look(part) for part in parts if not isinstance(part, str)]
            looks = [look for look, _ in found]
            pictures = [visual for _, visuals in found for visual in visuals]
        before = self.step
        try:
            yield from self.answer([*self.messages, parts_message(parts)], [*self.seen, *pictures])
        finally:
            if self.step is not before:
                self.looks = [*self.looks, *looks] if self.follow_up == "again" else looks

    def answer(self, messages: Sequence[Message], pictures: Sequence[Picture]) -> Iterator[str]:
        """Yield the answer to a whole conversation, piece by piece. The chat continues from there.

        Args:
            messages: the conversation. Its last message is the user's. With a compacted cache, these are this chat's
                own messages and one more.
            pictures: the pictures of all messages, in order. With a compacted cache, those of the last message.

        Raises:
            UserError: the pictures do not match the messages, or the conversation is too long.
        """
        again = self.follow_up == "again"
        self.conversation.headroom = self.sampler.sampling.max_tokens
        try:
            step = self._prune_again(messages, pictures) if again else self._go_on(messages, pictures)
        except TooLongError as error:
            if again and len(messages) > 2:
                raise TooLongError(f"{error}, or continue on the compacted cache (--follow-up compacted)") from error
            raise
        self.step, self.tokens = step, []
        self.sampler.read(step.run.tokens)
        self._answer = ""
        try:
            drawn = continue_from(self.conversation, step, self.sampler)
            for piece in self.processor.stream(self._record(drawn)):
                self._answer += piece  # not every token has text: bytes of an incomplete character have none
                yield piece
        finally:  # also if the caller stops reading
            self.messages = [*messages, answer_message(self._answer)]

    def _check_length(self, tokens: Sequence[int]) -> None:
        if self.most_prompt is not None and len(tokens) > self.most_prompt:
            raise TooLongError(
                f"the prompt has {len(tokens):,} tokens, but the limit is {self.most_prompt:,}: shorten it, or use "
                "smaller pictures"
            )

    def _prune_again(self, messages: Sequence[Message], pictures: Sequence[Picture]) -> Step:
        """Run the prefill of a whole conversation, in which only rows behind the last answer vote."""
        with self.conversation.timings.stage("tokens"):
            tokens, question = self.processor.conversation(messages, pictures)
            self._check_length(tokens)
        self.conversation.restart()
        step = self.conversation.run(tokens, pictures, question=question)
        pairs = zip(step.seen, pictures, strict=True)
        self.seen = tuple(replace(seen, before=picture.before, more=picture.more) for seen, picture in pairs)
        return step

    def _go_on(self, messages: Sequence[Message], pictures: Sequence[Picture]) -> Step:
        """Run the prefill of the text that the last message adds to the cache."""
        with self.conversation.timings.stage("tokens"):
            rendered = self.processor.render(messages)
            added = self._added(rendered)
            self.processor.check_places(messages[-1], added)
            addition = self.processor.encode(self.processor.timed(added, pictures), pictures, begin=not self._prompt)
            self._check_length(addition)
        # The last id drawn is not in the cache. A stop token is in the template's addition; any other is not.
        if self.tokens and self.finish == "length":
            self.conversation.run(self.tokens[-1:])
        self.tokens = []
        step = self.conversation.run(addition, pictures)
        self._prompt = rendered
        return step

    def _added(self, rendered: str) -> str:
        """The text that the template adds behind the last answer. Around the answer it may add or strip blanks.

        Raises:
            UserError: it changed more than that.
        """
        if rendered.startswith(self._prompt):
            rest = rendered.removeprefix(self._prompt)
            spoken = self._answer.rpartition(THINKING_END)[2].strip()  # dropped thoughts stay in the cache
            for answer in dict.fromkeys((self._answer, self._answer.strip(), spoken)):
                before, _, added = rest.partition(answer) if answer else ("", "", rest)
                if answer in rest and not before.strip():
                    return added
        raise UserError(
            "the chat template rewrites earlier turns, which the cache already holds: use --follow-up again, or "
            "start a new chat"
        )

    def _record(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.tokens.append(token)
            yield token

    @property
    def finish(self) -> str:
        """Why the last answer ended: "stop" (a stop token) or "length" (no room or no more tokens wanted)."""
        stop: tuple[int, ...] = self.conversation.session.bundle.manifest.tokens.stop
        return "stop" if self.tokens and self.tokens[-1] in stop else "length"
