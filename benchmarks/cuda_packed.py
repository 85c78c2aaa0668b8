"""An answer of Qwen2-VL-2B's true sizes on onnxruntime's CUDA provider: float16, and weights in 4 bits.

    python -m benchmarks.cuda_packed [--op-library LIB] [--folder FOLDER] [--rounds N] [--tiny]

Makes a checkpoint with random weights in float16 (4.4 GB), exports it as it is, and in 4 bits in groups of 32 with an
lm_head of 8 bits; --folder keeps both. Each side then opens and answers in a process of its own, which tells its device
memory above that of an empty CUDA context, with an answer of 1,024 visual tokens. Times are taken by turns in one
process: each figure is a median over rounds, each ratio the median of the rounds' own ratios.

Writes benchmarks/results/cuda_packed.json, or --output. --tiny tries the script on a small model, on the CPU provider.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from benchmarks.models import make_large_checkpoint, qwen2_vl_2b
from ivc_export import Bundle, ExportRecipe, Quantisation, export
from ivc_export.bench.facts import gpu
from ivc_export.bench.footprint import device_counter
from ivc_export.bench.prompts import noise_prompt
from ivc_export.bench.sides import Answer, BundleSide
from ivc_export.contract.ratio import kept_tokens
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.session_options import Provider
from samples.tiny import TINY

RESULT = Path(__file__).parent / "results" / "cuda_packed.json"
FLOATS, PACKED = "float16", "int4, groups of 32, lm_head int8"
SIDES: Mapping[str, Quantisation] = {FLOATS: Quantisation(), PACKED: Quantisation("int4", 32, lm_head="int8")}
TEXT, STEPS, RATIO = 64, 32, 0.5
BARS = {"decode": 0.88, "first_token": 1.15}
"""Of float16's, at most."""
MOST_BYTES = 2.8e9
"""On the device, of weights in 4 bits."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--op-library", type=Path, help="our custom operators")
    p.add_argument(
        "--folder", type=Path, help="has the checkpoint and bundles, or gets them (default: a temporary one)"
    )
    p.add_argument("--visual", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--output", type=Path, default=RESULT)
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    return p


def open_side(folder: Path, options: argparse.Namespace) -> BundleSide:
    """A bundle on the CUDA provider; on the CPU provider with --tiny."""
    provider: Provider = "cpu" if options.tiny else "cuda"
    return BundleSide(FusedSession(Bundle.load(folder), provider, op_library=options.op_library))


def answer(side: BundleSide, options: argparse.Namespace) -> Answer:
    """One answer."""
    return side.answer(noise_prompt(side.session.bundle, options.visual, TEXT), RATIO, STEPS)


def memory_of(options: argparse.Namespace) -> dict[str, int | None]:
    """Bytes on the device above those of an empty context: after opening, and after two answers."""
    counter = device_counter()  # makes the context
    if counter is None:
        return {"opened": None, "answered": None}
    before = counter()
    side = open_side(options.memory_of, options)
    opened = counter() - before
    for _ in range(2):
        answer(side, options)
    return {"opened": opened, "answered": counter() - before}


def bundles(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Each side's, made if it is not there."""
    found = {side: folder / name for side, name in zip(SIDES, (FLOATS, "int4"), strict=True)}
    checkpoint = folder / "checkpoint"
    config = TINY["qwen2_vl"] if options.tiny else qwen2_vl_2b()
    if not (checkpoint / "config.json").is_file():
        make_large_checkpoint(checkpoint, config, "float16")
    for side, quantisation in SIDES.items():
        if not found[side].is_dir():
            layer = min(16, config["num_hidden_layers"] - 1)
            recipe = ExportRecipe(checkpoint, found[side], layer=layer, quantisation=quantisation, max_visual=4096)
            export(recipe)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; or, with --memory-of, tell one side's memory."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    if options.memory_of:
        print(json.dumps(memory_of(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folders = bundles(options.folder or Path(temporary), options)
        memory = {}
        for side, folder in folders.items():
            command = [sys.executable, "-m", "benchmarks.cuda_packed", *given, "--memory-of", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            memory[side] = json.loads(done.stdout.splitlines()[-1])
            print(side, memory[side], flush=True)
        opened = {side: open_side(folder, options) for side, folder in folders.items()}
        answers: dict[str, list[Answer]] = {side: [] for side in opened}
        for number in range(options.rounds + 2):  # two warm up: CUDA graphs are captured then
            for side in list(opened)[:: 1 if number % 2 else -1]:
                found = answer(opened[side], options)
                if number > 1:
                    answers[side].append(found)
    rows = {side: row(answers, side) | {"device_bytes": memory[side]} for side in answers}
    for side, values in rows.items():
        print(side, values, flush=True)
    installed = {one.metadata["Name"]: one.version for one in distributions()}
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.cuda_packed", *given]),
        "gpu": gpu(),
        "versions": {name: installed.get(name) for name in ("onnxruntime-gpu", "onnxruntime", "numpy")},
        "op_library": options.op_library is not None,
        "visual_tokens": options.visual,
        "kept_tokens": kept_tokens(options.visual, RATIO),
        "text_tokens": TEXT,
        "decoded_tokens": STEPS,
        "rounds": options.rounds,
        "rows": rows,
        "bars": bars(rows),
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def row(answers: Mapping[str, Sequence[Answer]], side: str) -> dict[str, Any]:
    """One side's milliseconds, and its parts of float16's."""

    def times(one: Answer) -> dict[str, float]:
        return {"first_token": 1000 * one.first, "decode": 1000 * statistics.median(one.steps)}

    own, floats = ([times(one) for one in answers[name]] for name in (side, FLOATS))
    return {
        **{name: round(statistics.median(one[name] for one in own), 3) for name in BARS},
        **{
            f"{name}_of_float16s": round(
                statistics.median(a[name] / b[name] for a, b in zip(own, floats, strict=True)), 3
            )
            for name in BARS
        },
        "stages": {
            name: round(1000 * statistics.median(one.stages.get(name, 0.0) for one in answers[side]), 3)
            for name in answers[side][0].stages
        },
    }


def bars(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """What must hold of weights in 4 bits."""
    packed = rows[PACKED]
    found = {
        f"{name} at most {most:g} of float16's": packed[f"{name}_of_float16s"] <= most for name, most in BARS.items()
    }
    taken = packed["device_bytes"]["answered"]
    return found if taken is None else found | {"at most 2.8 GB on the device": taken <= MOST_BYTES}


if __name__ == "__main__":
    main()
