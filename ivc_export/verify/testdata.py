"""Writes a bundle's testdata/: one picture and prompt through every graph, for authors of runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.recording import Key, Recording
from ivc_export.contract.names import GraphName
from ivc_export.families.pictures import Visual
from ivc_export.runtime.host import HostConversation, HostSession
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.processor import Processor, user_message
from ivc_export.selection.method import Method

FOLDER = "testdata"
PICTURE = "picture.png"
QUESTION = "Where is the ring?"
STEPS = 2


class RecordingSession:
    """A session that records the inputs and outputs of every run under the stage that is set."""

    def __init__(self, session: HostSession) -> None:
        self.session, self.bundle, self.backend, self.dtype = session, session.bundle, session.backend, session.dtype
        self.versions, self.lock = session.versions, session.lock
        self.stage = "prefill"
        self.tensors: dict[Key, npt.NDArray[Any]] = {}

    def converse(
        self, ratio: float | None = None, capacity: int | None = None, method: str | Method | None = None
    ) -> HostConversation:
        """Begin a conversation; see HostConversation."""
        return HostConversation(self, ratio, capacity, method)

    def run(self, name: GraphName, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run graph `name`, and record it."""
        outputs = self.session.run(name, feeds)
        self.tensors |= {Key(self.stage, name, "inputs", key): array for key, array in feeds.items()}
        self.tensors |= {Key(self.stage, name, "outputs", key): array for key, array in outputs.items()}
        return outputs


def write_testdata(bundle: Bundle) -> None:
    """Run the bundle on onnxruntime, in float32, and write testdata/ into its folder.

    It records a prefill with one picture, and two decode steps on greedily drawn tokens: every input and output of
    every graph. docs/runtime.md describes the files.
    """
    image = draw_picture()
    prompt, tokens, picture = make_prompt(bundle, image)
    session = RecordingSession(OnnxSession(bundle))
    conversation = session.converse()
    step, drawn = conversation.run(tokens, [picture]), []
    for number in range(STEPS):
        drawn.append(int(step.logits.argmax()))
        session.stage = f"decode-{number + 1}"
        step = conversation.run(drawn[-1:])
    facts = {
        "prompt": prompt,
        "picture": PICTURE,
        "ratio": conversation.ratio,
        **conversation.method.facts,
        "grid": picture.grid.extents,
        "prompt_tokens": tokens,
        "drawn_tokens": [*drawn, int(step.logits.argmax())],
        "versions": dict(session.versions),
    }
    folder = bundle.folder / FOLDER
    Recording(facts, session.tensors).write(folder)
    image.save(folder / PICTURE)


def make_prompt(bundle: Bundle, image: PIL.Image.Image) -> tuple[str | None, list[int], Visual]:
    """A question about `image`: its rendered text, its token ids, and the picture.

    The text is None for a bundle without tokenizer or chat template. Then the ids around the picture are random.
    """
    m = bundle.manifest
    if not bundle.missing_processor_files():
        processor = Processor(bundle)
        picture = processor.picture(image)
        text = processor.render([user_message(QUESTION, 1)])
        return text, processor.encode(text, [picture]), picture
    picture = families.preparation(m).picture(image, m.tokens.image)
    before, behind = ([t] if t is not None else [] for t in (m.tokens.vision_start, m.tokens.vision_end))
    special = [m.tokens.image, *before, *behind, *m.tokens.stop]
    words = np.setdiff1d(np.random.default_rng(0).integers(0, m.decoder.vocab_size, 64), special).tolist()
    visual = [*before, *picture.tokens, *behind]
    return None, [*words[:20], *visual, *words[20:]], picture


def draw_picture() -> PIL.Image.Image:
    """A ring, a square and a triangle on seeded noise, 337 x 293. No two patches are equal, and both sides are
    scaled."""
    ground = np.linspace(90, 200, 337)[None, :, None] * np.array([0.9, 1.0, 1.1])
    noise = np.random.default_rng(0).normal(0, 12, (293, 337, 3))
    image = PIL.Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8))
    draw = PIL.ImageDraw.Draw(image)
    draw.ellipse((30, 40, 130, 140), outline=(200, 40, 44), width=16)
    draw.rectangle((190, 30, 290, 110), fill=(38, 84, 168))
    draw.polygon(((170, 250), (300, 250), (235, 150)), fill=(236, 180, 40))
    return image
