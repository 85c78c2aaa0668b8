"""Reads the files of a checkpoint that make prompts, and checks them: chat template, special tokens, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.contract.manifest import ChatSegments, SpecialTokens
from ivc_export.contract.names import CHAT_TEMPLATE, TOKENIZER_CONFIG
from ivc_export.errors import UserError
from ivc_export.families.family import Family, Model
from ivc_export.text.sampling import GENERATION_CONFIG, greedy_note
from ivc_export.text.segments import UnfitError, find_segments
from ivc_export.text.template import ChatTemplate, Message
from ivc_export.text.tokenizer import ADVICE, CheckpointTokenizer, checkpoint_tokenizer, tokenizer_config

PROCESSOR = "processor_config.json"
OLD_TEMPLATE = "chat_template.json"
NAMED_TEMPLATE = "additional_chat_templates/default.jinja"
ANSWER = "An answer"


@dataclass(frozen=True)
class Prompts:
    """Everything that makes prompts of conversations.

    tokenizer: None for a checkpoint without one. tokenizer_config: empty if there is none. segments: the template
    without Jinja, if segments can express it. notes: remarks for the user, one sentence each.
    """

    tokenizer: CheckpointTokenizer | None
    tokenizer_config: Mapping[str, Any]
    tokens: SpecialTokens
    chat_template: str
    segments: ChatSegments | None
    notes: tuple[str, ...]


def read_prompts(checkpoint: Checkpoint, family: Family, model: Model) -> Prompts:
    """Read and check the files of tokenizer and processor that make prompts.

    Raises:
        UserError: one is damaged, or they do not fit each other.
        ValidationError: an id is not valid.
    """
    texts = family.token_texts
    config: Mapping[str, Any] = tokenizer_config(checkpoint)
    found = checkpoint_tokenizer(checkpoint, config)
    config, tokenizer = (found.config, found.tokenizer) if found else (config, None)
    source, notes = chat_template(checkpoint, family)
    where = f"the chat template, or {TOKENIZER_CONFIG}, of {checkpoint.folder}"
    template = ChatTemplate(source, config, where, "give the checkpoint's own files")
    image = either(model.image_token, texts.image, tokenizer)
    if image is None:
        raise UserError(
            f"config.json names no image token, and {checkpoint.folder} has no tokenizer that knows {texts.image}: put "
            "the tokenizer's files there"
        )
    tokens = SpecialTokens(
        image=image,
        vision_start=either(model.vision_start_token, texts.start, tokenizer),
        vision_end=either(model.vision_end_token, texts.end, tokenizer),
        template_marks=family.template_marks,
        stop=stated_stops(checkpoint),
    )
    if found is not None:
        ends = [found.tokenizer.token_to_id(template.tokens.get("eos_token", "")), turn_end(template, found.tokenizer)]
        stop = dict.fromkeys([*tokens.stop, *(end for end in ends if end is not None)])
        tokens = tokens.model_copy(update={"stop": tuple(stop)})
    check_range(tokens, model.decoder.vocab_size)
    if found is not None:
        check_texts(tokens, family, found.tokenizer, checkpoint)
        check_shows_pictures(template, tokens.image, found.tokenizer, checkpoint)
    segments, unfit = segments_of(template, source)
    more = (greedy_note(checkpoint.json(GENERATION_CONFIG) or {}), unfit)
    return Prompts(found, config, tokens, source, segments, (*notes, *(note for note in more if note)))


def segments_of(template: ChatTemplate, source: str) -> tuple[ChatSegments | None, str | None]:
    """The template's segments, or a sentence that says why there are none."""
    try:
        return find_segments(template, source), None
    except UnfitError as error:
        return None, (
            f"the chat template needs Jinja ({error}): give C++ programs conversations that are already rendered"
        )


def either(stated: int | None, text: str | None, tokenizer: Tokenizer | None) -> int | None:
    """The id in config.json, or else the tokenizer's id of `text`. None if there is neither."""
    if stated is not None or text is None or tokenizer is None:
        return stated
    found: int | None = tokenizer.token_to_id(text)
    return found


def check_texts(tokens: SpecialTokens, family: Family, tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Check that each id is the tokenizer's for its text.

    Raises:
        UserError: one is not.
    """
    ids = (tokens.image, tokens.vision_start, tokens.vision_end)
    for number, text in zip(ids, family.token_texts, strict=True):
        if text is None:
            continue
        found = tokenizer.token_to_id(text)
        if found is None:
            raise UserError(f"the tokenizer of {checkpoint.folder} has no {text}, which stands for a picture: {ADVICE}")
        if found != number:
            raise UserError(f"{text} is token {number} in config.json and {found} in the tokenizer: {ADVICE}")
    for number in tokens.stop:
        if tokenizer.id_to_token(number) is None:
            raise UserError(f"token {number} should end an answer, but the tokenizer has no such token: {ADVICE}")


def check_range(tokens: SpecialTokens, vocab_size: int) -> None:
    """Check that each id is in the model's vocabulary.

    Raises:
        UserError: one is beyond it.
    """
    for number in (tokens.image, tokens.vision_start, tokens.vision_end, *tokens.stop):
        if number is not None and not 0 <= number < vocab_size:
            raise UserError(f"token {number} is beyond the vocabulary of {vocab_size} in config.json: {ADVICE}")


def check_shows_pictures(template: ChatTemplate, image: int, tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Check that the template writes one image token for each picture.

    Raises:
        UserError: it does not, or takes no pictures.
    """
    advice = "give a template with pictures, or remove it to use the family's own"
    for pictures, what in ((1, "a picture"), (2, "two pictures")):
        content = [*[{"type": "image"}] * pictures, {"type": "text", "text": "What is it?"}]
        try:
            text = template.render([{"role": "user", "content": content}])
        except UserError as error:
            if pictures > 1:  # some models take one
                return
            raise UserError(
                f"the chat template of {checkpoint.folder} cannot ask about a picture ({error}): {advice}"
            ) from error
        found = tokenizer.encode(text, add_special_tokens=False).ids.count(image)
        if found != pictures:
            raise UserError(
                f"the chat template of {checkpoint.folder} writes {found} image tokens for {what}: {advice}"
            )


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The token that the template writes behind an assistant's message, if it writes one."""
    question: Message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}]}
    for content in (ANSWER, [{"type": "text", "text": ANSWER}]):
        try:
            text = template.render([question, {"role": "assistant", "content": content}], add_generation_prompt=False)
        except UserError:  # it may take the other form, or no answer
            continue
        if ANSWER in text:
            behind = text.rpartition(ANSWER)[2].lstrip()
            first: int | None = next(iter(tokenizer.encode(behind, add_special_tokens=False).ids), None)
            return first if first in tokenizer.get_added_tokens_decoder() else None
    return None


def chat_template(checkpoint: Checkpoint, family: Family) -> tuple[str, tuple[str, ...]]:
    """The checkpoint's chat template, or the family's if there is none or it cannot show pictures, and a remark for the
    user.

    If it writes the family's mark for a picture and no image token, it is changed to write the image token.
    """
    found = stored_template(checkpoint)
    if found is not None and "image" in found[0]:
        mark, image = family.picture_mark, family.token_texts.image
        written = found[0] if mark is None or image in found[0] else found[0].replace(mark, image)
        return written, ()
    why = (
        f"the chat template in {found[1]} has no place for pictures" if found else "the checkpoint has no chat template"
    )
    return family.own_template(checkpoint.config), (f"{why}: the bundle gets the family's own",)


def stored_template(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The checkpoint's chat template and its file. Of several templates, the one that transformers takes; a processor's
    comes first.

    Source: ProcessorMixin.get_processor_dict and PreTrainedTokenizerBase._from_pretrained in transformers.

    Raises:
        UserError: see Checkpoint.json and default_template.
    """
    for file in (PROCESSOR, OLD_TEMPLATE, CHAT_TEMPLATE, NAMED_TEMPLATE, TOKENIZER_CONFIG):
        if file.endswith(".json"):
            stored = (checkpoint.json(file) or {}).get("chat_template")
            found = default_template(stored, checkpoint.folder / file)
        else:
            found = checkpoint.text(file)
        if found is not None:
            return found, file
    return None


def default_template(stored: Any, path: Path) -> str | None:
    """A chat template from a JSON file: text, or several by name, of which "default" is taken.

    Raises:
        UserError: it is neither.
    """
    if isinstance(stored, list):
        named = [entry for entry in stored if isinstance(entry, dict)]
        stored = {str(entry.get("name")): entry.get("template") for entry in named}
    found = stored.get("default") if isinstance(stored, dict) else stored
    if found is not None and not isinstance(found, str):
        raise UserError(
            f"chat_template of {path} is damaged (it is neither text nor a list of named templates): correct it"
        )
    return found


def stated_stops(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, or else of config.json."""
    config = checkpoint.config
    texts = [config.get(key) or {} for key in ("text_config", "llm_config", "language_config")]
    for source in (checkpoint.json(GENERATION_CONFIG) or {}, config, *texts):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()
