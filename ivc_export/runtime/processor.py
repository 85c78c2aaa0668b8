"""Prompts and pictures to tokens and tensors, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import PIL.Image
from tokenizers.decoders import DecodeStream

from ivc_export import families
from ivc_export.bundle import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Bundle
from ivc_export.chat_template import ChatTemplate, Message
from ivc_export.errors import UserError
from ivc_export.families import Picture
from ivc_export.files import read_object, read_text
from ivc_export.runtime.pictures import open_picture
from ivc_export.tokenizer import read_tokenizer


class Processor:
    """A bundle's tokenizer, chat template and picture settings.

    Raises:
        UserError: the bundle was exported from a folder without tokenizer or chat template, or they are damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
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

    def picture(self, image: Path | PIL.Image.Image) -> Picture:
        """A picture file, or an opened picture, ready for the vision graph; larger ones are scaled to `max_visual`.

        Raises:
            UserError: it is no picture, or too elongated.
        """
        manifest = self.bundle.manifest
        picture = families.of(manifest.family).picture(open_picture(image), manifest.preprocessing)
        if picture.grid.visual > manifest.max_visual:
            raise UserError(
                f"the picture gives {picture.grid.visual} visual tokens, and this bundle takes {manifest.max_visual}: "
                "crop it to a less elongated shape"
            )
        return picture

    def shown(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The part of a picture that its visual tokens cover."""
        return families.shown(image, self.bundle.manifest.preprocessing)

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to where the assistant speaks."""
        return self.template.render(messages)

    def encode(self, text: str, pictures: Sequence[Picture] = (), begin: bool = True) -> list[int]:
        """Token ids of `text`, its i-th image token repeated once for each visual token of picture i.

        begin: whether a conversation begins here, so that the tokenizer adds what that takes, unless it is written.
        """
        special = self.bundle.manifest.tokens
        image, start, end = special.image, special.vision_start, special.vision_end

        def shown(count: int) -> list[int]:
            if special.template_marks or start is None or end is None:
                return [image] * count
            return [start, *[image] * count, end]

        begin = begin and not (self.bos and text.startswith(self.bos))
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=begin).ids
        except TypeError as error:  # lone surrogates, from bytes that were no text
            raise UserError("the prompt is not UTF-8 text: write it in UTF-8") from error
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
        counts = iter(picture.grid.visual for picture in pictures)
        return [token for i in ids for token in (shown(next(counts)) if i == image else [i])]

    def question(self, text: str, pictures: Sequence[Picture]) -> list[int]:
        """Token ids of a conversation that begins with this question about `pictures`."""
        return self.encode(self.render([user_message(text, len(pictures))]), pictures)

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


def user_message(text: str, pictures: int) -> Message:
    """A user's message: pictures first, then text, in the form that chat templates take."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}
