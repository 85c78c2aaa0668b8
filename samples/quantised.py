"""Measure how weights in 4 and 8 bits change Spatial-VL's answers, and the rows that it keeps.

    python -m samples.quantised [--count N] [--others N] [--calibrated CHECKPOINT] [NAME ...]

Each variant is exported, cut at the layer of the other results, and answers held-out questions at ratios 1 and 0.5 on
onnxruntime's CPU provider, as the 16-bit bundle does. Figures are added to benchmarks/results/spatial-vl-quantised.json
one by one; variants that it already has, with as many questions, are skipped. Kept rows are compared for each prefill:
the part that both keep, of the visual rows that either keeps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from ivc_export import Bundle, Chat, ExportRecipe, Quantisation, Sampling, export
from ivc_export.contract.names import GraphName
from ivc_export.runtime.onnxruntime.cpu import Arrays, OnnxSession
from samples.evaluate import difference, summary
from samples.spatial.held_out import LONGEST_ANSWER, HeldOutExample, held_out, scores
from samples.spatial.questions import TASKS, is_correct

MODEL = Path("samples/spatial-vl")
RESULT = Path("benchmarks/results/spatial-vl-quantised.json")
RATIOS = (1.0, 0.5)
LAYER = 2
CALIBRATED = "calibrated"
"""A checkpoint that another library quantised; see docs/weights.md."""


@dataclass(frozen=True)
class Variant:
    """A bundle, and the level that products of packed weights are computed at."""

    quantisation: Quantisation
    level: int = 0


KEEP = Quantisation()
FLOAT16 = "float16"
VARIANTS: Mapping[str, Variant] = {
    FLOAT16: Variant(KEEP),
    "int4, groups of 32": Variant(Quantisation("int4", 32)),
    "int4, groups of 32, level 4": Variant(Quantisation("int4", 32), level=4),
    "int4, groups of 32, without search": Variant(Quantisation("int4", 32, search=False)),
    "int4, groups of 128": Variant(Quantisation("int4", 128)),
    "int4, groups of 128, without search": Variant(Quantisation("int4", 128, search=False)),
    "int8, groups of 128": Variant(Quantisation("int8", 128)),
    CALIBRATED: Variant(KEEP),
    "int4, groups of 64": Variant(Quantisation("int4", 64)),
    "int4, groups of 64, without search": Variant(Quantisation("int4", 64, search=False)),
    "int4, groups of 32, zero points": Variant(Quantisation("int4", 32, asymmetric=True)),
    "int4, groups of 32, lm_head and embeddings int8": Variant(
        Quantisation("int4", 32, lm_head="int8", embeddings="int8")
    ),
}
FULL = tuple(VARIANTS)[:3]
"""Those that --count is about."""


class SharedVision(OnnxSession):
    """A session that takes visual tokens from those of another bundle with the same encoder, picture by picture."""

    pictures: dict[int, dict[str, npt.NDArray[Any]]]
    asked: int

    def run(self, name: GraphName, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """As OnnxSession.run, but for vision, which runs once for each question."""
        if name != "vision":
            return super().run(name, feeds)
        if self.asked not in self.pictures:
            self.pictures[self.asked] = super().run(name, feeds)
        return self.pictures[self.asked]


@dataclass(frozen=True)
class Answered:
    """Answers, and the visual rows kept by each prefill."""

    answers: list[str]
    kept: list[npt.NDArray[np.int32]]
    seconds: float


def answer(session: SharedVision, examples: Sequence[HeldOutExample], ratio: float, title: str) -> Answered:
    """Ask every question."""
    answers, kept, began = [], [], time.perf_counter()
    for number, example in enumerate(track(examples, f"{title}, ratio {ratio}", disable=not sys.stderr.isatty())):
        session.asked = number
        chat = Chat(session, ratio, sampling=Sampling(max_tokens=LONGEST_ANSWER))
        first: list[npt.NDArray[np.int32]] = []
        run = chat.conversation.run

        def noting(*arguments: Any, run: Any = run, first: list[Any] = first, **more: Any) -> Any:
            step = run(*arguments, **more)
            if not first:
                first.append(np.intersect1d(step.keep_index, step.run.visual_index))
            return step

        chat.conversation.run = noting  # type: ignore[method-assign]
        answers.append("".join(chat.ask(example.question.text, [example.picture])))
        kept += first
    return Answered(answers, kept, (time.perf_counter() - began) / len(examples))


def compared(examples: Sequence[HeldOutExample], found: Answered, base: Answered) -> dict[str, Any]:
    """Accuracy, what it loses against the 16-bit bundle, and how alike answers and kept rows are."""
    asked = len(found.answers)
    right, before = (
        [is_correct(e.question, a) for e, a in zip(examples, side, strict=True)]
        for side in (found.answers, base.answers[:asked])
    )
    same = [
        len(np.intersect1d(a, b)) / len(np.union1d(a, b))
        for a, b in zip(found.kept, base.kept[:asked], strict=True)
        if len(b)
    ]
    return {
        "accuracy": summary(scores(examples, found.answers)),
        "minus_float16": minus(right, before),
        "identical_answers": sum(a == b for a, b in zip(found.answers, base.answers, strict=False)),
        "kept_rows": {
            "all_alike": round(float(np.mean([s == 1 for s in same])), 4),
            "mean_overlap": round(float(np.mean(same)), 4),
            "least_overlap": round(float(np.min(same)), 4),
        },
        "seconds_an_answer": round(found.seconds, 3),
    }


def minus(right: Sequence[bool], base: Sequence[bool]) -> dict[str, Any]:
    """As samples.evaluate.difference, in plain numbers."""
    found = difference(right, base)
    return {"mean": float(found["mean"]), "interval": [float(end) for end in found["interval"]]}


def bundle_of(name: str, folder: Path, calibrated: Path | None) -> Bundle:
    """A variant's bundle."""
    model = calibrated if name == CALIBRATED else MODEL
    assert model is not None
    return export(ExportRecipe(model, folder / "bundle", layer=LAYER, quantisation=VARIANTS[name].quantisation))


def main() -> None:
    """Measure what is missing, and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "names", nargs="*", metavar="NAME", help=f"variants to measure (default: all): {'; '.join(VARIANTS)}"
    )
    p.add_argument("--count", type=int, default=2004, help="questions of the first variants (default: 2004)")
    p.add_argument("--others", type=int, default=2004, help="questions of the other variants (default: 2004)")
    p.add_argument("--calibrated", type=Path, metavar="CHECKPOINT", help="a calibrated checkpoint to measure, too")
    p.add_argument("--output", type=Path, default=RESULT, help="file of the results")
    options = p.parse_args()
    content = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {"variants": {}}
    examples = held_out("test", math.ceil(options.count / len(TASKS)))[: options.count]
    pictures: dict[int, dict[str, npt.NDArray[Any]]] = {}
    base: dict[float, Answered] = {}
    names = options.names or [name for name in VARIANTS if name != CALIBRATED or options.calibrated]
    for name in [FLOAT16, *(name for name in names if name != FLOAT16)]:
        count = options.count if name in FULL else min(options.count, options.others)
        if content["variants"].get(name, {}).get("questions", 0) >= count and name != FLOAT16:
            continue
        with tempfile.TemporaryDirectory() as folder:
            bundle = bundle_of(name, Path(folder), options.calibrated)
            level = VARIANTS[name].level
            session = SharedVision(bundle, threads=1, accuracy_level=level)
            session.pictures = pictures
            rows: dict[str, Any] = {}
            for ratio in RATIOS:
                found = answer(session, examples[:count], ratio, name)
                if name == FLOAT16:
                    base[ratio] = found
                rows[str(ratio)] = compared(examples[:count], found, base[ratio])
                print(name, ratio, rows[str(ratio)]["accuracy"]["all"], rows[str(ratio)]["minus_float16"], flush=True)
            formats = sorted({stored.format for stored in bundle.manifest.weight_formats.values()})
            content["variants"][name] = {
                "questions": count,
                "accuracy_level": level if formats else None,
                "formats": formats,
                "weight_bytes": sum(file.size for file in bundle.manifest.weights),
                "layer": bundle.manifest.selection_layer,
                "versions": dict(session.versions),
                "ratios": rows,
            }
        content = {"command": "python -m samples.quantised", "model": str(MODEL), **content}
        content["variants"] = {key: content["variants"][key] for key in VARIANTS if key in content["variants"]}
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
