"""Measure the accuracy of Spatial-VL's answers with pruning, on questions that it was not trained on.

    python -m samples.evaluate methods     find the layer, then try every method at every ratio, in PyTorch (a GPU
                                           helps)
    python -m samples.evaluate bundle      compare a bundle on onnxruntime with stock transformers, answer by answer,
                                           at ratios 1 and 0.5, or with each --method at 0.5
    python -m samples.evaluate follow-ups  ask second questions about a picture, in both ways that conversations go on
    python -m samples.evaluate plot        draw docs/accuracy.png from the results

Results are written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from samples.spatial.checkpoint import load_network
from samples.spatial.held_out import LONGEST_ANSWER, Answering, HeldOutExample, Pruning, Score, held_out, scores
from samples.spatial.pruning import BEFORE_THE_DECODER, METHODS
from samples.spatial.questions import TASKS, is_correct

MODEL = Path("samples/spatial-vl")
RESULTS = Path("benchmarks/results")
METHODS_FILE, BUNDLE_FILE = RESULTS / "spatial-vl-pruning.json", RESULTS / "spatial-vl-bundle.json"
FOLLOW_UPS_FILE = RESULTS / "spatial-vl-follow-ups.json"
BUNDLE_METHODS_FILE = RESULTS / "spatial-vl-bundle-methods.json"
RATIOS = (0.7, 0.5, 0.3, 0.2)
ENOUGH = 0.99
"""The layer is the lowest at which IVC-Prune at 0.5 keeps this part of the unpruned accuracy, or else the best."""


def summary(found: dict[str, Score]) -> dict[str, Any]:
    """Accuracies and intervals, as plain data."""
    return {
        task: {"accuracy": round(part.accuracy, 4), "interval": [round(end, 4) for end in part.interval]}
        for task, part in found.items()
    }


def difference(right: Sequence[bool], base: Sequence[bool]) -> dict[str, Any]:
    """Mean of paired differences with its 95% interval."""
    gaps = np.array(right, float) - np.array(base, float)
    half = 1.96 * gaps.std(ddof=1) / math.sqrt(len(gaps))
    return {"mean": round(gaps.mean(), 4), "interval": [round(gaps.mean() - half, 4), round(gaps.mean() + half, 4)]}


class SplitTrial:
    """Both answers to every question of one split, under any pruning."""

    def __init__(self, answering: Answering, split: str, each: int) -> None:
        self.answering = answering
        self.examples: list[HeldOutExample] = held_out(split, each)
        self.images = answering.encode(self.examples)
        self.base: list[list[bool]] = []

    def run(self, pruning: Pruning | None) -> dict[str, Any]:
        """Scores of first and second questions, and how they differ from those of the first run."""
        answers = self.answering.converse(self.examples, self.images, pruning)
        asked = [[e.question for e in self.examples], [e.second for e in self.examples]]
        right = [[is_correct(*pair) for pair in zip(*parts, strict=True)] for parts in zip(asked, answers, strict=True)]
        self.base = self.base or right
        names = ("first", "second")
        return {
            name: summary(scores(self.examples, answers[turn], second=turn == 1))
            | {"minus_unpruned": difference(right[turn], self.base[turn])}
            for turn, name in enumerate(names)
        }


def evaluate_methods(arguments: argparse.Namespace) -> None:
    """Choose the layer on one split, compare methods on another."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    network = load_network(arguments.model).to(device)
    answering = Answering(network, Tokenizer.from_file(str(arguments.model / "tokenizer.json")))
    ivc_prune = METHODS["IVC-Prune"]
    calibration = SplitTrial(answering, "calibration", arguments.calibration)
    layers: dict[str, Any] = {"unpruned": calibration.run(None)}
    depth = len(network.model.layers)
    for layer in track(range(1, depth), "layers", disable=not sys.stderr.isatty()):
        layers[str(layer)] = {str(ratio): calibration.run(Pruning(layer, ratio, ivc_prune)) for ratio in (0.5, 0.2)}
    accuracy = {layer: layers[str(layer)]["0.5"]["first"]["all"]["accuracy"] for layer in range(1, depth)}
    bar = ENOUGH * layers["unpruned"]["first"]["all"]["accuracy"]
    chosen = next(
        (layer for layer, found in accuracy.items() if found >= bar), max(accuracy, key=lambda i: accuracy[i])
    )
    trial = SplitTrial(answering, "test", arguments.test)
    results: dict[str, Any] = {"none": {"1.0": trial.run(None)}}
    for name, rank in track(METHODS.items(), "methods", disable=not sys.stderr.isatty()):
        layer = 0 if name in BEFORE_THE_DECODER else chosen
        results[name] = {str(ratio): trial.run(Pruning(layer, ratio, rank)) for ratio in RATIOS}
    report = {
        "command": "python -m samples.evaluate methods",
        "model": "samples/spatial-vl",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "dtype": "float32",
        "calibration_questions": len(calibration.examples),
        "test_questions": len(trial.examples),
        "layer": chosen,
        "layers": layers,
        "methods": results,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / METHODS_FILE.name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console(width=140).print(table_of(report))


def table_of(report: dict[str, Any]) -> Table:
    """The headline table."""
    title = f"cut at layer {report['layer']}, {report['test_questions']} questions, accuracy in %"
    table = Table("method", "kept", *TASKS, "all", "second question", title=title)
    for name, by_ratio in report["methods"].items():
        for ratio, found in by_ratio.items():
            parts = [found["first"][task]["accuracy"] for task in (*TASKS, "all")]
            parts.append(found["second"]["all"]["accuracy"])
            table.add_row(name, ratio, *(f"{100 * part:.1f}" for part in parts))
    return table


def evaluate_bundle(arguments: argparse.Namespace) -> None:
    """Answers of a bundle and of stock transformers to the same questions."""
    from ivc_export.bundle.bundle import Bundle
    from ivc_export.runtime.backends import open_session
    from ivc_export.runtime.chat import Chat, Sampling
    from samples.spatial.stock import StockAnswers

    bundle = Bundle.load(arguments.bundle)
    session = open_session(bundle)
    examples = held_out("test", math.ceil(arguments.count / len(TASKS)))[: arguments.count]

    def measure(ratio: float, method: str) -> dict[str, Any]:
        stock = StockAnswers(arguments.model, bundle, ratio, method)
        ours, theirs, seconds = [], [], 0.0
        for example in track(examples, f"{method}, ratio {ratio}", disable=not sys.stderr.isatty()):
            began = time.perf_counter()
            chat = Chat(session, ratio, sampling=Sampling(max_tokens=LONGEST_ANSWER), method=method)
            ours.append("".join(chat.ask(example.question.text, [example.picture])))
            seconds += time.perf_counter() - began
            theirs.append(stock.answer(example))
        differing = [
            {"question": e.question.text, "bundle": a, "transformers": b}
            for e, a, b in zip(examples, ours, theirs, strict=True)
            if a != b
        ]
        return {
            "identical": len(examples) - len(differing),
            "differing": differing,
            "accuracy": summary(scores(examples, ours)),
            "seconds_an_answer": round(seconds / len(examples), 3),
        }

    command = f"python -m samples.evaluate bundle --bundle {arguments.bundle} --count {arguments.count}"
    if arguments.method:
        command += "".join(f" --method {method}" for method in arguments.method)
        file, rows = BUNDLE_METHODS_FILE, {f"{method} 0.5": measure(0.5, method) for method in arguments.method}
    else:
        file, rows = BUNDLE_FILE, {str(ratio): measure(ratio, bundle.manifest.selection.method) for ratio in (1.0, 0.5)}
    report = {
        "command": command,
        "layer": bundle.manifest.selection_layer,
        "questions": len(examples),
        "methods" if arguments.method else "ratios": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / file.name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for kept, row in rows.items():
        print(f"{kept}: {row['identical']} of {len(examples)} answers identical")


def evaluate_follow_ups(arguments: argparse.Namespace) -> None:
    """Second questions about a picture: pruned again, over the compacted cache, and with nothing pruned."""
    from ivc_export.bundle.bundle import Bundle
    from ivc_export.runtime.backends import open_session
    from ivc_export.runtime.chat import Chat, FollowUp, Sampling

    bundle = Bundle.load(arguments.bundle)
    session = open_session(bundle, threads=1)
    examples = held_out("test", math.ceil(arguments.count / len(TASKS)))[: arguments.count]
    ways: dict[str, tuple[float, FollowUp]] = {
        "nothing pruned": (1.0, "again"),
        "again": (0.5, "again"),
        "compacted": (0.5, "compacted"),
    }
    answers: dict[str, list[list[str]]] = {way: [[], []] for way in ways}
    waited: dict[str, list[list[float]]] = {way: [[], []] for way in ways}
    for example in track(examples, "questions", disable=not sys.stderr.isatty()):
        for way, (ratio, follow_up) in ways.items():  # by turns, so that all meet the same machine
            chat = Chat(session, ratio, sampling=Sampling(max_tokens=LONGEST_ANSWER), follow_up=follow_up)
            asked: list[tuple[str, list[Any]]] = [(example.question.text, [example.picture]), (example.second.text, [])]
            for turn, (question, pictures) in enumerate(asked):
                began = time.perf_counter()
                pieces = chat.ask(question, pictures)
                first = next(pieces, "")
                waited[way][turn].append(time.perf_counter() - began)
                answers[way][turn].append(first + "".join(pieces))
    right = {
        way: [
            [is_correct(e.second if turn else e.question, a) for e, a in zip(examples, given, strict=True)]
            for turn, given in enumerate(found)
        ]
        for way, found in answers.items()
    }
    report: dict[str, Any] = {
        "command": f"python -m samples.evaluate follow-ups --bundle {arguments.bundle} --count {arguments.count}",
        "layer": bundle.manifest.selection_layer,
        "questions": len(examples),
        "device": platform.machine(),
        "threads": 1,
        "ways": {
            way: {
                "ratio": ratio,
                **{
                    name: summary(scores(examples, answers[way][turn], second=turn == 1))
                    | {"minus_unpruned": difference(right[way][turn], right["nothing pruned"][turn])}
                    | {"median_seconds_to_first_text": round(float(np.median(waited[way][turn])), 4)}
                    for turn, name in enumerate(("first", "second"))
                },
            }
            for way, (ratio, _) in ways.items()
        },
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / FOLLOW_UPS_FILE.name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for way, row in report["ways"].items():
        print(way, *(f"{name}: {100 * row[name]['all']['accuracy']:.1f}%" for name in ("first", "second")))


def plot(arguments: argparse.Namespace) -> None:
    """Accuracy by kept tokens, for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = json.loads((arguments.output / METHODS_FILE.name).read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    panels = (("first", "all", "all tasks"), ("first", "grounding", "grounding"), ("second", "all", "second question"))
    for axis, (turn, task, title) in zip(axes, panels, strict=True):
        unpruned = report["methods"]["none"]["1.0"][turn][task]["accuracy"]
        axis.axhline(100 * unpruned, color="0.5", linestyle=":", label="no pruning")
        for name in METHODS:
            found = [report["methods"][name][str(ratio)][turn][task] for ratio in RATIOS]
            middle = [100 * part["accuracy"] for part in found]
            spread = [
                [abs(100 * part["interval"][end] - m) for part, m in zip(found, middle, strict=True)] for end in (0, 1)
            ]
            style = {"linewidth": 2.5, "zorder": 3} if name == "IVC-Prune" else {"linewidth": 1.2}
            axis.errorbar(
                [100 * ratio for ratio in RATIOS], middle, yerr=spread, marker="o", markersize=4, label=name, **style
            )
        axis.set(title=title, xlabel="visual tokens kept, %", xlim=(75, 15))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig("docs/accuracy.png", dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (
        ("methods", evaluate_methods),
        ("bundle", evaluate_bundle),
        ("follow-ups", evaluate_follow_ups),
        ("plot", plot),
    ):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
        command.add_argument("--model", type=Path, default=MODEL, help="checkpoint of Spatial-VL")
        if name == "methods":
            command.add_argument(
                "--calibration", type=int, default=50, help="questions of each task to find the layer (default: 50)"
            )
            command.add_argument("--test", type=int, default=334, help="questions of each task to test (default: 334)")
        elif name in ("bundle", "follow-ups"):
            command.add_argument("--bundle", type=Path, required=True, help="bundle of Spatial-VL")
            command.add_argument("--count", type=int, default=200, help="number of questions (default: 200)")
        if name == "bundle":
            command.add_argument(
                "--method", action="append", help="method to select tokens by, at ratio 0.5; may be repeated"
            )
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
