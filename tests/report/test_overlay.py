from __future__ import annotations

import numpy as np
import PIL.Image

from ivc_export.families.pictures import Grid
from ivc_export.report.overlay import COLOURS, count_kinds, kinds, overlay, panel
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.processor import Processor, user_message
from tests.conftest import SHAPES


def test_every_token_is_drawn_as_what_it_is(sample_session: OnnxSession) -> None:
    processor = Processor(sample_session.bundle)
    picture = processor.picture(SHAPES)
    tokens = processor.encode(processor.render([user_message("Where?", 1)]), [picture])
    step = HostConversation(sample_session).run(tokens, [picture])
    found, image = kinds(step), open_picture(SHAPES)
    drawn = np.asarray(overlay([image], step)).astype(int)
    cell = round(560 / 12)
    plain = np.asarray(image.resize((16 * cell, 12 * cell))).astype(int)
    assert drawn.shape[1] == 16 * cell
    for token, kind in enumerate(found):
        row, column = divmod(token, 16)
        corner = drawn[row * cell, column * cell]
        middle = (row * cell + cell // 2, column * cell + cell // 2)
        if kind == "pruned":
            assert corner.min() > 150  # dimmed towards white, whatever was there
        else:
            assert tuple(corner) == COLOURS[kind]
            assert np.abs(drawn[middle] - plain[middle]).max() < 60  # what is kept stays visible
    assert sum(count_kinds(step).values()) == 192
    assert count_kinds(step)["pruned"] == 96
    assert {found[i] for i in step.prefix["seed_index"]} == {"seed"}


def test_an_elongated_picture_is_drawn_at_a_sane_size() -> None:
    drawn = panel(PIL.Image.new("RGB", (5600, 28)), Grid(1, 200), ["ivc"] * 200)
    assert drawn.size == (1600, 8)
