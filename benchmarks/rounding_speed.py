"""Exports that round a checkpoint of Qwen2-VL-2B's sizes to 4 and 8 bits, each measured in its own process.

    python -m benchmarks.rounding_speed FOLDER

FOLDER is made, needs 10 GB, and is removed at the end. Times are after imports, until all is written and hashed; peak
memory is anonymous, sampled every 20 ms. Output errors are of random layers of the model's sizes on normal rows, with
the search and with rounding to the nearest. Writes benchmarks/results/rounding_speed-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export_speed import MemorySampler
from benchmarks.models import make_large_checkpoint, qwen2_vl_2b
from ivc_export import ExportRecipe, Quantisation, export
from ivc_export.checkpoint.formats.nbits import BITS, Packing, dequantise, pack_blocks, pack_values
from ivc_export.checkpoint.formats.rounding import find_grid, importance_of, round_values

RESULT = Path(__file__).parent / "results" / "rounding_speed-cpu.json"
EVERYTHING = {"lm_head": "int8", "embeddings": "int8", "vision": "int8"}
EXPORTS: dict[str, dict[str, Any]] = {
    "int4, groups of 32, all else int8": {"weights": "int4", "group_size": 32, **EVERYTHING},
    "int4, groups of 128": {"weights": "int4", "group_size": 128},
    "int4, groups of 128, zero points": {"weights": "int4", "group_size": 128, "asymmetric": True},
    "int8, groups of 128, all else int8": {"weights": "int8", "group_size": 128, **EVERYTHING},
}
SIZES = ((1536, 1536), (8960, 1536), (1536, 8960))


def one_export(checkpoint: str, output: str, name: str) -> dict[str, Any]:
    """Export once."""
    recipe = ExportRecipe(checkpoint, Path(output), quantisation=Quantisation(**EXPORTS[name]), force=True)
    with MemorySampler() as sampler:
        start, cpu = time.perf_counter(), time.process_time()
        bundle = export(recipe)
        seconds, busy = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "peak_anonymous_mib": sampler.peak,
        "weight_bytes": sum(file.size for file in bundle.manifest.weights),
    }


def output_error(packing: Packing, search: bool) -> float:
    """Of W x, as a part of its size, over random layers behind norms of uneven weights."""
    generator, errors, sizes = np.random.default_rng(0), 0.0, 0.0
    for out, features in SIZES:
        weight = generator.standard_normal((out // 8, features)).astype(np.float32)
        norm = generator.uniform(0.3, 2, features).astype(np.float32)
        rows = generator.standard_normal((256, features)).astype(np.float32) * norm
        rounding = find_grid(weight, packing, importance_of(norm, features), np.float16, search)
        points = (rounding.points + packing.middle).astype(np.uint8)
        zeros = pack_values(points, packing.bits) if packing.zero_points else None
        packed = pack_blocks(round_values(weight, packing, rounding), packing)
        found = dequantise(packed, rounding.scales, zeros, packing.bits, features)
        errors += float(np.square(rows @ (found - weight).T).sum())
        sizes += float(np.square(rows @ weight.T).sum())
    return round(float(np.sqrt(errors / sizes)), 5)


def main() -> None:
    """Measure and write; or, with --task, one export."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--task", nargs=2, metavar=("OUTPUT", "NAME"), help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.task:
        print(json.dumps(one_export(str(options.folder), *options.task)))
        return
    checkpoint = make_large_checkpoint(options.folder / "checkpoint", qwen2_vl_2b())
    rows = {}
    for name in EXPORTS:
        command = [sys.executable, "-m", "benchmarks.rounding_speed", checkpoint, "--task", options.folder / "b", name]
        before = os.getloadavg()[0]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1]) | {"load_average_before": round(before, 1)}
        print(name, rows[name], flush=True)
    size = (checkpoint / "model.safetensors").stat().st_size
    shutil.rmtree(options.folder)
    errors = {
        f"int{bits}, groups of {group}{', zero points' if points else ''}": {
            "search": output_error(Packing(bits, group, points), True),
            "to_nearest": output_error(Packing(bits, group, points), False),
        }
        for bits in BITS
        for group in (32, 64, 128)
        for points in (False, True)
    }
    content = {
        "command": "python -m benchmarks.rounding_speed FOLDER",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
        "versions": {name: version(name) for name in ("numpy", "onnx", "onnx-ir")},
        "parameters": size // 2,
        "exports": rows,
        "relative_output_errors": errors,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
