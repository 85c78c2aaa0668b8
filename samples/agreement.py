"""Compare the answers of Spatial-VL's bundle on a backend with those of stock transformers, question by question.

    python -m samples.agreement record FOLDER --bundle BUNDLE                  record PyTorch's answers; needs torch
    python -m samples.agreement compare FOLDER --bundle BUNDLE --backend tensorrt --output FILE

`record` writes pictures and answers to FOLDER. `compare` needs nothing else, and runs on a machine without torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import track

from ivc_export.bundle.bundle import Bundle
from ivc_export.runtime.backends import BACKENDS, DEFAULT, open_session
from ivc_export.runtime.chat import Chat, Sampling
from ivc_export.runtime.interface import Session

MODEL = Path("samples/spatial-vl")
INDEX = "questions.json"
RATIOS = (1.0, 0.5)
LONGEST_ANSWER = 20


def record_answers(options: argparse.Namespace) -> None:
    """Ask stock transformers, pruned by the reference implementation."""
    from samples.spatial import held_out
    from samples.spatial.questions import TASKS
    from samples.spatial.stock import StockAnswers

    bundle = Bundle.load(options.bundle)
    examples = held_out.held_out("test", math.ceil(options.count / len(TASKS)))[: options.count]
    stock = {str(ratio): StockAnswers(MODEL, bundle, ratio) for ratio in RATIOS}
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, example in enumerate(track(examples, "PyTorch", disable=not sys.stderr.isatty())):
        example.picture.save(options.folder / f"{number}.png")
        answers = {ratio: one.answer(example) for ratio, one in stock.items()}
        rows.append({"picture": f"{number}.png", "question": example.question.text, "answers": answers})
    versions = {name: version(name) for name in ("torch", "transformers")}
    content = {"layer": bundle.manifest.selection_layer, "versions": versions, "questions": rows}
    (options.folder / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compare_answers(options: argparse.Namespace) -> None:
    """Ask the bundle the same, and write how many answers are the same."""
    bundle = Bundle.load(options.bundle)
    recorded = json.loads((options.folder / INDEX).read_text(encoding="utf-8"))
    if recorded["layer"] != bundle.manifest.selection_layer:
        sys.exit(f"the answers were recorded with the cut at layer {recorded['layer']}: record them again")
    libraries = {name: getattr(options, name) for name in ("plugin", "op_library") if getattr(options, name)}
    session, exact = open_session(bundle, options.backend, **libraries), open_session(bundle)
    found: dict[str, Any] = {}
    for ratio in RATIOS:
        same, differing, began = 0, [], time.perf_counter()
        for row in recorded["questions"]:
            chat = Chat(session, ratio, sampling=Sampling(max_tokens=LONGEST_ANSWER))
            answer = "".join(chat.ask(row["question"], [options.folder / row["picture"]]))
            wanted = row["answers"][str(ratio)]
            same += answer == wanted
            if answer != wanted:
                gap = parting(exact, ratio, row["question"], options.folder / row["picture"], chat.tokens)
                differing.append({"question": row["question"], "bundle": answer, "transformers": wanted, "gap": gap})
        seconds = (time.perf_counter() - began) / len(recorded["questions"])
        found[str(ratio)] = {"identical": same, "differing": differing, "seconds_an_answer": round(seconds, 4)}
        print(f"ratio {ratio}: {same} of {len(recorded['questions'])} answers identical", flush=True)
    content = {
        "backend": session.backend,
        "dtype": session.dtype,
        "versions": {**session.versions, **recorded["versions"]},
        "layer": recorded["layer"],
        "questions": len(recorded["questions"]),
        "ratios": found,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parting(session: Session, ratio: float, question: str, picture: Path, tokens: Sequence[int]) -> float:
    """How far apart in float32 the logits of the two tokens are at which answers part, by the largest logit.

    tokens: those drawn in the other runtime. A gap within its error of the logits is a tie that fell otherwise.
    """
    chat = Chat(session, ratio, sampling=Sampling(max_tokens=LONGEST_ANSWER))
    list(chat.ask(question, [picture]))
    same = next(i for i, (a, b) in enumerate(zip(tokens, chat.tokens, strict=False)) if a != b)
    replay = Chat(session, ratio, sampling=Sampling(max_tokens=1))
    list(replay.ask(question, [picture]))
    assert replay.step is not None
    step = replay.step
    for token in chat.tokens[:same]:
        step = replay.conversation.run([token])
    gap = step.logits[chat.tokens[same]] - step.logits[tokens[same]]
    return round(float(gap / abs(step.logits).max()), 6)


def main() -> None:
    """Record or compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("record", "compare"), help="record answers, or compare with them")
    p.add_argument("folder", type=Path, help="folder of recorded pictures and answers")
    p.add_argument("--bundle", type=Path, required=True, help="bundle of Spatial-VL")
    p.add_argument("--count", type=int, default=200, help="questions to record (default: 200)")
    p.add_argument("--backend", choices=tuple(BACKENDS), default=DEFAULT, help="runtime to compare")
    p.add_argument("--plugin", type=Path, help="libivc_plugin.so, if the engines were built with it")
    p.add_argument("--op-library", type=Path, help="our custom operators, for onnxruntime-cuda")
    p.add_argument("--output", type=Path, default=Path("agreement.json"), help="file of the results")
    options = p.parse_args()
    {"record": record_answers, "compare": compare_answers}[options.what](options)


if __name__ == "__main__":
    main()
