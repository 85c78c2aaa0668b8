"""Answers of Spatial-VL in stock transformers, pruned by the reference implementation."""

from __future__ import annotations

from pathlib import Path

from ivc_export.bundle.bundle import Bundle
from ivc_export.runtime.processor import Processor
from ivc_export.verify.oracle import reference_picture
from ivc_export.verify.reference import Reference
from samples.spatial.held_out import LONGEST_ANSWER, HeldOutExample


class StockAnswers:
    """Greedy answers on PyTorch; prompts and pictures are prepared as the bundle says."""

    def __init__(self, checkpoint: Path, bundle: Bundle, ratio: float, method: str = "ivc-prune") -> None:
        self.bundle, self.processor, self.ratio, self.method = bundle, Processor(bundle), ratio, method
        m = bundle.manifest
        self.reference = Reference(checkpoint, m.selection_layer, ratio, m.selection)

    def answer(self, example: HeldOutExample) -> str:
        """The answer to one question."""
        picture = self.processor.picture(example.picture)
        prompt = self.processor.question(example.question.text, [picture])
        self.reference.restart(self.bundle.manifest.selection_layer, self.ratio, self.method)
        turn = self.reference.run(prompt, [reference_picture(self.bundle, picture)])
        tokens: list[int] = []
        for _ in range(LONGEST_ANSWER):
            tokens.append(int(turn.logits.argmax()))
            if tokens[-1] in self.bundle.manifest.tokens.stop:
                break
            turn = self.reference.run(tokens[-1:])
        return self.processor.decode(tokens)
