"""Decode steps and memory on the CPU of one model in float32, and with weights in 4 bits at both accuracy levels.

    python -m benchmarks.cpu_packed [--rounds N]

The model has 0.2 B random parameters (benchmarks.cpu_generate's), its lm_head and embeddings in int8, one copy for
both. All sides take turns in one process, a conversation of 40 tokens of text and 16 steps each; each figure is the
median over rounds, each ratio the median of the rounds' own ratios. Memory is anonymous (RssAnon), of prefix and
decoder alone, opened in a process of their own, above what imports take: after opening, and after an answer.

Writes benchmarks/results/cpu_packed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_generate import FIFTH
from ivc_export import Bundle, ExportRecipe, Quantisation, export
from ivc_export.bench.footprint import host_bytes
from ivc_export.contract.names import GraphName
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.loading import load_onnxruntime
from samples.make_sample import make_checkpoint

RESULT = Path(__file__).parent / "results" / "cpu_packed.json"
FLOATS = "float32"
SIDES: dict[str, tuple[str, int]] = {
    FLOATS: (FLOATS, 0),
    "int4, groups of 32, level 0": ("int4-32", 0),
    "int4, groups of 32, level 4": ("int4-32", 4),
    "int4, groups of 128, level 0": ("int4-128", 0),
    "int4, groups of 128, level 4": ("int4-128", 4),
}
"""A bundle, and an accuracy level."""
TEXT, STEPS = 40, 16


class NoSession:
    """In the place of a graph that is not opened."""

    def get_outputs(self) -> list[Any]:
        """None."""
        return []


class LanguageSession(OnnxSession):
    """A bundle without its vision graph."""

    def _open(self, name: GraphName) -> Any:
        return NoSession() if name == "vision" else super()._open(name)


def answer(session: OnnxSession, tokens: list[int]) -> float:
    """Seconds a decode step."""
    conversation = HostConversation(session)
    drawn = int(conversation.run(tokens).logits.argmax())
    start = time.perf_counter()
    for _ in range(STEPS):
        drawn = int(conversation.run([drawn]).logits.argmax())
    return (time.perf_counter() - start) / STEPS


def prompt() -> list[int]:
    """Tokens of text."""
    found: list[int] = np.random.default_rng(0).integers(0, 400, TEXT).tolist()
    return found


def memory_of(folder: Path, level: int, threads: int) -> dict[str, int]:
    """What prefix and decoder take, in MB."""
    bundle, tokens = Bundle.load(folder), prompt()
    load_onnxruntime()
    before = host_bytes()
    session = LanguageSession(bundle, threads, accuracy_level=level)
    opened = host_bytes() - before
    answer(session, tokens)
    return {"after_opening_mb": opened // 10**6, "after_an_answer_mb": (host_bytes() - before) // 10**6}


def measure(bundles: dict[str, Bundle], threads: int, rounds: int) -> dict[str, Any]:
    """Every side at this number of threads."""
    memory = {}
    for side, (name, level) in SIDES.items():
        command = [sys.executable, "-m", "benchmarks.cpu_packed", "--task", bundles[name].folder, level, threads]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
        memory[side] = json.loads(done.stdout.splitlines()[-1])
    sessions = {side: LanguageSession(bundles[name], threads, accuracy_level=lv) for side, (name, lv) in SIDES.items()}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):  # the first warms up
        for side in list(SIDES)[:: 1 if number % 2 else -1]:
            found = answer(sessions[side], prompt())
            if number:
                seconds[side].append(found)
    rows = {}
    for side, own in seconds.items():
        rows[side] = {
            "ms_a_token": round(1000 * statistics.median(own), 2),
            "times_faster_than_float32": round(
                statistics.median(a / b for a, b in zip(seconds[FLOATS], own, strict=True)), 2
            ),
            "memory": memory[side],
            "part_of_float32s_memory": round(
                memory[side]["after_an_answer_mb"] / memory[FLOATS]["after_an_answer_mb"], 3
            ),
        }
        print(threads, side, rows[side], flush=True)
    return rows


def main() -> None:
    """Measure and write; or, with --task, the memory of one side."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.task:
        folder, level, threads = options.task
        print(json.dumps(memory_of(Path(folder), int(level), int(threads))))
        return
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "checkpoint", FIFTH)
        bundles = {FLOATS: export(ExportRecipe(checkpoint, folder / FLOATS))}
        for group in (32, 128):
            q = Quantisation("int4", group, lm_head="int8", embeddings="int8")
            bundles[f"int4-{group}"] = export(ExportRecipe(checkpoint, folder / f"int4-{group}", quantisation=q))
        rows = {f"threads {n}": measure(bundles, n, options.rounds) for n in (1, 2)}
        sizes = {one: sum(file.size for file in bundle.manifest.weights) for one, bundle in bundles.items()}
    content = {
        "command": "python -m benchmarks.cpu_packed",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
        "rounds": options.rounds,
        "weight_bytes": sizes,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
