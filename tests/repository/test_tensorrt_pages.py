"""Figures of the pages on TensorRT, Jetson and C++ are those of their results, and of the code that has them."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.tolerances import TENSORRT_BFLOAT16, TENSORRT_FLOAT16
from ivc_export.tensorrt import footprint
from ivc_export.tensorrt.decide import decide
from ivc_export.tensorrt.graphs import choose_graphs
from ivc_export.tensorrt.recipe import EngineRecipe
from tests.repository.pages import ROOT, blocks, read

REFERENCE = read(ROOT / "docs" / "tensorrt.md")
GUIDE = read(ROOT / "docs" / "jetson.md")
CPP = " ".join(read(ROOT / "docs" / "cpp.md").split())


def results(name: str) -> Any:
    """A results file's content."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(head: str) -> dict[str, list[str]]:
    """The rows of the reference's table that begins with `head`, by their first cells."""
    lines = REFERENCE.split(f"\n{head}")[1].split("\n\n")[0].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {row[0]: row[1:] for row in rows}


def sentence(pattern: str) -> tuple[str, ...]:
    """The groups of the one place of the reference that says this."""
    (found,) = re.finditer(pattern, " ".join(REFERENCE.split()))
    return found.groups()


def test_the_builders_seconds_are_the_measured_ones() -> None:
    seconds = [round(build["seconds"]) for build in results("tensorrt_whole-h200")["builds"]]
    assert sentence(r"builds in (\d+) to (\d+) s on an H200") == (str(min(seconds)), str(max(seconds)))


def test_decode_steps_with_and_without_float_type_are_the_measured_ones() -> None:
    def ends(rows: Any, kind: str, *engines: str) -> tuple[str, str]:
        steps = [row for row in rows if (row["kind"], row["stage"]) == (kind, "decode")]
        found = [row[f"{engine}_ms_a_layer"] for row in steps for engine in engines]
        return f"{min(found):.3f}", f"{max(found):.3f}"

    content = results("tensorrt_layers-h200")
    before = content["before"]["the plugin's operators without the attribute float_type"]["rows"]
    said = sentence(
        r"took ([\d.]+) to ([\d.]+) ms a layer in the prefix engine and ([\d.]+) to ([\d.]+) ms in the decoder engine"
        r" before\. With the attribute it takes ([\d.]+) to ([\d.]+) ms in both\."
        r" Weights in 4 bits take ([\d.]+) to ([\d.]+) ms"
    )
    both = ("prefix", "decoder")
    assert said == (
        *ends(before, "plugin", "prefix"),
        *ends(before, "plugin", "decoder"),
        *ends(content["rows"], "plugin", *both),
        *ends(content["rows"], "plugin-int4", *both),
    )


def numbers(cell: str) -> list[float] | float | None:
    """A cell's figures: one, a range, or none."""
    found = [float(one) for one in re.findall(r"\d[\d.]*", cell.replace(",", ""))]
    return found[0] if len(found) == 1 else found or None


def test_the_spellings_of_attention_are_the_measured_ones() -> None:
    content = results("tensorrt_attention-h200")
    for head, key in (
        ("| vision block |", "vision block"),
        ("| decoder attention alone,", "decoder attention alone"),
    ):
        rows = table(head)
        assert list(rows) == list(content[key])
        for name, cells in rows.items():
            *figures, fused = content[key][name].values()
            assert [numbers(cell) for cell in cells] == figures
            assert fused == ("fused" in cells[-1] and "not fused" not in cells[-1])


def test_steps_after_which_repeating_is_slower() -> None:
    measured = results("tensorrt_attention-h200")["decoder attention alone"]
    grouped, repeated = (list(measured[name].values()) for name in ("grouped", "repeated by Gather"))
    won, lost = [grouped[i] - repeated[i] for i in (0, 1)], repeated[2] - grouped[2]
    assert sentence(r"after (\d+) to (\d+) tokens it is slower") == tuple(str(round(one / lost)) for one in won)


def test_errors_in_bfloat16_are_those_of_the_tolerances() -> None:
    names = {"image embeddings": "image_embeds", "hidden states": "hidden_states"}
    for row, (error,) in table("| | largest error, of the largest magnitude |").items():
        bound, why = TENSORRT_BFLOAT16.errors[names.get(row, row)]
        assert f"{error} in onnxruntime" in why and float(error) <= bound / 2
        assert bound == pytest.approx(8 * TENSORRT_FLOAT16.errors[names.get(row, row)][0])


def test_cases_of_kernels_are_those_that_ran() -> None:
    kernels = results("kernels-h100")
    said = sentence(r"against NumPy: ([\d,]+) cases up to ([\d,]+) visual tokens, scores within ([\de.-]+),")
    found = [kernels[key] for key in ("cases", "visual_tokens_at_most", "largest_score_error")]
    assert [float(one.replace(",", "")) for one in said] == found
    assert kernels["choices_that_flip_at_a_near_tie"] == 0
    custom = kernels["onnxruntime_custom_operators"]
    errors = custom["largest_score_error"]
    said = sentence(r": (\d+) selections of up to ([\d,]+) visual tokens, scores within ([\de.-]+) of")
    found = [custom["selections_per_dtype"] * len(errors), custom["visual_tokens_at_most"], max(errors.values())]
    assert [float(one.replace(",", "")) for one in said] == found


def test_cases_of_attention_and_products_are_those_that_ran() -> None:
    attention = results("attention-h200")
    (cases,) = sentence(r"float64: (\d+) cases each of decoder layers, frames and windows")
    assert attention["correctness"]["cases"].startswith(f"{cases} each of decoder layers, frames and windows")
    (cases,) = sentence(r"without the parts around a product: (\d+) cases")
    assert f"{cases} cases against float64" in results("int4-h200")
    for found in (results("kernels-h100")["compute_sanitizer"], attention["compute_sanitizer"]):
        assert {value[:2] for key, value in found.items() if key.endswith("check")} == {"0 "}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """What ivc-build says of the guide's bundle before it builds, by TensorRT's version."""
    bundle = export(
        ExportRecipe(ROOT / "samples" / "spatial-vl", tmp_path_factory.mktemp("jetson") / "bundle", max_visual=256)
    )
    recipe = EngineRecipe(max_visual=bundle.manifest.max_visual, opt_visual=1)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "available_bytes", lambda: None)
        patch.setattr(footprint, "device_bytes", lambda: None)
        for version in ("8.6.2", "10.3.0", "10.16.0"):
            choices = choose_graphs(bundle, recipe, SimpleNamespace(__version__=version), "8.7")
            found[version] = decide(bundle, recipe, choices).sentences
    return found


def test_the_guide_shows_what_the_build_says(printed: dict[str, tuple[str, ...]]) -> None:
    (shown,) = (block.text for block in blocks(GUIDE) if block.text.startswith("$ ivc-build demo/bundle\n"))
    for version in ("8.6.2", "10.3.0"):
        assert tuple(shown.splitlines()[1:]) == printed[version]
    assert "attention by one operator" in printed["10.16.0"][1] and "`attention by one operator`" in GUIDE
    assert (EngineRecipe.max_text, EngineRecipe.max_new) == (512, 512) and "(both 512 unless given)" in GUIDE


def test_the_guide_and_the_support_matrix_agree_on_jetpack() -> None:
    def versions(page: str, head: str) -> set[tuple[str, str]]:
        rows = page.split(head)[1].split("\n\n")[0].splitlines()[2:]
        return {
            (cells[0], cells[1]) for cells in (row.strip("| ").split(" | ") for row in rows) if cells[0][0].isdigit()
        }

    told = versions(GUIDE, "| JetPack | TensorRT |") - {("5 and older", "older than 8.6")}
    assert told == versions(read(ROOT / "docs" / "support.md"), "| JetPack | TensorRT |") and len(told) == 4


def test_answers_in_cpp_are_those_that_were_compared() -> None:
    content = results("cpp-onnxruntime-cpu")
    asked = content["questions"]
    assert f"The sample was asked {asked} held-out questions" in CPP
    assert f"equal Python's, {asked} of {asked} of each" in CPP
    assert {*content["ratios"]} == {"1.0", "0.5"}
    for found in content["ratios"].values():
        for turn in (found, found["second_questions"]):
            assert {turn[kind] for kind in ("answers", "tokens", "kept_rows")} == {asked}


def test_answers_in_cpp_on_a_gpu_are_those_that_were_compared() -> None:
    content = results("cpp-tensorrt-h200")
    seconds: dict[str, list[float]] = {"cpp": [], "python": []}
    for number, run in enumerate(content["runs"]):
        assert {*run["ratios"]} == {"1.0", "0.5"} and run["device_test"]["failed"] == 0
        for found in run["ratios"].values():
            assert {found[kind] for kind in ("answers", "tokens", "kept_rows")} == {run["questions"]}
            for side in seconds:
                seconds[side] += [found["seconds_an_answer"][side]] if number < 2 else []
    ends = [f"{min(seconds[side]):.3f} to {max(seconds[side]):.3f} s in {name}" for side, name in SIDES]
    (asked,) = {run["questions"] for run in content["runs"]}
    assert f"equal Python's on {asked} of {asked} questions of the sample. An answer took {' and '.join(ends)}" in CPP
    assert f"answered {asked} of {asked} questions of Spatial-VL" in read(ROOT / "docs" / "support.md")


SIDES = (("cpp", "C++"), ("python", "Python"))
