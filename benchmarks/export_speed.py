"""Export a checkpoint of Qwen2-VL-2B's sizes, and open and ask what came of it; each measured in its own process.

    python -m benchmarks.export_speed FOLDER

FOLDER is made, needs 25 GB, and is removed at the end. Writes benchmarks/results/export_speed-cpu.json.

Wall times are after imports. Anonymous memory is sampled every 20 ms (RssAnon of /proc/self/status); mapped memory is
RssFile. Copies alternate with `cp` and shutil.copyfile of the same file to the same disk, the source read once before;
each is timed until it returns, and again until its bytes are on the disk (fsync), so that none profits from another's
unwritten pages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.models import make_large_checkpoint, qwen2_vl_2b

RESULT = Path(__file__).parent / "results" / "export_speed-cpu.json"
MIB = 2**20
LINKS, COPIES = 5, 4
IMAGE, START, END = 503, 500, 501  # special tokens of the configuration


def memory() -> dict[str, int]:
    """Resident memory of this process in MiB: anonymous and mapped from files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {kind: int(status[field].split()[0]) // 1024 for kind, field in kinds.items()}


class MemorySampler:
    """The largest anonymous memory while it runs, in MiB, above what was there before and in all."""

    def __enter__(self) -> MemorySampler:
        self.before = self.peak = memory()["anonymous"]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, memory()["anonymous"])

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, memory()["anonymous"])


def one_export(checkpoint: str, output: str, weights: str, dtype: str) -> dict[str, Any]:
    """Export once."""
    from ivc_export.exporter.pipeline import export
    from ivc_export.exporter.recipe import ExportRecipe

    recipe = ExportRecipe(checkpoint, Path(output), weights=weights, dtype=dtype)  # type: ignore[arg-type]
    with MemorySampler() as sampler:
        start = time.perf_counter()
        export(recipe)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_anonymous_mib": sampler.peak, "imports_anonymous_mib": sampler.before}


def one_session(bundle: str, prepacking: str) -> dict[str, Any]:
    """Open a bundle, and answer about a picture of 64 visual tokens with 8 tokens."""
    import numpy as np
    import PIL.Image

    from ivc_export import families
    from ivc_export.bundle.bundle import Bundle
    from ivc_export.runtime.chat import Sampling, generate
    from ivc_export.runtime.host import HostConversation
    from ivc_export.runtime.onnxruntime.cpu import OnnxSession

    opened = Bundle.load(bundle)
    m = opened.manifest
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    picture = families.preparation(m).picture(PIL.Image.fromarray(noise), m.tokens.image)
    tokens = [1, 2, START, *[IMAGE] * picture.grid.visual, END, *range(10, 26)]
    with MemorySampler() as sampler:
        start = time.perf_counter()
        session = OnnxSession(opened, prepacking=prepacking == "on")
        seconds = time.perf_counter() - start
        after_opening = memory()
        conversation = HostConversation(session, ratio=0.5)
        start = time.perf_counter()
        stream = generate(conversation, tokens, [picture], Sampling(max_tokens=8), stop=())
        next(stream)
        first = time.perf_counter() - start
        start = time.perf_counter()
        rest = sum(1 for _ in stream)
        per_token = (time.perf_counter() - start) / rest
        after_answering = memory()
    return {
        "open_seconds": seconds,
        "first_token_seconds": first,
        "seconds_per_token": per_token,
        "after_opening_mib": after_opening,
        "after_answering_mib": after_answering,
        "peak_anonymous_mib": sampler.peak,
    }


def apart(task: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a task of this module in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.export_speed", "--task", task, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(task, *arguments, result, flush=True)
    return result


def sync(path: Path) -> float:
    """Seconds until the bytes of all files at `path` are on the disk."""
    start = time.perf_counter()
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copies(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Exports that copy, against plain copies of the weight file, in turns."""
    source, target = checkpoint / "model.safetensors", folder / "copied"

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    ways: dict[str, Callable[[], float]] = {
        "ivc-export": lambda: apart("export", checkpoint, target, "copy", "checkpoint")["seconds"],
        "cp": lambda: timed(lambda: subprocess.run(["cp", "--reflink=never", source, target], check=True)),
        "shutil.copyfile": lambda: timed(lambda: shutil.copyfile(source, target)),
    }
    with source.open("rb") as reader:  # all find the source as warm as memory allows
        while reader.read(1 << 24):
            pass
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    on_disk: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(COPIES):
        for name in list(ways)[number % 3 :] + list(ways)[: number % 3]:
            remove(target)
            os.sync()
            returned = ways[name]()
            seconds[name].append(returned)
            on_disk[name].append(returned + sync(target))
            print(name, round(returned, 1), round(on_disk[name][-1], 1), flush=True)
    remove(target)

    def ratio(times: dict[str, list[float]], peer: str) -> float:
        pairs = zip(times["ivc-export"], times[peer], strict=True)
        return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)

    return {
        "gigabytes": round(source.stat().st_size / 1e9, 2),
        "seconds": {name: [round(x, 2) for x in times] for name, times in seconds.items()},
        "seconds_until_on_disk": {name: [round(x, 2) for x in times] for name, times in on_disk.items()},
        "median_ratio_to": {peer: ratio(seconds, peer) for peer in ("cp", "shutil.copyfile")},
        "median_ratio_until_on_disk_to": {peer: ratio(on_disk, peer) for peer in ("cp", "shutil.copyfile")},
    }


def measure(folder: Path) -> dict[str, Any]:
    """All of it."""
    checkpoint = make_large_checkpoint(folder / "checkpoint", qwen2_vl_2b())
    size = (checkpoint / "model.safetensors").stat().st_size
    links = []
    for _ in range(LINKS):
        remove(folder / "linked")
        links.append(apart("export", checkpoint, folder / "linked", "link", "checkpoint"))
    result: dict[str, Any] = {
        "command": "python -m benchmarks.export_speed FOLDER",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {name: version(name) for name in ("onnx", "onnx-ir", "onnxruntime", "numpy")},
        "parameters": size // 2,
        "link": {
            "seconds": [round(one["seconds"], 2) for one in links],
            "median_seconds": round(statistics.median(one["seconds"] for one in links), 2),
            "peak_anonymous_mib": max(one["peak_anonymous_mib"] for one in links),
            "of_which_imports_mib": max(one["imports_anonymous_mib"] for one in links),
        },
        "copy": copies(checkpoint, folder),
        "conversion": {},
        "session": [],
    }
    for dtype in ("float16", "float32"):
        one = apart("export", checkpoint, folder / dtype, "copy", dtype)
        result["conversion"][f"bfloat16 to {dtype}"] = {
            "seconds": round(one["seconds"], 1),
            "peak_anonymous_mib": one["peak_anonymous_mib"],
        }
    remove(folder / "float16")
    for name, bundle in (("float32", folder / "float32"), ("bfloat16, widened", folder / "linked")):
        for prepacking in ("on", "off"):
            one = apart("session", bundle, prepacking)
            rounded = {key: round(value, 2) if isinstance(value, float) else value for key, value in one.items()}
            result["session"].append({"weights": name, "prepacking": prepacking == "on"} | rounded)
    return result


def main() -> None:
    """Measure and write, or run one task and print what it gave."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=("export", "session"))
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    if options.task:
        task: Callable[..., dict[str, Any]] = one_export if options.task == "export" else one_session
        print(json.dumps(task(*options.arguments)))
        return
    folder = Path(options.arguments[0])
    folder.mkdir(parents=True)
    try:
        RESULT.write_text(json.dumps(measure(folder), indent=2) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
