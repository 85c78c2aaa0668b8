"""Figures in sentences of pages are those of the results files."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest

from ivc_export.bench.baseline import TIMES_FACTOR
from ivc_export.checkpoint.formats.nbits import Packing
from ivc_export.checkpoint.formats.rounding import RANGES, SIDES
from ivc_export.families.qwen2_vl import SELECTION
from ivc_export.files import MOST_DEPTH
from ivc_export.serve.completions import ServerSettings
from ivc_export.serve.images import REMOTE_BYTES, REMOTE_SECONDS
from ivc_export.serve.server import GRACE
from ivc_export.verify.baseline import ERRORS_FACTOR, LEAST_SHARE
from tests.checkpoint.test_rounding import rounded
from tests.repository.pages import ROOT, read
from tools.benchmark_tables import gpu_rows
from tools.profile_tables import by_kind, head_of, newest, profiled
from tools.results import percent, result


def page(name: str) -> str:
    """A page's text on one line."""
    return " ".join(read(ROOT / name).split())


def check_said(name: str, *sentences: str) -> None:
    """Check that a page has these sentences."""
    text = page(name)
    for sentence in sentences:
        assert sentence in text, sentence


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
        assert f"at most {part} of the language model's prefill" in page(name)
    assert f"prunes after {k} of {layers} layers" in page("README.md")
    assert f"k = {k} of {layers} layers" in page("docs/how-it-works.md")
    assert f"Qwen2-VL makes {tokens} of them" in page("docs/how-it-works.md")


def test_what_is_said_of_vision_in_readme_was_measured() -> None:
    rows = result("generate-h200")["beside"]["rows"]
    (row,) = (row for row in rows if (row["side"], row["ratio"]) == ("onnxruntime-cuda", 1.0))
    assert f"takes {row['stages']['vision']:.0f} of the {row['first_token']:.0f} ms" in page("README.md")


def test_what_is_said_of_answers_was_measured() -> None:
    methods, before = (result(f"spatial-vl-pruning{name}")["methods"] for name in ("", "-first-phase"))
    half = {name: methods[name]["0.5"]["first"] for name in methods if name != "none"}
    part = half["IVC-Prune"]["all"]["accuracy"] / methods["none"]["1.0"]["first"]["all"]["accuracy"]
    boxes = [percent(half[name]["grounding"]["accuracy"]) for name in ("random", "IVC-Prune", "foreground only")]
    early = percent(before["IVC-Prune"]["0.5"]["first"]["all"]["accuracy"])
    check_said(
        "docs/benchmarks.md",
        f"IVC-Prune keeps {percent(part)}% of the unpruned accuracy",
        "At 50%, {}% of boxes are right with random tokens, {}% with IVC-Prune, and {}% with foreground".format(*boxes),
        f"Before that part, IVC-Prune at 50% kept {early}%",
        f"was asked {result('spatial-vl-pruning')['test_questions']:,} held-out questions",
        f"k = {result('spatial-vl-pruning')['layer']} of 8, was chosen on "
        f"{result('spatial-vl-pruning')['calibration_questions']} other questions",
    )


def test_what_is_said_of_onnxruntime_on_a_gpu_was_measured() -> None:
    content, rows = result("generate-h100"), gpu_rows("generate-h100")
    ours, eager = rows[1024, "onnxruntime-cuda", 1.0], rows[1024, "torch-eager", 1.0]
    first, decode = (eager[key] / ours[key] for key in ("first_token", "decode"))
    bars = " ".join(bar["bar"] for bar in content["bars"])
    assert "first token at least 3 times faster" in bars and "decode at least 20 times faster" in bars
    earlier = [
        {row["side"]: row for row in run["rows"] if (row["visual_tokens"], row["ratio"]) == (1024, 1.0)}
        for run in reversed(content["earlier_runs"])
    ]
    peers = [run["torch-eager"] for run in earlier]
    own = [run["onnxruntime-cuda"]["decode"] for run in earlier]
    slower = rows[256, "onnxruntime-cuda", 0.5]["first_token"] - rows[256, "onnxruntime-cuda", 1.0]["first_token"]
    trial = content["trial"]["decode steps with flash attention (sdpa_kernel=1)"]["decode"]
    plain = content["trial"]["as here"]["decode"]
    again = result("functions-h200")["after_by_before"]["1024 visual tokens, ratio 1"]
    text = page("docs/benchmarks.md")
    check_said(
        "docs/benchmarks.md",
        f"the first token comes {first:.1f} times as fast as eager, and a token {decode:.1f} times as fast",
        "Our targets were 3 and 20 times",
        "it took {:.0f} and {:.0f} ms to the first token".format(*(peer["first_token"] for peer in peers)),
        "and {:.0f} and {:.0f} ms a token".format(*(peer["decode"] for peer in peers)),
        "Ours took {:.1f} and {:.1f} ms a token there".format(*own),
        f"except by {slower:.1f} ms at 256 visual tokens",
        f"a decode step was slower ({trial:.1f} ms instead of {plain:.1f} ms)",
        f"which the roofline allows in {ours['ideal']['decode']:.1f} ms",
        f"took {again['first_token']:.3f} times as long to the first token and {again['decode']:.3f} times as long",
    )
    intervals = [one["interval_95"] for one in result("functions-h200")["cpu"]["after_by_before"].values()]
    assert len(intervals) == 9 and all(low <= 1 <= high for low, high in intervals)
    assert (
        f"in {result('functions-h200')['cpu']['rounds']} rounds, the 95% intervals of all nine ratios contain 1" in text
    )


def test_what_is_said_of_our_operators_was_measured() -> None:
    ours = gpu_rows("generate-h200")
    ways = {
        name: {(row["visual_tokens"], row["ratio"]): row for row in rows}
        for name, rows in result("operators-h200")["ways"].items()
    }
    before, without = ways["before, no library"], ways["now, no library"]
    now = {(visual, ratio): row for (visual, _, ratio), row in ours.items()}
    for visual in (256, 1024, 4096):
        assert now[visual, 0.5]["first_token"] < now[visual, 1.0]["first_token"]
    sooner = percent(1 - now[256, 0.5]["first_token"] / now[256, 1.0]["first_token"])
    steps = [sorted(row["decode"] for row in way.values()) for way in (now, before, without)]
    for key, row in without.items():
        assert row["first_token"] < before[key]["first_token"] and row["decode"] < before[key]["decode"]
    earlier = [run for run in result("functions-h200")["runs"] if (run["visual_tokens"], run["ratio"]) == (1024, 1.0)]
    hosts = sorted(run["stages"]["host"] for run in earlier)
    firsts = sorted(run["first_token"] for run in earlier)

    def first(way: dict[tuple[int, float], Any]) -> str:
        return "{:.1f}, {:.1f} and {:.1f} ms".format(*(way[size, 1.0]["first_token"] for size in (256, 1024, 4096)))

    check_said(
        "docs/benchmarks.md",
        f"half kept is faster at each number of visual tokens, by {sooner}% at 256",
        f"half kept comes {sooner}% sooner",
        f"after {first(now)}. Before",
        f"it came after {first(before)}",
        f"{steps[0][0]:.2f} to {steps[0][-1]:.2f} ms instead of {steps[1][0]:.2f} to {steps[1][-1]:.2f} ms",
        "{:.1f} of the {:.1f} ms, and {:.1f} of the {:.1f} ms".format(
            *(
                ms
                for size in (1024, 4096)
                for ms in (before[size, 1.0]["stages"]["host"], before[size, 1.0]["first_token"])
            )
        ),
        f"needed {hosts[0]:.1f} to {hosts[-1]:.1f} ms of the host at 1,024 visual tokens",
        f"and {firsts[0]:.1f} to {firsts[-1]:.1f} ms to the first token",
        f"The first token comes after {first(without)}, and a token takes {steps[2][0]:.2f} to {steps[2][-1]:.2f} ms",
    )


def test_a_profiled_size_has_a_row_and_fewer_kernels_than_time() -> None:
    for visual, (profile, row) in newest().items():
        assert row["visual_tokens"] == visual
        assert sum(by_kind(profile["first_token"]).values()) < row["first_token"]
    assert {when for _, when in profiled()} == {"before", "now"}


def test_what_is_said_of_weights_in_4_bits_on_a_gpu_was_measured() -> None:
    content = result("cuda_packed-h200")
    floats, packed = content["rows"].values()
    plain = content["without_library"]["rows"]["int4, groups of 32, lm_head int8"]
    first, step = content["profile"]["first_token"], content["profile"]["decode"]
    count = content["profile"]["decoded_tokens"]
    kinds = by_kind(step, count)
    head = head_of(step) / count
    less = 1 - packed["device_bytes"]["opened"] / floats["device_bytes"]["opened"]
    check_said(
        "docs/weights.md",
        f"take {percent(less, 0)}% less memory when the bundle is open, and "
        f"{percent(1 - packed['decode_of_float16s'], 0)}% less time a token",
        f"The first token takes {percent(packed['first_token_of_float16s'] - 1, 0)}% longer",
        f"the unpacking takes {by_kind(first)['weights unpacked']:.2f} ms",
        f"a token takes {percent(1 - plain['decode_of_float16s'], 0)}% less time than in float16",
        f"{kinds['matrix products']:.2f} of {step['kernel_ms'] / count:.2f} ms, and lm_head's are {head:.2f} ms",
        f"Attention ({kinds['attention']:.2f} ms)",
        f"there are {content['rounds']} rounds, and without them {content['without_library']['rounds']}",
    )
    assert (
        f"A token takes {packed['decode_of_float16s']:.2f} of float16's time, and the first token "
        f"{packed['first_token_of_float16s']:.2f}" in page("docs/benchmarks.md")
    )


def test_what_is_said_of_answers_and_errors_on_cuda_was_measured() -> None:
    content = result("agreement-h200")
    runs = [content["runs"][f"onnxruntime-cuda{name}"]["ratios"] for name in ("", ", our operators")]
    differing = [len(run[ratio]["differing"]) for ratio in ("1.0", "0.5") for run in runs]
    words = ("none", "one", "two", "three", "four", "five")
    digits = re.compile(r"[(),0-9]+")
    parts = [one for run in content["runs"].values() for kept in run["ratios"].values() for one in kept["differing"]]
    logits = max(errors["logits"] for errors in content["parity"]["models"].values())
    half = content["transformers in float16"]["identical"]
    check_said(
        "docs/benchmarks.md",
        f"{words[differing[1]]} answers differ at ratio 1, and without them {words[differing[0]]}",
        f"At ratio 0.5, {words[differing[3]]} differ with them, and {words[differing[2]]} without",
        f"give {half['1.0']} and {half['0.5']} of their 200 answers in float32",
        f"logits are within {logits:.1e} of the largest",
        f"within {max(content['library']['models'].values()):.1e} of the largest of those without",
    )
    assert len(content["library"]["models"]) == 7 and content["questions"] == 200
    assert all(digits.fullmatch(one[side]) for one in parts for side in ("bundle", "transformers"))


def test_what_is_said_of_native_engines_was_measured() -> None:
    first, second = result("native_turns-h200")["runs"]
    whole = {
        (run, name): f"{side['ratios']['1.0']['prefill_and_64_tokens_ms']:.0f} ms"
        for run, sides in enumerate((first, second))
        for name, side in sides.items()
    }
    before, wide = (first[name]["build_seconds"]["prefix"] for name in ("before", "float32"))
    check_said(
        "docs/benchmarks.md",
        f"of 28 layers took {whole[1, 'now']}, and {whole[1, 'before']} before",
        f"norms as before took {whole[1, 'alike']} in that run, and the graph from before took {whole[0, 'before']} in",
        f"TensorRT took {wide:.0f} s to build a prefix of three layers instead of {before:.0f} s",
        f"64 tokens took {whole[0, 'float32']} instead of {whole[0, 'before']}",
    )
    assert f"`prefix` of three layers, {wide:.0f} s" in page("docs/tensorrt.md") and wide > 2 * before


def test_what_is_said_of_tensorrt_was_measured() -> None:
    exact, layers = result("tensorrt-8.6-h100"), result("tensorrt_layers-h100")
    gaps = [
        one["gap"]
        for engine in exact["engines"]
        for asked in engine.get("questions", {}).values()
        for one in asked["differing"]
    ]
    enqueued = [row["compact_enqueued_ms"] for row in layers["rows"]]
    seconds = [
        kind[part] for kind in map(layers["build_seconds"].get, ("native", "plugin")) for part in ("prefix", "decoder")
    ]
    small = result("bench-tensorrt-8.6-h100")["plugin"]["rows"]
    ideal = max(sum(row["ideal"][part] for part in ("vision", "prefill")) for row in small)
    assert max(gaps) < 0.0035 and any("66030" in note and "3.4e-3" in note for note in exact["notes"])
    assert any("infinite" in note and "each of twelve builds" in note for note in exact["notes"])
    assert min(enqueued) >= 0.35 and max(enqueued) < 0.85 and ideal < 0.025
    ceilings = layers["ceilings"]
    check_said(
        "docs/benchmarks.md",
        "at most 0.35% of the largest logit apart",
        f"takes {ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s for matrix products and "
        f"{ceilings['bytes_per_second'] / 1e12:.1f} TB/s for copies",
        "without a CUDA graph takes 0.4 to 0.8 ms",
        f"took {min(seconds):.0f} to {max(seconds):.0f} s to build",
        "the roofline would take 0.02 ms",
    )


def test_what_is_said_of_layers_on_an_h200_was_measured() -> None:
    content = result("tensorrt_layers-h200")
    blocks = {row["patches"]: row["vision_ms_a_layer"] for row in content["rows"] if row["stage"] == "vision"}
    scratch = [
        taken / 1e9
        for kind in content["scratch_bytes"].values()
        for stage, taken in kind.items()
        if stage not in ("select", "compact")
    ]
    kinds = [content["build_seconds"][kind] for kind in ("plugin", "plugin-int4")]
    seconds = [kind[part] for kind in kinds for part in ("prefix", "decoder")]
    check_said(
        "docs/benchmarks.md",
        f"takes {blocks[4096]:.2f} ms for 4,096 patches and {blocks[16384]:.2f} ms for 16,384",
        f"take {min(scratch):.2f} to {max(scratch):.2f} GB of scratch memory",
        f"Those of three layers took {min(seconds):.0f} to {max(seconds):.0f} s to build",
    )


def test_what_is_said_of_a_whole_model_was_measured() -> None:
    sides = {side["side"]: side for side in result("whole-h200")["sides"]}
    python, cpp, onnxruntime = list(sides.values())[:3]
    assert [row["tokens"] for row in python["rows"]] == [row["tokens"] for row in onnxruntime["rows"]]
    tokens = [row["tokens"] for side in (python, cpp, onnxruntime) for row in side["rows"]]
    assert all(len({*given}) == 1 for given in tokens)
    vision = [row["stages"]["vision"] for side in (cpp, python) for row in side["rows"]]
    (other,) = {round(row["stages"]["vision"]) for row in onnxruntime["rows"]}
    steps = [side["rows"][0]["decode"] for side in (python, cpp)]
    (eager,) = sides["torch-eager"]["rows"]
    token_bytes = python["rows"][0]["cache_bytes"] / (1024 + python["text_tokens"])
    further = (cpp["rows"][0]["cache_bytes"] - python["rows"][0]["cache_bytes"]) / token_bytes
    check_said(
        "docs/benchmarks.md",
        f"gave the same {len(python['rows'][0]['tokens'])} tokens at both ratios",
        f"vision takes {min(vision):.0f} to {max(vision):.0f} ms instead of {other} ms",
        f"Python takes {steps[0]:.1f} ms a token on TensorRT where C++ takes {steps[1]:.1f} ms",
        f"The other {steps[0] - steps[1]:.1f} ms are work of Python",
        f"it also holds {further:.0f} further tokens",
        f"with {python['text_tokens']} tokens of text",
        f"with {eager['text_tokens']} tokens of text",
        f"{eager['dtype']} (`torch-eager`)",
        f"converting {4 * 1024 * 3 * 2 * 14 * 14 * 2 / 1e6:.1f} MB of pixels",
    )


def test_what_is_said_of_cpp_on_tensorrt_was_measured() -> None:
    run = next(run for run in result("cpp-tensorrt-h200")["runs"] if run["graphs"] == "plugin")
    host = [run["host_bytes"][side] / 1e6 for side in ("cpp", "python")]
    (device,) = {f"{taken / 1e9:.2f}" for taken in (run["device_bytes"]["python"], run["device_test"]["device_bytes"])}
    check_said(
        "docs/benchmarks.md",
        f"C++ held {host[0]:.0f} MB of host memory and Python {host[1]:.0f} MB",
        f"both took {device} GB without the CUDA context",
    )


def test_what_is_said_of_kernels_was_measured() -> None:
    (profile,) = (one for one in result("generate-h100")["profiles"] if one["visual_tokens"] == 1024)
    launched = ("UnpackRoPEAppend", "sdpa", "lean_reduction", "GetSequenceLengths", "_Fill")
    kernels = [one for one in profile["decode"]["kernels"] if any(name in one["name"] for name in launched)]
    together = sum(1000 * one["ms"] / one["count"] for one in kernels)
    moved = 16384 * 3 * 16 * 80 * 2 / 1e6
    text = page("docs/benchmarks.md")
    assert len(kernels) == 5 and f"which took {together:.0f} μs together on an H100" in text
    assert f"{2 * moved / 4.8:.0f} μs are the time to read {moved:.0f} MB and to write as much, at the 4.8 TB/s" in text
    assert f"unpacked first, which takes {result('int4-h200')['many rows']['unpacked alone']:.0f} μs" in text


def test_what_is_said_of_the_server_was_measured() -> None:
    load, soak = result("serve-load"), result("serve-soak")
    first, growth = load["milliseconds_to_first_text"], soak["resident_set_over_the_last_half"]
    low, high = (end / 1000 for end in growth["interval"])
    check_said(
        "docs/benchmarks.md",
        f"came after {first['server']:.1f} ms through the server, and after {first['chat']:.1f} ms from a `Chat`",
        f"the resident set of {growth['bytes_at_half_and_end'][0] / 1e6:.0f} MB grew by "
        f"{growth['bytes_a_minute'] / 1000:.1f} kB a minute (95% interval: {low:.1f} to {high:.1f})",
    )


def test_what_is_said_of_decisions_was_measured() -> None:
    functions = result("functions-h200")["after_by_before"]["1024 visual tokens, ratio 1"]
    wide, narrow = result("tensorrt_attention-h200")["vision block"].values()
    grouped, repeated = list(result("tensorrt_attention-h200")["decoder attention alone"].values())[:2]
    selecting = {row["visual_tokens"]: row for row in result("select_tokens-cpu")["rows"]}
    again, compacted = (result("spatial-vl-follow-ups")["ways"][way]["second"] for way in ("again", "compacted"))
    first = [f"{1000 * way['median_seconds_to_first_text']:.0f} ms" for way in (again, compacted)]
    (profile,) = (one for one in result("generate-h100")["profiles"] if one["visual_tokens"] == 1024)
    step, count = profile["decode"], profile["decoded_tokens"]
    speed = result("export_speed-cpu")
    ours, plain = (sorted(speed["copy"]["seconds"][name]) for name in ("ivc-export", "cp"))
    hashing = sorted(speed["copy"]["sha256_alone_seconds"])
    check_said(
        "docs/decisions.md",
        f"took {functions['first_token']:.3f} times as long as with graphs of plain operators, and a decode step "
        f"{functions['decode']:.3f} times as long",
        f"takes {narrow['scratch MB, 16384 patches']:,} MB of workspace for 16,384 patches instead of "
        f"{wide['scratch MB, 16384 patches']:,} MB, and {narrow['ms, 16384 patches']} ms for a block instead of "
        f"{wide['ms, 16384 patches']} ms",
        f"takes {repeated['ms, 1088 rows']} ms a layer for a prefill of 1,088 rows instead of "
        f"{grouped['ms, 1088 rows']} ms. It takes {repeated['ms, a step over 4224']} ms for a decode step "
        "over 4,224 rows instead of "
        f"{grouped['ms, a step over 4224']} ms",
        f"takes {selecting[1280]['ivc_priority_ms']:.1f} ms for 1,280 visual tokens",
        f"takes {selecting[1024]['onnxruntime_ms']:.0f} ms for 1,024 visual tokens and "
        f"{selecting[4096]['onnxruntime_ms']:.0f} ms for 4,096 on two CPU cores, and "
        f"{selecting[1]['onnxruntime_ms']:.1f} ms in a decode step",
        f"{right(compacted)} of second answers are right, and {right(again)} if",
        f"after {first[0]} instead of {first[1]}",
        f"replaces {step['launches'] // count} launches of small kernels, which take {step['kernel_ms'] / count:.1f}",
        f"`--weights link` takes {speed['link']['median_seconds']:.1f} s for {speed['parameters'] / 1e9:.1f} B",
        f"A copy of {speed['copy']['gigabytes']} GB takes {ours[0]:.1f} to {ours[-1]:.1f} s, where `cp` takes "
        f"{plain[0]:.1f} to {plain[-1]:.1f} s; SHA-256 alone takes {hashing[0]:.1f} to {hashing[-1]:.1f} s",
    )


def test_the_sample_was_trained_as_its_card_says() -> None:
    card, found = page("samples/spatial-vl/README.md"), result("spatial-vl-training")
    first, second = (found[phase] for phase in ("first_phase", "second_phase"))
    starts = (0, *(row["step"] for row in first[:-1])), (0, *(row["step"] for row in second[:-1]))
    minutes = sum(
        (row["step"] - start) * row["ms_a_step"] / 60_000
        for rows, begun in zip((first, second), starts, strict=True)
        for row, start in zip(rows, begun, strict=True)
    )
    assert f"in about {minutes:.0f} minutes, in {'four' if len(found['commands']) == 4 else '?'} calls" in card
    assert f"**First phase**, {first[-1]['step']:,} steps" in card
    assert f"**Second phase**, {second[-1]['step']:,} steps at 6e-4" in card and "--rate 6e-4" in found["commands"][-1]
    assert "planned as 12,000 and then as 8,000, and lowered at steps 298 and 5,026" in card
    assert [re.findall(r"--steps (\d+)", call)[0] for call in found["commands"][:2]] == ["12000", "8000"]
    assert "at steps 298 and 5026" in found["note"]
    before = result("spatial-vl-pruning-first-phase")
    kept = before["methods"]["IVC-Prune"]["0.5"]["first"]["all"]["accuracy"]
    assert f"had {100 * kept:.1f}% right answers (layer {before['layer']})" in card


def test_the_samples_card_has_its_sizes() -> None:
    card, config = page("samples/spatial-vl/README.md"), json.loads(read(ROOT / "samples/spatial-vl/config.json"))
    weights = ROOT / "samples" / "spatial-vl" / "model.safetensors"
    size = weights.stat().st_size
    assert f"of {size / 2e6:.1f} million parameters, {size / 1e6:.1f} MB in float16" in card
    text, vision = config.get("text_config", config), config["vision_config"]
    assert f"| layers | {text['num_hidden_layers']} | {vision['depth']} |" in card
    assert f"| width | {text['hidden_size']} | {vision['embed_dim']} |" in card
    assert f"| MLP | {text['intermediate_size']} | |" in card and f"has {text['vocab_size']} tokens" in card
    heads, shared = text["num_attention_heads"], text["num_key_value_heads"]
    size = text["hidden_size"] // heads
    assert f"| {heads}, and {shared} of keys and values, of size {size} | {vision['num_heads']} |" in card


def test_limits_that_guides_tell_are_those_of_the_code() -> None:
    serving, checks, weights = (page(f"docs/{name}.md") for name in ("serving", "ci", "weights"))
    assert f"| {ServerSettings.tokens} by default, at most `--max-tokens`" in serving
    assert f"running answers have {GRACE} seconds to end" in serving
    assert f"A body must arrive within {ServerSettings.body_seconds:g} seconds" in serving
    assert f"JSON is at most {MOST_DEPTH} levels deep" in serving
    assert f"at most {REMOTE_BYTES >> 20} MiB and {REMOTE_SECONDS:g} seconds" in serving
    assert ERRORS_FACTOR == 2 and "grew to more than twice the error in an earlier `parity.json`" in checks
    assert LEAST_SHARE == 0.01 and "Errors below a hundredth of their tolerance count as that hundredth" in checks
    assert f"takes more than {TIMES_FACTOR:g} times as long" in checks
    assert f"tries {len(RANGES)} smaller and larger ranges ({len(SIDES) ** 2} with zero points)" in weights


def test_groups_of_32_are_faster_at_level_0() -> None:
    assert "At level 0 take groups of 32" in page("docs/weights.md")
    for rows in result("cpu_packed")["rows"].values():
        small, large = (rows[f"int4, groups of {group}, level 0"]["ms_a_token"] for group in (32, 128))
        assert small < large


def test_what_is_said_of_runs_on_two_threads_was_measured() -> None:
    content, name = result("cpu_packed"), "int4, groups of 32, level {}"
    runs = [run["times_faster_than_float32"]["threads 2"] for run in content["again"]]
    runs.append({side: row["times_faster_than_float32"] for side, row in content["rows"]["threads 2"].items()})
    four, none = ([run[name.format(level)] for run in runs] for level in (4, 0))
    check_said(
        "docs/weights.md",
        f"medians over {content['rounds']} rounds on two cores",
        f"four runs gave {min(four):.1f} to {max(four):.1f} times float32's speed at level 4, and {min(none):.1f} to "
        f"{max(none):.1f} times at level 0",
    )


def test_the_samples_size_is_what_pages_say() -> None:
    with (ROOT / "samples" / "spatial-vl" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    parameters = sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    for name in ("README.md", "docs/getting-started.md", "docs/glossary.md", "samples/spatial-vl/README.md"):
        assert f"of {parameters / 1e6:.1f} million parameters" in page(name)


def test_the_fractions_of_the_selection_are_what_pages_say() -> None:
    part = round(100 * SELECTION.ivc_fraction)
    text = page("docs/how-it-works.md")
    assert (
        f"up to {2 * part}% of a picture's tokens are IVC tokens: {part}% near the identity and {part}% near 90" in text
    )
    assert f"The {100 // SELECTION.seed_divisor}% of visual tokens with the most votes are the *seeds*" in text


def test_figures_that_were_measured_once_are_those_of_their_file() -> None:
    for figure in result("measured_once")["figures"]:
        said = re.sub(r"e-0(\d)", r"e-\1", figure["said"].format(*figure["values"]))
        assert said in page(figure["page"]), said
