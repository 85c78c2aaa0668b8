"""An answer of Qwen2-VL-2B's true sizes on a GPU: onnxruntime's CUDA provider against stock transformers on PyTorch.

    python -m benchmarks.gpu_generate [--profile] [--sizes N ...] [--compiled-sizes N ...] [--peers NAME ...]

Makes a checkpoint with random weights in float16 (4.4 GB, under --folder, removed at the end), exports it with linked
weights, and lets each side answer a short prompt first, but for torch-compiled, which compiles that long. Then it
measures as ivc-bench does: sides take turns in one process, medians over rounds. What fails is noted with its
traceback, and ends nothing else. Writes benchmarks/results/generate-GPU.json, named after the GPU, once all is open,
after each size, and with --profile after each of our sides' profiles, which come last.

--tiny tries the script on a small model, on any machine, and writes only where --output says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.join_results import SHOWN
from benchmarks.models import make_large_checkpoint, qwen2_vl_2b
from ivc_export.bench.entrants import PEERS, Entrants, open_contestants, report
from ivc_export.bench.facts import gpu
from ivc_export.bench.measure import Bench, BenchSettings, Contestant, Row, noted
from ivc_export.bench.prompts import Prompt, noise_prompt
from ivc_export.bench.sides import BundleSide
from ivc_export.bundle.bundle import Bundle
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.backends import find_backend
from samples.tiny import TINY

RESULTS = Path(__file__).parent / "results"
BAR_SIZE = 1024
SHORT = (16, 16)
"""Visual and text tokens of the first answer."""
PACKED = ", packed"
"""Behind the name of a runtime that runs packed weights."""
LONG_ROUNDS = 2
TOP = 30
"""Kernels that a profile lists."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", type=int, nargs="*", default=[256, 1024, 4096], help="visual tokens, in this order")
    p.add_argument("--compiled-sizes", type=int, nargs="*", help="those of torch-compiled (default: all)")
    p.add_argument("--ratios", type=float, nargs="*", default=[0.5])
    p.add_argument("--backends", nargs="*", default=["onnxruntime-cuda"])
    p.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    p.add_argument("--layer", type=int, default=16, help="k of 28")
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--long", type=int, help="also answers of so many tokens, at the first size, without torch-eager")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--warmups", type=int, default=2)
    p.add_argument("--seconds", type=float, default=400, help="no size and no profile begins later than this")
    p.add_argument("--compile-prefill", action="store_true", help="torch.compile for torch-compiled's prefill, too")
    p.add_argument("--op-library", type=Path, help="our custom operators, for onnxruntime-cuda")
    p.add_argument("--packed", type=Path, help="a bundle of the same model with packed weights, to be measured beside")
    p.add_argument("--profile", action="store_true", help="add our kernels and operators that take most")
    p.add_argument("--tiny", action="store_true", help="a model of 4 small layers")
    p.add_argument("--checkpoint", type=Path, help="a folder that has the checkpoint, or gets it and keeps it")
    p.add_argument("--folder", type=Path, help="where the checkpoint is made (default: a temporary folder)")
    p.add_argument("--output", type=Path, help="the JSON file (default: results/generate-GPU.json)")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = parser().parse_args(arguments)
    output = options.output or default_output(options.tiny)
    start, work = time.perf_counter(), Path(tempfile.mkdtemp(dir=options.folder))
    clock: dict[str, float] = {}

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {text}", flush=True)

    try:
        config = TINY["qwen2_vl"] if options.tiny else qwen2_vl_2b()
        checkpoint = options.checkpoint or work / "checkpoint"
        if not (checkpoint / "config.json").is_file():
            make_large_checkpoint(checkpoint, config, "float16")
        clock["checkpoint"] = time.perf_counter() - start
        layer = min(options.layer, config["num_hidden_layers"] - 1)
        recipe = ExportRecipe(
            checkpoint, work / "bundle", layer=layer, weights="link", max_visual=max(4096, *options.sizes)
        )
        bundle = export(recipe)
        say("exported")
        settings = BenchSettings(tuple(options.ratios), options.tokens, options.rounds, options.warmups)
        failures: dict[str, str] = {}
        bench = Bench(bundle, settings, say, failures)
        most = 0.03 if options.op_library else 0.05
        libraries = {"op_library": options.op_library} if options.op_library else {}
        entrants = Entrants(options.backends, options.peers, checkpoint, options.compile_prefill, libraries)
        contestants = open_and_try(bundle, entrants, say, failures)
        if options.packed:
            contestants[1:1] = open_packed(options.packed, replace(entrants, peers=()), say, failures)
        clock["open"] = time.perf_counter() - start
        rows: list[Row] = []
        long: dict[str, Any] = {}
        profiles: list[dict[str, Any]] = []
        compiled = options.sizes if options.compiled_sizes is None else options.compiled_sizes

        def write() -> None:
            content = report(bench, contestants, rows, command(arguments))
            content |= {
                "bars": bars(rows, most),
                "seconds_since_start": {name: round(x, 1) for name, x in clock.items()},
            }
            content |= {"profiles": profiles} if options.profile else {}
            content |= {"long": long} if long else {}
            output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            say(f"{output} has {len(rows)} rows")

        def late(what: str) -> bool:
            if time.perf_counter() - start > options.seconds:
                failures[what] = f"not begun after {options.seconds:g} s"
            return what in failures

        write()
        prompts: list[Prompt] = []
        for size in options.sizes:
            if late(f"{size} visual tokens"):
                continue
            takes_part = [one for one in contestants if one.side.name != "torch-compiled" or size in compiled]
            with noted(failures, f"{size} visual tokens"):
                prompts.append(noise_prompt(bundle, size, 64))
                rows += bench.measure(takes_part, prompts[-1])
            clock[f"{size} visual tokens"] = time.perf_counter() - start
            write()
        if options.long and prompts and not late("long answers"):
            patient = [one for one in contestants if one.side.name != "torch-eager"]
            more = replace(settings, count=options.long, rounds=min(LONG_ROUNDS, options.rounds), warmups=1)
            with noted(failures, "long answers"):
                found = Bench(bundle, more, say, failures).measure(patient, prompts[0])
                rows_of_long = [row.to_dict() | {"tokens": row.tokens[:SHOWN]} for row in found]
                long |= {"settings": {**asdict(more), "ratios": more.all_ratios}, "rows": rows_of_long}
                for row in found:
                    say(f"{options.long} tokens, {row.side:24} {row.ratio:.1f} token {row.decode:8.3f}")
            write()
        ours = [one for one in contestants if isinstance(one.side, BundleSide)]
        for prompt, one in product(prompts if options.profile else (), ours):
            what = f"profile of {one.side.name}, {prompt.visual} visual tokens"
            if late(what):
                continue
            say(what)
            profiles.append(profile(one, prompt, options.tokens, failures))
            write()
        for row in rows:
            say(
                f"{row.visual_tokens:5} {row.side:17} {row.ratio:.1f} "
                f"first {row.first_token:8.2f} token {row.decode:8.3f} "
                f"{rounded(row.stages)} {rounded(row.selection or {})}"
            )
        for bar in bars(rows, most):
            say(f"{'met ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['value']}")
        for name, text in failures.items():
            say(f"FAILED {name}: {text.splitlines()[0]}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def open_and_try(
    bundle: Bundle, entrants: Entrants, say: Callable[[str], None], failures: dict[str, str]
) -> list[Contestant]:
    """Those who open and answer a short prompt, ours first; onnxruntime's CUDA provider, where it does not, once more
    without a CUDA graph, as its notes then say. torch-compiled answers nothing here: it would compile for that.
    """
    prompt = noise_prompt(bundle, *SHORT)

    def works(one: Contestant) -> bool:
        name = f"{one.side.name}, first answer"
        with noted(failures, name):
            if one.side.name != "torch-compiled":
                say(f"{name}: {one.side.answer(prompt, 0.5, 4).tokens}")
        return name not in failures

    found: list[Contestant] = []
    parts = []
    for name in entrants.backends:
        options = {key: value for key, value in entrants.options.items() if find_backend(name).takes(key)}
        parts.append(replace(entrants, backends=[name], peers=(), options=options))
    parts.append(replace(entrants, backends=(), options={}))
    for part in parts:
        opened = [one for one in open_contestants(bundle, part, say, failures) if works(one)]
        captures = [name for name in part.backends if find_backend(name).takes("cuda_graph")]
        if not opened and captures:
            for name in [name for name in failures if name.startswith(captures[0])]:
                failures[f"{name}, with a CUDA graph"] = failures.pop(name)
            say("again without a CUDA graph")
            launched = replace(part, options={**part.options, "cuda_graph": False})
            opened = open_contestants(bundle, launched, say, failures)
            opened = [one for one in opened if works(one)]
        found += opened
    return found


def open_packed(
    folder: Path, entrants: Entrants, say: Callable[[str], None], failures: dict[str, str]
) -> list[Contestant]:
    """A bundle with packed weights in the same runtimes, by other names."""
    found = open_contestants(Bundle.load(folder), entrants, say, failures)
    for one in found:
        one.side.name += PACKED
    return found


def command(arguments: Sequence[str] | None) -> str:
    """How this was called."""
    return shlex.join(["python", "-m", "benchmarks.gpu_generate", *(sys.argv[1:] if arguments is None else arguments)])


def default_output(tiny: bool) -> Path:
    """results/generate-h100.json on an NVIDIA H100 80GB HBM3; a trial writes to the temporary folder."""
    found = gpu()
    if tiny or found is None:
        return Path(tempfile.gettempdir()) / "generate-trial.json"
    words = [word for word in found["name"].replace("NVIDIA", "").split() if any(c.isdigit() for c in word)]
    return RESULTS / f"generate-{(words or ['gpu'])[0].lower()}.json"


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To print."""
    return {name: round(value, 3) for name, value in values.items()}


def bars(rows: Sequence[Row], most: float = 0.03) -> list[dict[str, Any]]:
    """What must hold of the first runtime of the bundle, with what was measured. most: of a prefill, for selection and
    compaction."""
    found: list[dict[str, Any]] = []

    def bar(text: str, value: float, met: bool) -> None:
        found.append({"bar": text, "value": round(value, 4), "met": met})

    own = [row for row in rows if row.stages.get("prefix") is not None]
    for size in dict.fromkeys(row.visual_tokens for row in own):
        side = next(row.side for row in own if row.visual_tokens == size)
        peers = {row.side: row for row in rows if row.visual_tokens == size and row.stages.get("prefix") is None}
        mine = {row.ratio: row for row in own if row.visual_tokens == size and row.side == side}
        eager, compiled, whole = peers.get("torch-eager"), peers.get("torch-compiled"), mine.get(1.0)
        for row in mine.values():
            where = f"{side}, {size} visual tokens, ratio {row.ratio:g}"
            if eager is not None:
                times = eager.first_token / row.first_token
                least = 3.0 if size == BAR_SIZE else 1.0
                bar(f"{where}: first token at least {least:g} times faster than eager", times, times >= least)
                times = eager.decode / row.decode
                bar(f"{where}: decode at least 20 times faster than eager", times, times >= 20)
            if compiled is not None:
                times = compiled.decode / row.decode
                bar(f"{where}: decode faster than compiled", times, times > 1)
            if row.selection is not None:
                share = row.selection["share"]
                bar(f"{where}: selection and compaction under {most:.0%} of prefill", share, share < most)
            if whole is not None and row is not whole:
                for name, a, b in (
                    ("first token", row.first_token, whole.first_token),
                    ("decode", row.decode, whole.decode),
                ):
                    bar(f"{where}: {name} never slower than unpruned (by unpruned)", a / b, a <= b)
    return found


def profile(one: Contestant, prompt: Prompt, count: int, failures: dict[str, str]) -> dict[str, Any]:
    """The GPU's kernels up to the first token and in decode steps, nothing pruned; operators where captured."""
    side = one.side
    assert isinstance(side, BundleSide)
    found: dict[str, Any] = {"side": side.name, "visual_tokens": prompt.visual, "decoded_tokens": count}
    where = f"of {side.name}, {prompt.visual} visual tokens"
    with noted(failures, f"kernels {where}"):
        conversation = side.converse(prompt, 1.0, count)
        found["first_token"] = kernels(lambda: conversation.run(prompt.tokens, [prompt.picture]))
        token = prompt.tokens[-1:]
        found["decode"] = kernels(lambda: [conversation.run(token) for _ in range(count)])
    if side.backend.takes("cuda_graph"):
        with noted(failures, f"operators {where}"):
            found["operators"] = operators(side.session, prompt, count)
    return found


def kernels(call: Callable[[], object]) -> dict[str, Any]:
    """What the device did during `call`, by kernel; on a CPU by PyTorch's operators."""
    import torch
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as session:
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in session.events() or ():
        if not cuda or "CUDA" in str(event.device_type):
            total[event.name][0] += event.time_range.elapsed_us() / 1000
            total[event.name][1] += 1
    return {
        "wall_ms": round(1000 * wall, 2),
        "kernel_ms": round(sum(time for time, _ in total.values()), 2),
        "launches": sum(int(count) for _, count in total.values()),
        "kernels": top(total),
    }


def top(total: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The largest of milliseconds and counts by name."""
    best = sorted(total.items(), key=lambda item: -item[1][0])[:TOP]
    return [{"name": name[:160], "ms": round(ms, 3), "count": int(count)} for name, (ms, count) in best]


def operators(session: Any, prompt: Prompt, count: int) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds by operator and graph, in sessions of their own that record, without captured CUDA graphs."""
    options, folder = onnxruntime.SessionOptions, tempfile.mkdtemp()

    def recording() -> Any:
        made = options()
        made.enable_profiling, made.profile_file_prefix = True, f"{folder}/ort"
        return made

    onnxruntime.SessionOptions = recording
    try:
        given = {"cuda_graph": False, "op_library": session.op_library}
        watched = type(session)(session.bundle, session.device, **given)
        BundleSide(watched).answer(prompt, 1.0, count)  # which opens those of what goes up
    finally:
        onnxruntime.SessionOptions = options
    found = {}
    for name, one in watched._sessions.items():
        total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for event in json.loads(Path(one.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                entry = total[event["args"].get("op_name", event["name"])]
                entry[0] += event["dur"] / 1000
                entry[1] += 1
        found[name] = top(total)
    shutil.rmtree(folder, ignore_errors=True)
    return found


if __name__ == "__main__":
    main()
