"""Figures in sentences of pages are those of the results files."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from ivc_export.checkpoint.formats.nbits import Packing
from tests.checkpoint.test_rounding import rounded
from tests.repository.pages import ROOT, read
from tools.figures import result


def page(name: str) -> str:
    """A page's text on one line."""
    return " ".join(read(ROOT / name).split())


@pytest.mark.parametrize(("zero_points", "least", "most"), [(False, 8, 9), (True, 4, 5)])
def test_the_search_saves_what_is_said_on_normal_values(zero_points: bool, least: int, most: int) -> None:
    values = np.random.default_rng(0).standard_normal((512, 1536)).astype(np.float32)
    for group in (32, 64, 128):
        packing = Packing(4, group, zero_points)
        plain, found = (np.linalg.norm(rounded(values, packing, None, search) - values) for search in (False, True))
        assert least <= round(100 * (1 - found / plain)) <= most
    said = (
        "the search leaves 8 to 9% less error in int4 than rounding to the nearest, and 4 to 5% less with zero points"
    )
    assert said in page("docs/weights.md")


def test_what_accuracy_level_4_costs_is_what_was_measured() -> None:
    variants = result("spatial-vl-quantised")["variants"]
    exact, fast = (variants[f"int4, groups of 32{level}"]["ratios"] for level in ("", ", level 4"))
    found = {
        round(100 * (exact[ratio]["accuracy"]["all"]["accuracy"] - fast[ratio]["accuracy"]["all"]["accuracy"]), 3)
        for ratio in ("1.0", "0.5")
    }
    (said,) = re.findall(r"Level 4 costs ([\d.]+) points more than level 0, at both ratios", page("docs/weights.md"))
    assert found == {float(said)}
    assert {
        round(exact["0.5"]["kept_rows"]["mean_overlap"], 2),
        round(fast["0.5"]["kept_rows"]["mean_overlap"], 2),
    } == {0.93}


def test_readmes_table_is_what_was_measured() -> None:
    """Every cell of README's table of results, and the sentence about vision below it."""
    pruning, gpu, cpu = (result(name) for name in ("spatial-vl-pruning", "generate-h100", "cpu_generate"))
    right = [pruning["methods"][name][ratio]["first"]["all"] for name, ratio in (("none", "1.0"), ("IVC-Prune", "0.5"))]
    rows = {(row["side"], row["ratio"]): row for row in gpu["rows"] if row["visual_tokens"] == 1024}
    ours, half, eager, compiled = (
        rows[side]
        for side in (
            ("onnxruntime-cuda", 1.0),
            ("onnxruntime-cuda", 0.5),
            ("torch-eager", 1.0),
            ("torch-compiled", 1.0),
        )
    )
    times = {row["ratio"]: row for row in cpu["rows"] if (row["model"], row["threads"]) == ("0.2B", 1)}
    wanted = [
        ["Spatial-VL, right answers to 2,004 questions", *(f"{100 * one['accuracy']:.1f}%" for one in right), ""],
        [
            "Qwen2-VL-2B, KV cache with 1,024 visual tokens",
            *(f"{row['cache_bytes'] / 1e6:.1f} MB" for row in (ours, half, eager)),
        ],
        ["the same on an H100, time to first token", *(f"{row['first_token']:.1f} ms" for row in (ours, half, eager))],
        [
            "the same, each further token",
            *(f"{row['decode']:.1f} ms" for row in (ours, half)),
            f"{eager['decode']:.1f} ms, compiled {compiled['decode']:.1f} ms",
        ],
    ]
    for what, key in (
        ("0.2 B parameters on one CPU thread, time to first token", "time_to_first_token"),
        ("the same, each further token", "per_token"),
    ):
        wanted.append([what, *(f"{times[ratio][key]['times_faster']} times as fast" for ratio in (1.0, 0.5)), "1"])
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("| stock transformers |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == wanted
    assert f"takes {ours['stages']['vision']:.0f} of the {ours['first_token']:.0f} ms" in text
    assert pruning["test_questions"] == 2004


def test_the_speed_on_a_cpu_was_measured() -> None:
    content = result("cpu_generate")
    keys = [(ratio, key) for key in ("time_to_first_token", "per_token") for ratio in (1.0, 0.5)]
    found = {(row["model"], row["threads"], row["ratio"]): row for row in content["rows"]}
    sizes = {"0.2 B": "0.2B", "0.3 M": "tiny"}
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (0\.\d [BM]) parameters \| (\d) \| (.*) \|", text)
    assert len(rows) == len(found) / 2
    for size, threads, times in rows:
        wanted = [found[sizes[size], int(threads), ratio][key]["times_faster"] for ratio, key in keys]
        assert [float(time) for time in times.split(" | ")] == wanted


def test_what_is_said_of_the_gpu_was_measured() -> None:
    """The table in docs/benchmarks.md, in milliseconds, rounded to a tenth."""
    content = result("generate-h100")
    found = {(row["visual_tokens"], row["side"], row["ratio"]): row for row in content["rows"]}
    sides = (("onnxruntime-cuda", 1.0), ("onnxruntime-cuda", 0.5), ("torch-eager", 1.0), ("torch-compiled", 1.0))

    def figures(visual: int) -> list[float]:
        ours, half, eager, compiled = (found[(visual, *side)] for side in sides)
        first = [row["first_token"] for row in (ours, half, eager)]
        return [round(ms, 1) for ms in (*first, *(row["decode"] for row in (ours, eager, compiled)))]

    table = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split("| a token, compiled |")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:5]]
    assert {int(row[0].replace(",", "")): [float(x) for x in row[1:]] for row in rows} == {
        visual: figures(visual) for visual in (256, 1024, 4096)
    }


def right(found: dict[str, Any]) -> str:
    """Right answers to all questions, in percent."""
    return f"{100 * found['all']['accuracy']:.1f}%"


def test_what_is_said_of_choices_and_of_second_questions_was_measured() -> None:
    methods, ways = result("spatial-vl-pruning")["methods"], result("spatial-vl-follow-ups")["ways"]
    middle, before = (right(methods[name]["0.5"]["first"]) for name in ("IVC-Prune", "embeddings (DART)"))
    compacted, again = (right(ways[name]["second"]) for name in ("compacted", "again"))
    text = page("docs/how-it-works.md")
    assert f"{middle} of the answers are right with IVC-Prune" in text
    assert f"(as DART does it) {before} are right" in text
    assert f"{compacted} of the second answers are right over the compacted cache, and {again} are if" in text


def test_what_is_said_of_qwen2_vl_2b_is_on_the_page_of_families() -> None:
    (row,) = (
        line for line in read(ROOT / "docs" / "families.md").splitlines() if line.startswith("| `qwen2-vl-2b` | Qwen")
    )
    _, _, _, _, layers, k, _, tokens, prefill, _, _ = (cell.strip(" *") for cell in row.split("|"))
    (part,) = re.findall(r"\((\d+%)\)", prefill)
    for name in ("README.md", "docs/how-it-works.md"):
        assert f"at most {part} of the decoder's prefill" in page(name)
    assert f"prunes after {k} of {layers} layers" in page("README.md")
    assert f"k = {k} of {layers} layers" in page("docs/how-it-works.md")
    assert f"Qwen2-VL makes {tokens} of them" in page("docs/how-it-works.md")
