"""Tables of measured figures on pages, written from the files of benchmarks/results.

A page holds a table between two comments, `<!-- figures: NAME -->` and `<!-- end -->`. `make generate` writes anew what
stands between them, so that a new results file needs no other change. To add a table, add a function to TABLES, here,
in benchmark_tables.py or in profile_tables.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tools import benchmark_tables, profile_tables
from tools.results import percent, result, table, with_interval

ROOT = Path(__file__).parent.parent
REGION = re.compile(r"<!-- figures: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def quantised_answers() -> list[str]:
    """Spatial-VL's answers by the format of its weights."""
    found = result("spatial-vl-quantised")["variants"]
    names = {"calibrated": "int4, groups of 16, by GPTQ (llm-compressor)"}
    rows = []
    for name, variant in found.items():
        ratios = [variant["ratios"][ratio] for ratio in ("1.0", "0.5")]
        right = [with_interval(one["accuracy"]["all"]) for one in ratios]
        less = ["" if name == "float16" else with_interval(one["minus_float16"], 2) for one in ratios]
        kept = ratios[1]["kept_rows"]
        alike = ["", ""] if name == "float16" else [f"{percent(kept[key])}%" for key in ("all_alike", "mean_overlap")]
        size = f"{variant['weight_bytes'] / 1e6:.1f}"
        rows.append([names.get(name, name), f"{variant['questions']:,}", size, *right, *less, *alike])
    return table(
        "weights | questions | MB | right at 1.0, % | right at 0.5, % | minus float16 at 1.0, points | "
        "minus float16 at 0.5, points | prefills with the same rows kept at 0.5 | rows in common at 0.5",
        rows,
    )


def spatial_vl_tasks() -> list[str]:
    """Spatial-VL's right answers by task, nothing pruned."""
    found = result("spatial-vl-pruning")["methods"]["none"]["1.0"]["first"]
    rows = [[task, *columns(with_interval(one))] for task, one in found.items() if task != "minus_unpruned"]
    return table("task | right, % | 95% interval", rows)


def columns(shown: str) -> list[str]:
    """A mean and its interval in two cells."""
    mean, _, interval = shown.partition(" ")
    return [mean, interval.strip("()")]


def packed_on_cpu() -> list[str]:
    """A decode step on a CPU by the format of the weights."""
    found = result("cpu_packed")["rows"]
    threads = {name.removeprefix("threads "): rows for name, rows in found.items()}
    head = "weights"
    for number in threads:
        head += f" | ms a token, {number} {'thread' if number == '1' else 'threads'} | times as fast as float32"
    rows = []
    for name, first in next(iter(threads.values())).items():
        sides = [rows[name] for rows in threads.values()]
        speeds = [cell for side in sides for cell in (side["ms_a_token"], side["times_faster_than_float32"])]
        memory = first["memory"]["after_an_answer_mb"]
        rows.append([name, *speeds, memory, f"{percent(first['part_of_float32s_memory'], 0)}%"])
    return table(f"{head} | memory, MB | of float32's", rows)


def rounding_errors() -> list[str]:
    """What rounding changes in a layer's output, and what the search saves of it."""
    found = result("rounding_speed-cpu")["relative_output_errors"]
    rows = []
    for name, errors in found.items():
        less = percent(1 - errors["search"] / errors["to_nearest"], 0)
        rows.append([name, f"{percent(errors['to_nearest'], 2)}%", f"{percent(errors['search'], 2)}%", f"{less}%"])
    return table("weights | error, rounded to the nearest | error with the search | less by", rows)


def rounding_speed() -> list[str]:
    """Time, memory and size of exports that round."""
    found = result("rounding_speed-cpu")["exports"]
    rows = [
        [
            name,
            f"{one['seconds']:.0f}",
            f"{one['cpu_seconds']:.0f}",
            one["peak_anonymous_mib"],
            f"{one['weight_bytes'] / 1e9:.2f}",
        ]
        for name, one in found.items()
    ]
    return table("`--weight-format` and the like | seconds | seconds of CPU time | memory, MiB | weights, GB", rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    **benchmark_tables.TABLES,
    **profile_tables.TABLES,
    "packed-on-cpu": packed_on_cpu,
    "quantised-answers": quantised_answers,
    "rounding-errors": rounding_errors,
    "rounding-speed": rounding_speed,
    "spatial-vl-tasks": spatial_vl_tasks,
}


def filled(text: str) -> str:
    """A page with its tables made from the results of today."""
    return REGION.sub(
        lambda region: "\n".join([opening(region[1]), "", *TABLES[region[1]](), "", "<!-- end -->"]), text
    )


def opening(name: str) -> str:
    """The comment before a table."""
    return f"<!-- figures: {name} -->"


def pages_with_figures() -> dict[Path, str]:
    """Every page that holds such tables, with them filled."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("samples/*/README.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    return {page: filled(text) for page, text in texts.items() if REGION.search(text)}
