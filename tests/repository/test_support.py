"""The support matrix has every family, and its figures are the measured ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ivc_export import families
from ivc_export.runtime.tolerances import CUDA_FLOAT16
from samples.tiny import TINY

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
ENGINES = json.loads((ROOT / "benchmarks" / "results" / "tensorrt-8.6-h100.json").read_text(encoding="utf-8"))[
    "engines"
]
CHECKS = json.loads((ROOT / "benchmarks" / "results" / "checks-h200.json").read_text(encoding="utf-8"))


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading, row by row, without its head."""
    table = re.search(r"^\|.*?\n\n", TEXT.split(f"# {heading}\n")[1], re.MULTILINE | re.DOTALL)
    assert table is not None
    return [line.strip("| ").split(" | ") for line in table.group().strip().splitlines()[2:]]


def test_the_matrix_has_every_family() -> None:
    assert sorted(row[0].strip("`") for row in rows("Families and runtimes")) == sorted(families.names())


def test_the_matrix_uses_the_words_that_the_page_defines() -> None:
    words = set(re.findall(r"^\| \*\*(.+?)\*\* \|", TEXT, re.MULTILINE))
    said = {part for row in rows("Families and runtimes") for cell in row[1:] for part in cell.split("; ")}
    assert {part.removeprefix("graphs ").removeprefix("vision ") for part in said} <= words


def test_families_with_experts_have_no_engines() -> None:
    experts = {name for name in families.names() if families.of(name).read(TINY[name], None).stacks}
    assert {row[0].strip("`") for row in rows("Families and runtimes") if "refused" in row} == experts


def test_what_is_said_of_tensorrt_was_measured() -> None:
    table = {dtype: cells for dtype, *cells in (row for row in rows("TensorRT 8.6.0") if row)}
    for dtype, (logits, kept, answers) in table.items():
        engines = [engine for engine in ENGINES if engine["dtype"] == dtype]
        assert logits == f"{max(engine['largest_errors']['logits'] for engine in engines):.1e}".replace("e-0", "e-")
        ties = {engine["kept_rows"] for engine in engines if "tie" in engine["kept_rows"]}
        assert ("tie" in kept) == bool(ties) and all(
            tie.startswith("122 rows against 122, 2 in one only") for tie in ties
        )
        same = sorted({asked["identical"] for engine in engines for asked in engine.get("questions", {}).values()})
        assert answers == f"{' to '.join(map(str, dict.fromkeys((same[0], same[-1]))))} of 200"
    gaps = [
        one["gap"] for engine in ENGINES for asked in engine.get("questions", {}).values() for one in asked["differing"]
    ]
    assert f"{0.35}% of the largest" in " ".join(TEXT.split()) and 0.0030 < max(gaps) <= 0.0035


def test_only_families_with_results_are_called_run() -> None:
    head = TEXT.split("| family | ")[1].splitlines()[0].strip("| ").split(" | ")
    for dtype in ("float32", "float16"):
        models = {engine["model"] for engine in ENGINES if engine["dtype"] == dtype}
        configs = (ROOT / model / "config.json" for model in models)
        ran = {json.loads(config.read_text(encoding="utf-8"))["model_type"] for config in configs}
        ran |= {check["family"] for check in CHECKS["checks"] if check["dtype"] == dtype and check["passed"]}
        column = 1 + head.index(f"TensorRT 8.6, {dtype}")
        told = {row[0].strip("`") for row in rows("Families and runtimes") if "run" in row[column].split("; ")}
        assert told == ran


def test_what_is_said_of_checks_on_an_h200_was_measured() -> None:
    passed = {
        graphs: [c["family"] for c in CHECKS["checks"] if c["graphs"] == graphs] for graphs in ("plugin", "native")
    }
    assert passed["plugin"] == ["qwen2_vl", "qwen2_5_vl", "llava", "internvl", "qwen3_vl"]
    assert passed["native"] == ["qwen2_vl", "qwen2_5_vl", "llava", "qwen3_vl"]
    assert all(check["passed"] for check in CHECKS["checks"])
    other = {check["family"] for check in CHECKS["checks"] if not check["kept_rows"].endswith("equal")}
    assert other == {"qwen3_vl"} and "but for two of `qwen3_vl` that are exchanged at a tie" in " ".join(TEXT.split())
    largest = max(check["largest_errors"]["logits"] for check in CHECKS["checks"])
    assert f"logits are within {largest:.1e} of the largest".replace("e-0", "e-") in " ".join(TEXT.split())
    (failed,) = CHECKS["not_built"]
    assert (failed["family"], failed["graphs"]) == ("internvl", "native")
    reference = " ".join((ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8").split())
    said, node = re.findall(r'"(Could not find any implementation for node) \{(.*?)\.\.\.\]\}"', reference)[0]
    assert said in failed["error"] and node in failed["error"]


def test_answers_on_an_h200_are_the_measured_ones() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "agreement-h200.json").read_text(encoding="utf-8"))
    native, plugin = (found["runs"][f"tensorrt, {graphs}"]["ratios"] for graphs in ("native", "plugin"))
    assert (
        f"cut at layer {found['layer']}, equal PyTorch's for {native['1.0']['identical']} (nothing pruned) and "
        f"{native['0.5']['identical']} (at 50%) of {found['questions']} questions with `native` graphs, and for "
        f"{plugin['1.0']['identical']} and {plugin['0.5']['identical']} with the plugin."
    ) in " ".join(TEXT.split())
    gaps = [one["gap"] for ratios in (native, plugin) for ratio in ratios.values() for one in ratio["differing"]]
    assert 0.0010 < max(gaps) <= 0.0015 and "at most 0.15% of the largest apart (`benchmarks/results/agree" in TEXT


def test_what_is_said_of_cuda_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "agreement-h200.json").read_text(encoding="utf-8"))
    checked, compared = (found[key]["models"] for key in ("parity", "library"))
    head = TEXT.split("| family | ")[1].splitlines()[0].strip("| ").split(" | ")
    column = 1 + head.index("CUDA, float16")
    told = {row[0].strip("`") for row in rows("Families and runtimes") if "run" in row[column].split("; ")}
    assert told == set(compared) and set(checked) == {"spatial-vl", "qwen2_5_vl", "llava", "internvl"}
    logits = max(errors["logits"] for errors in checked.values())
    cells = {row[0]: row[-1] for row in rows("CUDA provider")}
    with_library, all_families, *_ = cells.values()
    assert f"within {logits:.1e} of the largest".replace("e-0", "e-") in with_library
    assert f"within {max(compared.values()):.1e} of the largest".replace("e-0", "e-") in all_families
    for errors in checked.values():
        for kind, (bound, reason) in CUDA_FLOAT16.errors.items():
            measured = re.findall(r"([\d.e-]+) measured", reason)
            assert kind not in errors or errors[kind] <= float(measured[0]) < bound


def test_the_versions_that_are_named_are_those_of_pyproject() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least, older = re.findall(r"onnxruntime from ([\d.]+) \(Python 3\.10: ([\d.]+)\)", TEXT)[0]
    assert f"onnxruntime>={least};" in declared and f"onnxruntime>={older}," in declared
