"""Turns chat templates into segments that need no Jinja. Rendering finds them and proves them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ivc_export.contract.manifest import Blanks, ChatSegments, PastAnswer, PictureText, Segment, Spoken
from ivc_export.errors import UserError
from ivc_export.text.template import ChatTemplate, Message, answer_message, parts_message

CONVERSATIONS = 40
"""How many conversations are generated, for which segments must write the same text as the template."""
THINKING_END = "</think>"
QUESTIONS, ANSWERS, SYSTEM = ("Q1q", "Q2q", "Q3q"), ("A1a", "A2a"), "S1s"
ENDS = "\n \n"
"""Added to both ends of a text, to show which characters are stripped."""


class UnfitError(Exception):
    """Segments cannot express the template."""


def find_segments(template: ChatTemplate, source: str) -> ChatSegments:
    """The segments of a chat template.

    source: its text.

    Raises:
        UnfitError: no segments write the same text as the template.
    """
    if "strftime_now" in source:
        raise UnfitError("it contains the date")
    try:
        found = probed(template)
        prove(template, found)
    except UserError as error:
        raise UnfitError(str(error)) from error
    return found


def segments_text(segments: ChatSegments, messages: Sequence[Message]) -> str:
    """The text of a conversation up to the assistant's answer, written by segments.

    messages: one system message or none, then the user's and the assistant's in turn, the user's last.
    """
    begin, rest = segments.begin, messages
    if messages[0]["role"] == "system" and begin is not None:
        pieces, rest = [spoken(begin, message_text(messages[0]))], messages[1:]
    else:
        pieces = [segments.begin_without_system]
    user = segments.first_user
    for message in rest:
        if message["role"] == "user":
            pieces += [user.before, user_text(segments, message["content"]), user.behind]
            user = segments.user
        else:
            pieces.append(past_answer(segments.assistant_past, message_text(message)))
    return "".join([*pieces, segments.assistant_open])


def message_text(message: Message) -> str:
    """The text of a message of one text."""
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def user_text(segments: ChatSegments, content: Sequence[Mapping[str, Any]]) -> str:
    """The parts of a user's message."""
    picture = segments.picture
    if picture.first:
        content = sorted(content, key=lambda part: bool(part["type"] == "text"))
    pieces, text_seen = [], False
    for i, part in enumerate(content):
        if part["type"] == "text":
            pieces.append(spoken(segments.text, part["text"]))
            text_seen = True
            continue
        follows = content[i + 1].get("text", "") if i + 1 < len(content) else ""
        line = "" if text_seen or follows.startswith(picture.line) else picture.line
        pieces.append(picture.text + line)
    return "".join(pieces)


def past_answer(segment: PastAnswer, text: str) -> str:
    """An earlier answer."""
    if segment.thinking_end is not None and segment.thinking_end in text:
        text = stripped(text.rpartition(segment.thinking_end)[2], segment.thinking_left, "none")
    return spoken(segment, text)


def spoken(segment: Spoken, text: str) -> str:
    """A text, stripped at its ends, within its segment."""
    return segment.before + stripped(text, segment.left, segment.right) + segment.behind


def stripped(text: str, left: Blanks, right: Blanks) -> str:
    """A text without the characters that are stripped from its ends."""
    if left != "none":
        text = text.lstrip("\n" if left == "newlines" else None)
    if right != "none":
        text = text.rstrip("\n" if right == "newlines" else None)
    return text


def probed(template: ChatTemplate) -> ChatSegments:
    """Segments that fit the template's text of a few conversations.

    Raises:
        UnfitError: none fit. UserError: the template refuses such a conversation.
    """
    (one, two, three), (answer, second) = QUESTIONS, ANSWERS
    before, behind = around(closed(template, parts_message([one])), one)
    between = around(closed(template, parts_message([one, two])), one, two)[1]
    prompt = template.render([parts_message([one])])
    pieces = around(
        closed(
            template,
            *(parts_message([one]), answer_message(answer), parts_message([two])),
            *(answer_message(second), parts_message([three])),
        ),
        *(one, answer, two, second, three),
    )
    ended = around(closed(template, parts_message([one]), answer_message(answer)), one, answer)[2]
    text = ends(Spoken(before="", behind=between), closed(template, parts_message([f"{ENDS}{one}{ENDS}"])), one, before)
    begin, user_before = system_segment(template, before)
    past_behind = ended if pieces[2].startswith(ended) else ""
    past = Spoken(before=without(pieces[1], behind), behind=past_behind)
    return ChatSegments(
        begin=begin,
        begin_without_system=before.removesuffix(user_before),
        first_user=Segment(before=user_before, behind=without(behind, between)),
        user=Segment(before=without(pieces[2], past_behind), behind=without(pieces[5], between)),
        text=text,
        picture=picture_text(template, before, between),
        assistant_open=without(prompt, before + one + behind),
        assistant_past=past_segment(template, past, before + one + behind + past.before),
    )


def closed(template: ChatTemplate, *messages: Message) -> str:
    """The text of a conversation that ends with its last message."""
    return template.render(messages, add_generation_prompt=False)


def around(text: str, *marks: str) -> list[str]:
    """The texts around the marks. The text must have each mark once, in their order.

    Raises:
        UnfitError: it has not.
    """
    pieces = re.split("|".join(marks), text)
    if re.findall("|".join(marks), text) != list(marks):
        raise UnfitError("it changes, repeats or drops the text of messages")
    return pieces


def without(text: str, beginning: str) -> str:
    """A text without its beginning.

    Raises:
        UnfitError: it begins with something else.
    """
    if not text.startswith(beginning):
        raise UnfitError("its text around a message depends on the next message")
    return text.removeprefix(beginning)


def system_segment(template: ChatTemplate, before: str) -> tuple[Spoken | None, str]:
    """The text around a system message, if the template takes one, and the text before the user's first message.

    before: the template's text before that without a system message.
    """
    one = QUESTIONS[0]
    try:
        system = template.system_message(f"{ENDS}{SYSTEM}{ENDS}")
    except UserError:
        return None, before
    plain = closed(template, template.system_message(SYSTEM), parts_message([one]))
    head, behind, _ = around(plain, SYSTEM, one)
    shared = 0
    while shared < min(len(before), len(behind)) and before[-1 - shared] == behind[-1 - shared]:
        shared += 1
    user_before = before[len(before) - shared :]
    begin = Spoken(before=head, behind=behind.removesuffix(user_before))
    return ends(begin, closed(template, system, parts_message([one])), SYSTEM, head), user_before


def ends(segment: Spoken, text: str, mark: str, head: str) -> Spoken:
    """The segment, with the characters that are stripped from a text of `mark` between ENDS.

    text: the template's text. head: the text before the segment.

    Raises:
        UnfitError: it strips other characters than Blanks names.
    """
    left, right = around(text, mark)
    kinds: list[tuple[Blanks, str, str]] = [
        ("none", ENDS, ENDS),
        ("newlines", ENDS.lstrip("\n"), ENDS.rstrip("\n")),
        ("blanks", "", ""),
    ]
    lefts = [kind for kind, at_left, _ in kinds if left == head + at_left]
    rights = [kind for kind, _, at_right in kinds if right.startswith(at_right + segment.behind)]
    if not lefts or not rights:
        raise UnfitError("it changes whitespace at the ends of a text")
    return segment.model_copy(update={"left": lefts[0], "right": rights[0]})


def picture_text(template: ChatTemplate, before: str, between: str) -> PictureText:
    """The text that stands for a picture."""
    one, two, _ = QUESTIONS
    leading = without(around(closed(template, parts_message([None, one])), one)[0], before)
    head, within, _ = around(closed(template, parts_message([one, None, two])), one, two)
    if within == between:
        return PictureText(text=without(head, before), line="", first=True)
    text = without(within, between)
    return PictureText(text=text, line=without(leading, text), first=False)


def past_segment(template: ChatTemplate, past: Spoken, head: str) -> PastAnswer:
    """The text around an earlier answer, and the characters that are stripped from it.

    head: the text before it.
    """
    one, two, _ = QUESTIONS
    answer, thought = ANSWERS

    def told(text: str) -> str:
        return closed(template, parts_message([one]), answer_message(text), parts_message([two]))

    found = ends(past, told(f"{ENDS}{answer}{ENDS}"), answer, head)
    rendered = told(f"<think>\n{thought}\n{THINKING_END}{ENDS}{answer}{ENDS}")
    if thought in rendered:
        return PastAnswer(**dict(found))
    kept = ends(past.model_copy(update={"behind": ""}), rendered, answer, head)
    return PastAnswer(**dict(found), thinking_end=THINKING_END, thinking_left=kept.left)


def prove(template: ChatTemplate, segments: ChatSegments) -> None:
    """Check on generated conversations that segments write the same text as the template.

    Raises:
        UnfitError: they do not. UserError: the template refuses one of them.
    """
    source = random.Random(0)
    for number in range(CONVERSATIONS):
        messages = conversation(template, segments, number % 4, source)
        if segments_text(segments, messages) != template.render(messages):
            raise UnfitError("it renders some conversations differently")


def conversation(template: ChatTemplate, segments: ChatSegments, turns: int, source: random.Random) -> list[Message]:
    """A conversation of so many earlier turns, with pictures anywhere, blanks at the ends of texts, and thinking."""
    messages: list[Message] = []
    if segments.begin is not None and source.random() < 0.5:
        messages.append(template.system_message("Be brief." + blanks(source)))
    for turn in range(turns + 1):
        parts = [None if source.random() < 0.5 else utterance(source) for _ in range(source.randint(0, 4))]
        parts.insert(source.randint(0, len(parts)), utterance(source))
        messages.append(parts_message(parts))
        if turn < turns:
            thought = f"<think>{utterance(source)}{THINKING_END}" if source.random() < 0.4 else ""
            messages.append(answer_message(blanks(source) * (not thought) + thought + utterance(source)))
    return messages


def utterance(source: random.Random) -> str:
    """Something said, with or without blanks at its ends."""
    words = source.choice(["What is it?", "Ça va — 你好?", "line\n\nline", "<think>", "7", "USER: hm", "{{ x }}"])
    return blanks(source) + words + blanks(source)


def blanks(source: random.Random) -> str:
    """Blanks, or none."""
    return source.choice(["", "", "", " ", "\n", "\n\n", " \n", "\n ", "\t", "\u00a0"])
