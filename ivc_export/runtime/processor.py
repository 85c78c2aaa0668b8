"""Turns prompts and pictures into tokens and tensors, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import PIL.Image
from tokenizers.decoders import DecodeStream

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from ivc_export.contract.preprocessing import VideoPreprocessing
from ivc_export.errors import UserError
from ivc_export.families.pictures import Grid, Visual
from ivc_export.families.videos import Clip, taken_frames
from ivc_export.files import read_object, read_text
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.videos import Video
from ivc_export.text.template import ChatTemplate, Message, parts_message
from ivc_export.text.tokenizer import read_tokenizer

T = TypeVar("T")


class Shown(Protocol):
    """A picture as a prompt needs it; see Visual."""

    @property
    def token_id(self) -> int:
        """The token that stands for each of its visual tokens."""
        ...

    @property
    def before(self) -> str:
        """Text in front of it."""
        ...

    @property
    def more(self) -> int:
        """How many temporal patches of the same video follow it."""
        ...

    @property
    def tokens(self) -> list[int]:
        """What stands for it in the prompt."""
        ...


MARK, VIDEO_MARK = "<image>", "<video>"
"""The marks for pictures and videos in the text of a prompt."""


@dataclass(frozen=True)
class Look:
    """A picture or a video of a prompt, and what the model gets of it.

    size: width and height. grids: of its visual tokens; one, or one for each temporal patch of a video whose times are
    written. frames: numbers of the frames that were taken of a video. rate: how many were taken for each second.
    """

    part: Path | PIL.Image.Image | Video
    size: tuple[int, int]
    grids: tuple[Grid, ...]
    frames: tuple[int, ...] = ()
    rate: float = 0.0

    @property
    def kind(self) -> str:
        """Its kind, as chat templates call it."""
        return "video" if isinstance(self.part, Video) else "image"

    @property
    def grid(self) -> Grid:
        """The grid of all its visual tokens."""
        return self.grids[0]._replace(time=sum(grid.time for grid in self.grids))


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
        self.tokenizer.no_truncation()  # these are settings of a training run
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
        """Prepare a picture file, or an opened picture, for the vision graph. Larger ones are scaled to `max_visual`.

        Raises:
            UserError: it is not a picture, or too elongated.
        """
        manifest = self.bundle.manifest
        picture = self.pictures.picture(open_picture(image), manifest.tokens.image)
        if picture.grid.visual > manifest.max_visual:
            raise UserError(
                f"the picture gives {picture.grid.visual} visual tokens, but this bundle takes "
                f"{manifest.max_visual} at most: crop it to a less elongated shape"
            )
        return picture

    def video(self, video: Video) -> tuple[Look, list[Visual]]:
        """Prepare a video: take frames, and scale them to `max_visual`.

        Raises:
            UserError: the model takes no videos, it cannot be read, or it does not fit.
        """
        return look_at_video(self.bundle, video)

    def look(self, part: Path | PIL.Image.Image | Video) -> tuple[Look, list[Visual]]:
        """Prepare a picture or a video; see `picture` and `video`."""
        if isinstance(part, Video):
            return self.video(part)
        image = open_picture(part)
        picture = self.picture(image)
        return Look(part, image.size, (picture.grid,)), [picture]

    def shown(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The part of a picture that its visual tokens cover."""
        return self.pictures.shown(image)

    def panels(self, look: Look) -> list[PIL.Image.Image]:
        """The part of a picture that its visual tokens cover, or a video's frames, the first of each temporal patch."""
        if not isinstance(look.part, Video):
            return [self.shown(open_picture(look.part))]
        deep = getattr(self.bundle.manifest.preprocessing, "temporal_patch_size", 1)
        return list(look.part.open().frames(look.frames[::deep]))

    def extents(self, size: tuple[int, int], grid: Grid) -> dict[str, Any]:
        """Sizes of a picture or a video that gave `grid`, for JSON.

        size: width and height. original: these. covered: left, top, right and bottom of the part that the model gets.
        scaled: the size to which this part was scaled; some models answer in its pixels. grid: visual tokens along both
        sides, and tiles with the thumbnail.
        """
        return {
            "original": {"width": size[0], "height": size[1]},
            "covered": self.pictures.covered(*size),
            "scaled": dict(zip(("width", "height"), self.pictures.scaled(size, grid), strict=True)),
            "grid": grid.extents | {"tiles": len(grid.blocks) // grid.time},
        }

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to the assistant's answer."""
        return self.template.render(messages)

    def system_message(self, text: str) -> Message:
        """A system message, in the form that the chat template takes.

        Raises:
            UserError: the template takes no system message.
        """
        return self.template.system_message(text)

    def check_places(self, message: Message, rendered: str) -> None:
        """Check that a template left a message's pictures at their places in its text.

        Raises:
            UserError: it moved them.
        """
        kinds = [part["type"] for part in message["content"]]
        if len({*kinds}) <= 2 and kinds == sorted(kinds, key="text".__eq__):  # there is no other order to keep
            return
        place = 0
        texts = dict(zip(("image", "video"), self._visual_texts, strict=False))
        for part in message["content"]:
            wanted = (part.get("text") or texts.get(part["type"], "")).strip()
            place = rendered.find(wanted, place) + len(wanted)
            if place < len(wanted):
                raise UserError(
                    "the chat template of this bundle does not keep pictures within the text: put them before the text"
                )

    def encode(self, text: str, pictures: Sequence[Shown] = (), begin: bool = True) -> list[int]:
        """Token ids of `text`. Its i-th image or video token is repeated once for each visual token of picture i.

        begin: whether a conversation begins here. Then the tokenizer adds its first token, unless the text has it.
        """
        return self.encode_from(text, pictures, begin)[0]

    def encode_from(
        self, text: str, pictures: Sequence[Shown] = (), begin: bool = True, place: int = 0
    ) -> tuple[list[int], int]:
        """Like `encode`, with the number of ids that stand only for text before character `place`."""
        special = self.bundle.manifest.tokens
        start, end, visual = special.vision_start, special.vision_end, {*self.bundle.manifest.visual_tokens}

        def shown(picture: Shown) -> list[int]:
            if special.template_marks or start is None or end is None:
                return picture.tokens
            return [start, *picture.tokens, end]

        begin = begin and not (self.bos and text.startswith(self.bos))
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=begin)
        except TypeError as error:  # lone surrogates, from bytes that are not text
            raise UserError("the prompt is not UTF-8 text: write it in UTF-8") from error
        ids: list[int] = encoding.ids
        found = [i for i in ids if i in visual]
        if found != [picture.token_id for picture in pictures]:
            videos = any(picture.token_id != special.image for picture in pictures)
            raise UserError(
                f"the prompt has {len(found)} image tokens, but there are {len(pictures)} pictures: write no image "
                f"tokens into the text{', and use a chat template that shows videos' * videos}"
            )
        behind = next((number for number, i in enumerate(reversed(ids)) if i in visual), len(ids))
        if pictures and behind <= self.bundle.manifest.selection.query_offset:
            raise UserError(
                "no text follows the picture, but the tokens to keep are chosen by that text: put the question "
                "after the picture, in the prompt or in the chat template"
            )
        rest = iter(pictures)
        pieces = [shown(next(rest)) if i in visual else [i] for i in ids]
        before = next((i for i, (_, end) in enumerate(encoding.offsets) if end > place), len(ids))
        return [*chain(*pieces)], sum(map(len, pieces[:before]))

    def conversation(self, messages: Sequence[Message], pictures: Sequence[Shown]) -> tuple[list[int], int]:
        """Token ids of a whole conversation, and how many of them are before the content of its last message.

        messages: the last is the user's.

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
        earlier = self.timed(rendered[:place], pictures)
        return self.encode_from(self.timed(rendered, pictures), pictures, place=len(earlier))

    def timed(self, text: str, pictures: Sequence[Shown]) -> str:
        """`text` with the times of videos' temporal patches at each video's place, if this model takes times.

        Each patch then counts as a picture, within the tokens that enclose one. pictures: those of the text, and
        perhaps more.
        """
        m = self.bundle.manifest
        if m.video is None or not m.video.timestamps:
            return text
        marks = (m.tokens.vision_start, m.tokens.vision_end)
        start, end = ("" if i is None else self.tokenizer.id_to_token(i) or "" for i in marks)
        video = self._visual_texts[1]
        patches = [f"{one.before}{start}{video}{end}" for one in pictures if one.token_id == m.video.token]
        ends = [i + 1 for i, one in enumerate(p for p in pictures if p.token_id == m.video.token) if not one.more]
        videos = ["".join(patches[i:j]) for i, j in zip([0, *ends], ends, strict=False)]
        pieces = text.split(video)
        if len(pieces) > len(videos) + 1:
            return text  # `encode` says what is wrong
        return "".join(piece + times for piece, times in zip(pieces, [*videos[: len(pieces) - 1], ""], strict=True))

    @property
    def _visual_texts(self) -> list[str]:
        """Texts of the tokens that stand for a picture, and for a video."""
        return [self.tokenizer.id_to_token(i) or "" for i in self.bundle.manifest.visual_tokens]

    def question(self, text: str, pictures: Sequence[Visual]) -> list[int]:
        """Token ids of a conversation that begins with this question about pictures and videos; see `placed`.

        pictures: in the order of the prompt, with a video's temporal patches one after another.
        """
        message = parts_message(placed(text, [picture for picture in pictures if not picture.more]))
        rendered = self.render([message])
        self.check_places(message, rendered)
        return self.encode(self.timed(rendered, pictures), pictures)

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text, as soon as the tokens so far make whole characters. Special tokens are left out."""
        decoder = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            piece = decoder.step(self.tokenizer, token)
            if piece:
                yield piece

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def video_settings(bundle: Bundle) -> VideoPreprocessing:
    """How a bundle takes videos.

    Raises:
        UserError: it takes none.
    """
    if bundle.manifest.video is None:
        raise UserError(
            f"{bundle.folder} does not support videos: give pictures, or export a model that supports videos"
        )
    return bundle.manifest.video


def look_at_video(bundle: Bundle, video: Video) -> tuple[Look, list[Visual]]:
    """Prepare a video: take frames, and scale them to `max_visual`.

    Raises:
        UserError: the model takes no videos, it cannot be read, or it does not fit.
    """
    m, settings, footage = bundle.manifest, video_settings(bundle), video.open()
    deep = getattr(m.preprocessing, "temporal_patch_size", 1)
    native = footage.native or video.fps or settings.fps
    indices = tuple(range(footage.total))
    most = settings.max_frames if video.max_frames is None else video.max_frames
    if not video.is_folder or footage.total > most:
        fps = native if video.is_folder else video.fps
        indices = taken_frames(settings, deep, footage.total, native, fps, video.max_frames)
    frames = footage.frames(indices)
    clip = Clip(str(video.path), footage.size, indices, footage.total, native, frames)
    visuals = families.preparation(m).video(clip, settings, m.max_visual)
    return Look(video, footage.size, tuple(visual.grid for visual in visuals), indices, clip.rate), visuals


def prepared(bundle: Bundle, parts: Sequence[PIL.Image.Image | Video]) -> list[Visual]:
    """Prepare pictures and videos for the vision graph of a bundle, one after another. The bundle needs no tokenizer.

    Raises:
        UserError: one does not fit.
    """
    pictures, token = families.preparation(bundle.manifest), bundle.manifest.tokens.image
    ready = [
        look_at_video(bundle, part)[1] if isinstance(part, Video) else [pictures.picture(part, token)] for part in parts
    ]
    return [visual for visuals in ready for visual in visuals]


def placed(text: str, pictures: Sequence[T]) -> list[str | T]:
    """Text, pictures and videos in order: at the text's `<image>` and `<video>` marks, or in front if it has none.

    Raises:
        UserError: the number of marks differs from the number of pictures or videos.
    """
    by_mark: dict[str, list[T]] = {MARK: [], VIDEO_MARK: []}
    for picture in pictures:
        by_mark[VIDEO_MARK if getattr(picture, "kind", "image") == "video" else MARK].append(picture)
    marks = [mark for mark in by_mark if mark != VIDEO_MARK or by_mark[mark]]  # without a video it is ordinary text
    pieces = re.split(f"({'|'.join(marks)})", text)
    if len(pieces) == 1:
        return [*pictures, text]
    for mark, what in ((MARK, "pictures"), (VIDEO_MARK, "videos")):
        if mark in marks and pieces.count(mark) != len(by_mark[mark]):
            raise UserError(
                f"the prompt has {pieces.count(mark)} {mark} marks, but there are {len(by_mark[mark])} {what}: "
                "write one mark for each, or none to put them first"
            )
    return [by_mark[piece].pop(0) if piece in marks else piece for piece in pieces if piece != ""]


def user_message(text: str, pictures: int) -> Message:
    """A user's message about so many pictures, at the text's `<image>` marks, or first; see placed."""
    return parts_message(placed(text, [None] * pictures))
