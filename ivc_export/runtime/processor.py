"""Prompts and pictures to tokens and tensors, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import PIL.Image
from tokenizers.decoders import DecodeStream

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from ivc_export.errors import UserError
from ivc_export.families.pictures import Grid, Visual
from ivc_export.files import read_object, read_text
from ivc_export.runtime.pictures import open_picture
from ivc_export.text.template import ChatTemplate, Message, parts_message
from ivc_export.text.tokenizer import read_tokenizer

T = TypeVar("T")


class Shown(Protocol):
    """A picture, as far as a prompt holds it."""

    @property
    def tokens(self) -> list[int]:
        """What stands for it in the prompt."""
        ...


MARK = "<image>"
"""Where a picture stands in the text of a prompt."""


class Processor:
    """A bundle's tokenizer, chat template and picture settings.

    Raises:
        UserError: the bundle was exported from a folder without tokenizer or chat template, or they are damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.pictures = families.preparation(bundle.manifest)
        missing = bundle.missing_processor_files()
        if missing:
            raise UserError(
                f"{bundle.folder} has no {' and no '.join(missing)}: put the model's own files into the "
                "checkpoint folder and export again"
            )
        self.tokenizer = read_tokenizer(bundle.folder / TOKENIZER, "export the model again")
        self.tokenizer.no_truncation()  # settings of some training run
        self.tokenizer.no_padding()
        advice, path = "export the model again", bundle.folder / TOKENIZER_CONFIG
        self.template = ChatTemplate(
            read_text(bundle.folder / CHAT_TEMPLATE, advice),
            read_object(path, advice) if path.exists() else {},
            f"{CHAT_TEMPLATE} or {TOKENIZER_CONFIG} of {bundle.folder}",
            advice,
        )
        self.bos = self.template.tokens.get("bos_token", "")

    def picture(self, image: Path | PIL.Image.Image) -> Visual:
        """A picture file, or an opened picture, ready for the vision graph; larger ones are scaled to `max_visual`.

        Raises:
            UserError: it is no picture, or too elongated.
        """
        manifest = self.bundle.manifest
        picture = self.pictures.picture(open_picture(image), manifest.tokens.image)
        if picture.grid.visual > manifest.max_visual:
            raise UserError(
                f"the picture gives {picture.grid.visual} visual tokens, and this bundle takes {manifest.max_visual}: "
                "crop it to a less elongated shape"
            )
        return picture

    def shown(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The part of a picture that its visual tokens cover."""
        return self.pictures.shown(image)

    def extents(self, size: tuple[int, int], grid: Grid) -> dict[str, Any]:
        """Sizes of a picture that gave `grid`, for JSON.

        size: width and height. original: these. covered: left, top, right and bottom of the part that the model is
        shown. scaled: the size that this part was scaled to, in whose pixels some models answer. grid: visual tokens
        along both sides, and tiles, a thumbnail among them.
        """
        return {
            "original": {"width": size[0], "height": size[1]},
            "covered": self.pictures.covered(*size),
            "scaled": dict(zip(("width", "height"), self.pictures.scaled(size, grid), strict=True)),
            "grid": grid.extents | {"tiles": len(grid.blocks)},
        }

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to where the assistant speaks."""
        return self.template.render(messages)

    def system_message(self, text: str) -> Message:
        """A system message, in the form that the chat template takes.

        Raises:
            UserError: it takes none.
        """
        return self.template.system_message(text)

    def check_places(self, message: Message, rendered: str) -> None:
        """Check that a template left a message's pictures where they are in its text.

        Raises:
            UserError: it did not.
        """
        kinds = [part["type"] for part in message["content"]]
        if kinds == sorted(kinds):  # pictures first: there is no other order to keep
            return
        image, place = self.tokenizer.id_to_token(self.bundle.manifest.tokens.image) or "", 0
        for part in message["content"]:
            wanted = part.get("text", image).strip()
            place = rendered.find(wanted, place) + len(wanted)
            if place < len(wanted):
                raise UserError(
                    "the chat template of this bundle does not keep pictures within the text: give them in front of it"
                )

    def encode(self, text: str, pictures: Sequence[Shown] = (), begin: bool = True) -> list[int]:
        """Token ids of `text`, its i-th image token repeated once for each visual token of picture i.

        begin: whether a conversation begins here, so that the tokenizer adds what that takes, unless it is written.
        """
        return self.encode_from(text, pictures, begin)[0]

    def encode_from(
        self, text: str, pictures: Sequence[Shown] = (), begin: bool = True, place: int = 0
    ) -> tuple[list[int], int]:
        """As `encode`, and the number of ids that stand for text before its character `place` alone."""
        special = self.bundle.manifest.tokens
        image, start, end = special.image, special.vision_start, special.vision_end

        def shown(picture: Shown) -> list[int]:
            if special.template_marks or start is None or end is None:
                return picture.tokens
            return [start, *picture.tokens, end]

        begin = begin and not (self.bos and text.startswith(self.bos))
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=begin)
        except TypeError as error:  # lone surrogates, from bytes that were no text
            raise UserError("the prompt is not UTF-8 text: write it in UTF-8") from error
        ids: list[int] = encoding.ids
        if ids.count(image) != len(pictures):
            raise UserError(
                f"the prompt holds {ids.count(image)} image tokens and there are {len(pictures)} pictures: "
                "write no image tokens into the text"
            )
        if pictures and ids[::-1].index(image) <= self.bundle.manifest.selection.query_offset:
            raise UserError(
                "no text follows the picture, and only that can choose its tokens: put the question behind it, in the "
                "prompt or in the chat template"
            )
        rest = iter(pictures)
        pieces = [shown(next(rest)) if i == image else [i] for i in ids]
        before = next((i for i, (_, end) in enumerate(encoding.offsets) if end > place), len(ids))
        return [*chain(*pieces)], sum(map(len, pieces[:before]))

    def conversation(self, messages: Sequence[Message], pictures: Sequence[Shown]) -> tuple[list[int], int]:
        """Token ids of a whole conversation, and the number of those before what its last message says.

        messages: the user's last.

        Raises:
            UserError: see render and encode; or the template moves the last message's pictures within its text.
        """
        rendered = self.render(messages)
        place, last = 0, messages[-1]
        if pictures and len(messages) > 1:
            text = next((part["text"].strip() for part in last["content"] if "text" in part), "")
            other = parts_message(["B" if text.startswith("A") else "A"])
            pairs = zip(rendered, self.render([*messages[:-1], other]), strict=False)
            place = next((i for i, (one, two) in enumerate(pairs) if one != two), 0)
        self.check_places(last, rendered[place:])
        return self.encode_from(rendered, pictures, place=place)

    def question(self, text: str, pictures: Sequence[Visual]) -> list[int]:
        """Token ids of a conversation that begins with this question about `pictures`; see user_message."""
        message = user_message(text, len(pictures))
        rendered = self.render([message])
        self.check_places(message, rendered)
        return self.encode(rendered, pictures)

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text as soon as the tokens so far make whole characters; special tokens are left out."""
        decoder = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            piece = decoder.step(self.tokenizer, token)
            if piece:
                yield piece

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def placed(text: str, pictures: Sequence[T]) -> list[str | T]:
    """Text and pictures in order: pictures at the text's `<image>` marks, or in front where it has none.

    Raises:
        UserError: there are marks, and another number of pictures.
    """
    pieces = text.split(MARK)
    if len(pieces) == 1:
        return [*pictures, text]
    if len(pieces) - 1 != len(pictures):
        raise UserError(
            f"the prompt has {len(pieces) - 1} {MARK} marks and there are {len(pictures)} pictures: write a mark for "
            "each, or none, and they come first"
        )
    parts: list[str | T] = [pieces[0]]
    for picture, piece in zip(pictures, pieces[1:], strict=True):
        parts += [picture, piece]
    return [part for part in parts if part != ""]


def user_message(text: str, pictures: int) -> Message:
    """A user's message about so many pictures, which stand at the text's `<image>` marks, or first; see placed."""
    return parts_message(placed(text, [None] * pictures))
