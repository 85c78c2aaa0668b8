"""Time SelectTokens' body on onnxruntime's CPU provider, the same in NumPy, and the host's ranking of IVC tokens.

    python -m benchmarks.select_tokens

Writes benchmarks/results/select_tokens-cpu.json: medians in milliseconds by number of visual tokens.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from ivc_export.contract.manifest import RotarySizes
from ivc_export.families.pictures import Grid
from ivc_export.families.positions import mrope_positions
from ivc_export.selection.ivc_prune import ivc_priority
from tests.selection.test_selection import RULE, Case, body_model

RESULT = Path(__file__).parent / "results" / "select_tokens-cpu.json"
ROTARY = RotarySizes(theta=1e6, sections=(16, 24, 24))
HEADS, SIZE, TEXT, REPEATS = 2, 128, 40, 9  # Qwen2-VL-2B's value vectors


def case(visual: int) -> Case:
    """A prefill with `visual` visual tokens and 40 rows of text behind them, or a decode step for 1."""
    text = TEXT if visual > 1 else 0
    rows = np.arange(visual + text, dtype=np.int32)
    values = np.random.default_rng(0).standard_normal((HEADS, visual + text, SIZE), np.float32)
    query = rows[visual:] if text else rows
    return Case(values, np.zeros(visual, np.float32), rows[:visual], rows[visual:], query, max(1, visual // 2))


def median(call: Callable[[], object]) -> float:
    """Median wall time of `call` in milliseconds, after two warm-ups."""
    seconds = []
    for number in range(REPEATS + 2):
        start = time.perf_counter()
        call()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return round(1000 * statistics.median(seconds), 3)


def main() -> None:
    """Measure and write."""
    session = onnxruntime.InferenceSession(body_model().SerializeToString())
    rows = []
    for visual in (1, 256, 1024, 1280, 4096):
        one = case(visual)
        picture, _ = mrope_positions([Grid(max(1, visual // 32), min(visual, 32))], 15)
        feeds = one.feeds
        rows.append(
            {
                "visual_tokens": visual,
                "onnxruntime_ms": median(lambda feeds=feeds: session.run(None, feeds)),  # type: ignore[misc]
                "numpy_ms": median(one.in_numpy),
                "ivc_priority_ms": median(lambda picture=picture: ivc_priority(picture, ROTARY, SIZE, RULE)),  # type: ignore[misc]
            }
        )
        print(rows[-1])
    content = {
        "command": "python -m benchmarks.select_tokens",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__},
        "dtype": "float32",
        "kv_heads": HEADS,
        "head_dim": SIZE,
        "text_rows": TEXT,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
