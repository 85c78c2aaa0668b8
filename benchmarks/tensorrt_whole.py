"""Whole models in TensorRT engines, each graph by a process of its own: what building takes in time and memory.

    python -m benchmarks.tensorrt_whole make FOLDER [--layers N] [--depth N] [--tokenizer CHECKPOINT]
                                                                                 a bundle of Qwen2-VL-2B's sizes
    python -m benchmarks.tensorrt_whole build FOLDER GRAPH [--plugin LIB]        one of its engines
    python -m benchmarks.tensorrt_whole join FOLDER [--plugin LIB]               engines that the runtimes find
    python -m benchmarks.tensorrt_whole time FOLDER [--backend NAME] [--plugin LIB | --op-library LIB] --output FILE
                                                                                 answers, nothing pruned and half

`build` writes GRAPH.json beside the engine: seconds, the process's peak of host memory, and the peak of the device's
memory above what was used before, which other builds at the same time raise. With `join`, `ivc-bench` and `ivc-run`
take the engines as ivc-build's, and FILE of --output gets what the builds took. `time` answers one prompt of
--max-visual visual tokens in rounds, by turns with nothing pruned and with half of them kept: medians in ms, the KV
cache, and the tokens, by which runtimes are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.models import make_large_checkpoint, qwen2_vl_2b
from ivc_export.bench.facts import machine
from ivc_export.bench.prompts import noise_prompt
from ivc_export.bench.sides import Answer, BundleSide
from ivc_export.bundle import staging
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.backends import BACKENDS, open_session
from ivc_export.tensorrt.build import link_weights, working_folder
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.graphs import choose_graphs, lowered
from ivc_export.tensorrt.loading import load_plugin, load_tensorrt, own_capability
from ivc_export.tensorrt.profiles import profile_names, profiles
from ivc_export.tensorrt.recipe import EngineRecipe
from ivc_export.tensorrt.store import RECORD, BuiltEngine, engine_folder, make_record

RESULTS = Path(__file__).parent / "results"
POLL_SECONDS = 0.2
TEXT, STEPS, RATIOS = 48, 32, (1.0, 0.5)
ROUNDS, WARMUPS = 7, 2
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def recipe(options: argparse.Namespace) -> EngineRecipe:
    """As ivc-build is told."""
    sources = tuple(os.environ["IVC_TACTIC_SOURCES"].split(",")) if "IVC_TACTIC_SOURCES" in os.environ else None
    return EngineRecipe(
        dtype="float16",
        max_visual=options.max_visual,
        max_text=64,
        max_new=128,
        opt_visual=options.max_visual,
        opt_text=64,
        plugin=options.plugin,
        tactic_sources=sources,
    )


def make(options: argparse.Namespace) -> None:
    """A checkpoint of random weights, and its bundle."""
    config = qwen2_vl_2b(options.layers, options.depth)
    if options.tokenizer:
        given = json.loads((options.tokenizer / "config.json").read_text(encoding="utf-8"))
        config |= {name: given[name] for name in config if name.endswith("_token_id") and name in given}
    checkpoint = make_large_checkpoint(options.folder / "checkpoint", config, "float16")
    for name in TOKENIZER if options.tokenizer else ():
        if (options.tokenizer / name).is_file():  # a template may lie in any of them
            shutil.copy2(options.tokenizer / name, checkpoint / name)
    layer = min(16, options.layers // 2)
    export(ExportRecipe(checkpoint, options.folder / "bundle", layer=layer, weights="link"))


class DevicePeak:
    """The most device memory that was used, in bytes, asked of nvidia-smi from time to time."""

    def __init__(self) -> None:
        self.command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        self.before: int | None = self.used()
        self.most, self.done = self.before, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def used(self) -> int | None:
        """Bytes in use now."""
        if shutil.which(self.command[0]) is None:
            return None
        return int(subprocess.run(self.command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20

    def watch(self) -> None:
        """Until `stop`."""
        while self.most is not None and not self.done.wait(POLL_SECONDS):
            self.most = max(self.most, self.used() or 0)

    def stop(self) -> int | None:
        """The peak above what was used before; None where nothing tells."""
        self.done.set()
        self.thread.join()
        return None if self.most is None or self.before is None else self.most - self.before


def build(options: argparse.Namespace) -> None:
    """One engine."""
    bundle, wanted, name = Bundle.load(options.folder / "bundle"), recipe(options), options.graph
    trt = load_tensorrt("tensorrt")
    if options.plugin:
        load_plugin(options.plugin)
    capability = own_capability(trt)
    choices = choose_graphs(bundle, wanted, trt, capability)
    model = lowered(bundle, name, choices)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak, start = DevicePeak(), time.perf_counter()
    with staging.fresh_folder(bundle.folder, f".one-{name}-") as work:
        link_weights(bundle, work)
        extents = profiles(bundle, name, wanted).values()
        plan = compile_graph(trt, model, extents, wanted.options(capability, choices.dtype), work)
    sizes = bundle.manifest.decoder
    took = {
        "graph": name,
        "layers": sizes.layers,
        "seconds": round(time.perf_counter() - start, 1),
        "engine_bytes": len(plan),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "host_before_bytes": before << 10,
        "device_peak_bytes": peak.stop(),
    }
    (options.folder / f"{name}.plan").write_bytes(plan)
    (options.folder / f"{name}.json").write_text(json.dumps(took))
    print(json.dumps(took), flush=True)


def join(options: argparse.Namespace) -> None:
    """The engines as ivc-build would have put them."""
    bundle, wanted = Bundle.load(options.folder / "bundle"), recipe(options)
    trt = load_tensorrt("tensorrt")
    capability = own_capability(trt)
    record = make_record(bundle, wanted, trt, capability, choose_graphs(bundle, wanted, trt, capability))
    built: dict[GraphName, BuiltEngine] = {}
    took: list[dict[str, Any]] = []
    with working_folder(bundle) as work:
        (work / "done").mkdir()
        for name in GRAPH_NAMES:
            plan = options.folder / f"{name}.plan"
            shutil.copy2(plan, work / "done" / plan.name)
            built[name] = BuiltEngine(file=plan.name, bytes=plan.stat().st_size, profiles=profile_names(name))
            took.append(json.loads(plan.with_suffix(".json").read_text(encoding="utf-8")))
        text = record.model_copy(update={"engines": built}).model_dump_json(indent=2)
        (work / "done" / RECORD).write_text(text + "\n", encoding="utf-8")
        folder = engine_folder(bundle, trt, "tensorrt", capability)
        folder.parent.mkdir(exist_ok=True)
        staging.put_in_place(work / "done", folder, force=True)
    if options.output:
        command = shlex.join(["python", "-m", "benchmarks.tensorrt_whole", *sys.argv[1:]])
        content = {"command": command, **machine(True), "tensorrt": trt.__version__, "dtype": "float16", "builds": took}
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> None:
    """Medians over rounds of the times of an answer."""
    libraries = {name: getattr(options, name) for name in ("plugin", "op_library") if getattr(options, name)}
    side = BundleSide(open_session(Bundle.load(options.folder / "bundle"), options.backend, **libraries))
    prompt = noise_prompt(side.session.bundle, options.max_visual, TEXT)
    answers: dict[float, list[Answer]] = {ratio: [] for ratio in RATIOS}
    for number in range(WARMUPS + ROUNDS):
        for ratio in RATIOS[:: 1 if number % 2 else -1]:
            answer = side.answer(prompt, ratio, STEPS)
            if number >= WARMUPS:
                answers[ratio].append(answer)
    rows = []
    for ratio, given in answers.items():
        stages = {name: 1000 * statistics.median(a.stages[name] for a in given) for name in given[0].stages}
        times = {
            "first_token": 1000 * statistics.median(a.first for a in given),
            "decode": 1000 * statistics.median(step for a in given for step in a.steps),
        }
        row = {"ratio": ratio, **times, "stages": stages, "cache_bytes": given[0].cache_bytes}
        rows.append(row | {"tokens": given[0].tokens})
        print(json.dumps(row), flush=True)
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.tensorrt_whole", *sys.argv[1:]]),
        **machine(True),
        "backend": side.name,
        "dtype": side.dtype,
        "visual_tokens": options.max_visual,
        "text_tokens": TEXT,
        "rounds": ROUNDS,
        "rows": rows,
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Make, build, join or time."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("make", "build", "join", "time"))
    p.add_argument("folder", type=Path)
    p.add_argument("graph", nargs="?", choices=GRAPH_NAMES)
    p.add_argument("--plugin", type=Path)
    p.add_argument("--op-library", type=Path, help="our custom operators, to time onnxruntime-cuda")
    p.add_argument(
        "--backend", choices=tuple(BACKENDS), default="tensorrt", help="that `time` runs (default: tensorrt)"
    )
    p.add_argument("--layers", type=int, default=28, help="of the decoder (default: 28)")
    p.add_argument("--depth", type=int, default=32, help="of the vision encoder (default: 32)")
    p.add_argument(
        "--tokenizer", type=Path, help="a Qwen2-VL checkpoint whose tokenizer and special tokens `make` takes"
    )
    p.add_argument("--max-visual", type=int, default=1024, help="visual tokens a prompt at most (default: 1024)")
    p.add_argument("--output", type=Path, help="where `join` and `time` write")
    options = p.parse_args()
    if options.what == "build" and options.graph is None:
        p.error("name the graph to build")
    if options.what == "time" and options.output is None:
        p.error("name the file of --output")
    {"make": make, "build": build, "join": join, "time": measure}[options.what](options)


if __name__ == "__main__":
    main()
