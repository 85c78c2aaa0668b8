"""Short prefills whose form comes again, with our operators over emulated kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe, Quantisation
from ivc_export.runtime.chat import Sampling, generate
from ivc_export.runtime.interface import Step
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.fused_graphs import SHORT
from samples.make_sample import make_checkpoint
from samples.tiny import wide
from tests.runtime.test_picture_graphs import draw, same
from tests.runtime.test_prefill_graphs import prompt


class Watched(FusedSession):
    """Counts the runs of decoder that are no decode steps, by its sessions."""

    def __init__(self, bundle: Bundle, library: Path) -> None:
        super().__init__(bundle, "cpu", op_library=library)
        self.runs = {"decoder": 0, SHORT["decoder"]: 0}

    def run_bound(self, name: str, binding: Any, captured: int | None = None, wait: bool = True) -> None:
        if name in self.runs:
            self.runs[name] += 1
        super().run_bound(name, binding, captured, wait)


def talk(session: FusedSession, seed: int) -> tuple[list[Step], list[int]]:
    """Two conversations by turns: a prefill of each, whose logits nobody has read yet, answers, and a second turn."""
    pair, said = [session.converse(ratio, 600) for ratio in (0.5, 1.0)], list[int]()
    steps: list[Step] = []
    for number, one in enumerate(pair):
        picture = draw(session.bundle, 10 * seed + number, 4, 4)
        steps.append(one.run(prompt(session.bundle, seed, [picture]), [picture]))
    for one in pair:
        said += generate(one, [7, 8 + seed], [], Sampling(max_tokens=6), ())
    return [*steps, *(one.run([9, 10 + seed]) for one in pair)], said


def compare(session: FusedSession, launched: FusedSession) -> None:
    """Talk in both, with other contents each time."""
    talks = [(talk(session, seed), talk(launched, seed)) for seed in range(4)]
    for (steps, said), (wanted, reference) in talks:
        assert said == reference
        for found, step in zip(steps, wanted, strict=True):
            same(found, step)
            assert found.token == found.logits.argmax()
    assert len({step.logits.tobytes() for (steps, _), _ in talks for step in steps}) == 16


def test_prefills_over_packed_weights_are_launched(library: Path, tmp_path: Path) -> None:
    """Each captured graph would keep memory to which weights are unpacked."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", wide("qwen2_vl", heads=4))
    packed = export(ExportRecipe(checkpoint, tmp_path / "packed", quantisation=Quantisation("int4", 32)))
    session = Watched(packed, library)
    assert session.captures_vision and not session.captures_prefills and not {*SHORT.values()} & {*session._sessions}
    steps = [talk(session, 0) for _ in range(3)]
    assert session.runs == {"decoder": 18, SHORT["decoder"]: 0} and steps[0][1] == steps[1][1] == steps[2][1]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "deepseek_vl_v2"])
def test_captured_prefills_answer_the_same(library: Path, tmp_path: Path, family: str) -> None:
    """Logits and pictures' tokens too, where they are read after later prefills."""
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "checkpoint", wide(family, heads=4)), tmp_path / "bundle"))
    session, launched = (Watched(bundle, library) for _ in range(2))
    assert session.captures_prefills and session.answers == (family != "deepseek_vl_v2")
    launched.captures_prefills = launched.captures_vision = False
    compare(session, launched)
    # 6 forms are captured once they came; the first run of a capture is for nothing
    assert launched.runs == {"decoder": 24, SHORT["decoder"]: 0}
    assert session.runs == {"decoder": 6, SHORT["decoder"]: 18 + 6}
