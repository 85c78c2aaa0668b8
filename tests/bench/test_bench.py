"""ivc-bench: prompts of a size, selection and compaction by themselves, limits, memory, and whole runs."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from benchmarks import gpu_generate
from ivc_export import families
from ivc_export.bench.footprint import Growth, host_bytes
from ivc_export.bench.measure import Bench, BenchSettings, Contestant, Row, agreement, check_tokens
from ivc_export.bench.prompts import Prompt, noise_prompt
from ivc_export.bench.roofline import Workload, measure_ceilings
from ivc_export.bench.sides import Answer, BundleSide
from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.folder import read_index
from ivc_export.cli import ivc_bench
from ivc_export.contract.manifest import SelectionRule
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import TEXT, Size, estimate_bundle
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe, Quantisation
from ivc_export.lowering import lower
from ivc_export.runtime.backends import BACKENDS
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.probes import fused_times, portable_times
from ivc_export.runtime.onnxruntime.records import NO_CUDA_GRAPH
from ivc_export.runtime.plan import Run, plan_run
from ivc_export.runtime.probes import Ceilings, compaction_part, selection_part
from ivc_export.selection.ivc_prune import select
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

SHORT = ["--tokens", "2", "--rounds", "1", "--warmups", "1", "--sizes", "25", "16", "--peers", "torch-eager"]
"""Of benchmarks.gpu_generate."""
QUICK = ["--visual", "20", "--text", "16", "--tokens", "3", "--rounds", "2", "--warmups", "1"]


def plan_of(bundle: Bundle, prompt: Prompt, ratio: float = 0.5) -> Run:
    return plan_run(bundle.manifest, np.array(prompt.tokens, np.int32), [prompt.picture.grid], 0, ratio)


@pytest.mark.parametrize("family", families.names())
def test_prompts_have_the_size_that_is_asked_for(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY[family])
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    p = bundle.manifest.preprocessing
    for asked in (50, 200):
        prompt = noise_prompt(bundle, min(asked, bundle.manifest.max_visual), 40) if p.kind == "patches" else None
        if prompt is not None:
            assert 0.85 * asked <= prompt.visual <= asked and len(prompt.tokens) == prompt.visual + 40
    prompt = noise_prompt(bundle, 1, 40)
    step = OnnxSession(bundle).converse(0.5).run(prompt.tokens, [prompt.picture])
    assert len(step.run.visual_index) == prompt.visual == len(prompt.tokens) - 40
    assert len(step.run.query_index) > 1


@pytest.mark.parametrize("lowering", ["portable", "ort-cuda"])
def test_the_part_that_selects_is_the_selection(golden_bundle: Bundle, lowering: Any) -> None:
    m = golden_bundle.manifest
    prompt = noise_prompt(golden_bundle, 42, 20)
    plan = plan_of(golden_bundle, prompt)
    values = np.random.default_rng(1).standard_normal(
        (1, m.decoder.kv_heads, plan.rows, m.decoder.head_dim), np.float32
    )
    part = selection_part(lower(golden_bundle.graph("prefix"), lowering))
    session = onnxruntime.InferenceSession(ir.to_proto(part).SerializeToString(), providers=["CPUExecutionProvider"])
    capacity = plan.rows + 3
    feeds = {
        "values": values,
        "keep_count": np.array([plan.keep_count], np.int32),
        "total_sequence_length": np.array(plan.rows, np.int32),
        "past_key.0": np.zeros((1, m.decoder.kv_heads, capacity, m.decoder.head_dim), np.float32),
        "cache_rows": np.arange(capacity, dtype=np.int32),
        "cache_place": np.arange(plan.kept, dtype=np.int32),
        "cache_start": np.zeros(1, np.int32),
    }
    names = [value.name for value in session.get_inputs()]
    given = [feeds[name] if name in feeds else getattr(plan, name) for name in names]
    outputs = session.run(None, dict(zip(names, given, strict=True)))
    found = dict(zip([value.name for value in session.get_outputs()], outputs, strict=True))
    assert isinstance(m.selection, SelectionRule)
    wanted = select(
        values[0],
        plan.ivc_priority,
        plan.visual_index,
        plan.text_index,
        plan.query_index,
        plan.keep_count,
        m.selection,
    )
    np.testing.assert_array_equal(found["keep_index"], wanted.keep_index)
    assert not any("layers." in str(node.name) for node in part.graph)
    if lowering == "ort-cuda":
        kept = len(wanted.keep_index)
        np.testing.assert_array_equal(found["cache_index"][:kept], wanted.keep_index)
        np.testing.assert_array_equal(found["cache_index"][kept:], np.arange(kept, capacity))


@pytest.mark.parametrize("lowering", ["portable", "ort-cuda"])
def test_the_part_that_compacts_gathers_rows_and_caches(golden_bundle: Bundle, lowering: Any) -> None:
    m = golden_bundle.manifest
    part = compaction_part(lower(golden_bundle.graph("decoder"), lowering))
    gathered = 2 * m.selection_layer + 2  # keys and values, hidden states, positions
    found = Counter(node.op_type for node in part.graph)
    if lowering == "portable":
        assert found == {"CompactGather": gathered}
    else:
        assert found == {"Concat": 1, "Gather": 1, "Split": 1, "CompactGather": 2}
    assert len(part.graph.outputs) == gathered


def test_selection_is_timed_in_both_runtimes_of_onnxruntime(golden_bundle: Bundle) -> None:
    prompt = noise_prompt(golden_bundle, 42, 20)
    plan = plan_of(golden_bundle, prompt)
    portable_found = portable_times(OnnxSession(golden_bundle), plan)
    fused_found = fused_times(FusedSession(golden_bundle, "cpu"), plan, 70)
    assert min(portable_found.select, portable_found.compact, portable_found.decode) > 0
    assert min(fused_found.select, fused_found.compact) > 0 and fused_found.decode == 0


def test_work_is_what_the_dry_run_counts(sample_bundle: Bundle) -> None:
    prompt = noise_prompt(sample_bundle, 48, TEXT)
    side = 28 * prompt.picture.grid.columns, 28 * prompt.picture.grid.rows
    (wanted,) = estimate_bundle(sample_bundle, [Size(*side)]).pictures
    assert wanted.visual_tokens == prompt.visual
    workload = Workload(sample_bundle)
    for kept, cost in ((wanted.kept_tokens, wanted.pruned), (prompt.visual, wanted.unpruned)):
        assert workload.work(prompt, kept).flops == cost.flops
    tensors = read_index(sample_bundle.folder / "weights" / "model.safetensors")
    rest = sum(t.length for name, t in tensors.items() if name != "model.embed_tokens.weight") // 4
    assert sum(workload.parameters.values()) == rest  # the sample's lm_head is its own


def test_the_roofline_is_the_slower_of_both_limits(sample_bundle: Bundle) -> None:
    ceilings = Ceilings(bytes_per_second=100.0, flops_per_second=1000.0, dtype="float32", source="")
    assert ceilings.seconds(flops=5000, size=100) == 5
    assert ceilings.seconds(flops=100, size=700) == 7
    best = ceilings.best(replace(ceilings, bytes_per_second=50.0, flops_per_second=2000.0))
    assert (best.bytes_per_second, best.flops_per_second) == (100, 2000)
    workload = Workload(sample_bundle)
    work = workload.work(noise_prompt(sample_bundle, 48, TEXT), 24)
    read = 4 * (workload.parameters["prefix"] + workload.parameters["decoder"])
    sizes = sample_bundle.manifest.decoder
    row = 4 * 2 * sizes.layers * sizes.kv_heads * sizes.head_dim
    assert work.ideal(ceilings, 1000, 10)["decode"] == pytest.approx((read + 1000 + 5 * row) / 100)


def test_ceilings_of_this_machine_are_finite() -> None:
    found = measure_ceilings("cpu", "float32")
    assert 1e8 < found.bytes_per_second < 1e13 and 1e8 < found.flops_per_second < 1e14


def test_a_footprint_is_the_growth_while_a_side_is_at_work() -> None:
    readings: Iterator[int] = iter([])
    last = 0

    def counter() -> int:
        nonlocal last
        last = next(readings, last)
        return last

    footprint = Growth(counter)
    for before, top, after in ((100, 150, 130), (500, 520, 490)):  # others took 370 in between
        readings = iter([before])
        with footprint.grow():
            readings = iter([top, after])
            while last not in (top, after):
                pass
        readings = iter([])
    assert (footprint.held, footprint.most) == (30 - 10, 50)


def test_an_unwatched_footprint_looks_before_and_after_alone() -> None:
    readings = iter([100, 160])
    footprint = Growth(lambda: next(readings), watched=False)
    with footprint.grow():
        pass
    assert (footprint.held, footprint.most) == (60, 60)


def test_host_memory_grows_by_what_is_taken() -> None:
    footprint = Growth(host_bytes)
    with footprint.grow():
        taken = np.ones(8_000_000)
    assert taken.nbytes * 0.9 < footprint.held < taken.nbytes * 1.3


def row(**changes: Any) -> Row:
    times = {"vision": 1.0, "prefill": 4.0, "decode": 2.0}
    return replace(
        Row(
            side="a",
            dtype="float32",
            device="cpu",
            ratio=1.0,
            visual_tokens=1024,
            kept_tokens=1024,
            text_tokens=64,
            stages={"vision": 1.0, "prefix": 2.0, "decoder": 2.0, "host": 0.5},
            prefill=4.0,
            first_token=6.0,
            decode=2.0,
            decode_mean=2.0,
            selection={"select": 0.1, "compact": 0.1, "share": 0.05, "decode": 0.0, "decode_share": 0.0},
            ideal=times,
            roofline=dict.fromkeys(times, 1.0),
            cache_bytes=1,
            visual_cache_bytes=1,
            host_bytes=1,
            device_bytes=None,
            tokens=[1, 2, 3],
            agreement=None,
        ),
        **changes,
    )


def test_float32_sides_must_draw_the_same_tokens() -> None:
    check_tokens([row(), row(side="b"), row(side="c", dtype="float16", tokens=[9]), row(ratio=0.5, tokens=[8])])
    with pytest.raises(UserError, match="b and a give different tokens at ratio 1, both in float32"):
        check_tokens([row(), row(side="b", tokens=[1, 2, 4])])
    assert agreement([1, 2, 3], [1, 2, 4]) == 2 and agreement([1, 2], [1, 2]) == 2


def test_bars_say_what_is_met() -> None:
    stages = {"vision": 1.0, "prefill": 2.0, "host": 0.0}
    eager = row(side="torch-eager", stages=stages, first_token=12.0, decode=50.0, selection=None)
    compiled = row(side="torch-compiled", stages=stages, decode=1.9, selection=None)
    rows = [row(), row(ratio=0.5, first_token=4.0, decode=2.1), eager, compiled]
    found = {bar["bar"].partition(", 1024 visual tokens, ratio ")[2]: bar for bar in gpu_generate.bars(rows)}
    met = {name: (bar["value"], bar["met"]) for name, bar in found.items()}
    assert met["1: first token at least 3 times faster than eager"] == (2, False)
    assert met["0.5: first token at least 3 times faster than eager"] == (3, True)
    assert met["1: decode at least 20 times faster than eager"] == (25, True)
    assert met["1: decode faster than compiled"] == (0.95, False)
    assert met["1: selection and compaction under 3% of prefill"] == (0.05, False)
    assert met["0.5: decode never slower than unpruned (by unpruned)"] == (1.05, False)


class Failing:
    name, dtype, device, prunes, notes = "failing", "float32", "cpu", False, ""

    def answer(self, prompt: Prompt, ratio: float, count: int) -> Answer:
        raise RuntimeError("out of luck")


def test_a_side_that_fails_ends_a_run_only_where_it_should(sample_bundle: Bundle) -> None:
    from ivc_export.bench.footprint import Footprints

    prompt = noise_prompt(sample_bundle, 20, 16)
    settings = BenchSettings((0.5,), count=2, rounds=1, warmups=1)
    failures: dict[str, str] = {}
    sides: list[Any] = [BundleSide(OnnxSession(sample_bundle)), Failing()]
    contestants = [Contestant(side, Footprints(None)) for side in sides]
    rows = Bench(sample_bundle, settings, failures=failures).measure(contestants, prompt)
    assert [(one.side, one.ratio) for one in rows] == [("onnxruntime-cpu", 1.0), ("onnxruntime-cpu", 0.5)]
    ((what, text),) = failures.items()
    assert what == f"failing, {prompt.visual} visual tokens"
    assert text.startswith("RuntimeError: out of luck\nTraceback") and 'raise RuntimeError("out of luck")' in text
    with pytest.raises(RuntimeError, match="out of luck"):
        Bench(sample_bundle, settings).measure(contestants, prompt)


def test_a_run_beside_pytorch(
    sample_bundle: Bundle,
    sample_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    options = [*QUICK, "--visual", "30", "--ratio", "0.5", "--ratio", "0.2", "--against", str(sample_checkpoint)]
    post = tmp_path / "post.json"
    options = [str(sample_bundle.folder), *options, "--json", str(report), "--plot", str(plot), "--report", str(post)]
    monkeypatch.setattr("sys.argv", ["/usr/bin/ivc-bench", *options])
    assert ivc_bench() == 0
    out = capsys.readouterr().out
    for part in ("20 visual and 16 text", "30 visual", "torch-eager", "select, compact", "first token", "GB/s"):
        assert part in out, part
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = json.loads(report.read_text())
    assert content["command"] == shlex.join(["ivc-bench", *options]) and content["versions"]["torch"]
    for_all = json.loads(post.read_text())
    assert for_all == content | {"command": for_all["command"], "engines": {}} and "/" not in for_all["command"]
    found = {(one["visual_tokens"], one["side"], one["ratio"]): one for one in content["rows"]}
    ours, peer = ("onnxruntime-cpu", 1.0), ("torch-eager", 1.0)
    assert len(found) == len(content["rows"]) == 2 * 4
    sizes = sample_bundle.manifest.decoder
    cell = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * 4
    for visual in (20, 30):
        mine, other, half = (found[(visual, *one)] for one in (ours, peer, ("onnxruntime-cpu", 0.5)))
        assert mine["tokens"] == other["tokens"] and other["agreement"] == 4
        assert mine["cache_bytes"] == other["cache_bytes"] == cell * (visual + 16)
        assert half["visual_cache_bytes"] == cell * visual / 2 and half["kept_tokens"] == visual / 2
        for one in (half, mine):
            stages = one["stages"]
            assert 0 < sum(stages.values()) < 2 * one["first_token"]
            assert one["prefill"] > max(stages["prefix"], stages["decoder"]) > 0
            assert one["decode"] > 0 and 0 < one["roofline"]["decode"] < 10 and one["selection"]["select"] > 0


def test_the_gpu_script_runs_on_a_small_model(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    gpu_generate.main(
        ["--tiny", "--backends", "onnxruntime-cpu", "onnxruntime-cuda", *SHORT, "--profile", "--output", str(output)]
    )
    content = json.loads(output.read_text())
    sides = ["onnxruntime-cpu", "onnxruntime-cpu", "torch-eager"]
    assert [(one["side"], one["visual_tokens"]) for one in content["rows"]] == [
        (side, visual) for visual in (25, 16) for side in sides
    ]
    for what in ("onnxruntime-cuda", "onnxruntime-cuda, with a CUDA graph"):
        assert "has no CUDA provider" in content["failures"][what] and "Traceback" in content["failures"][what]
    assert content["rows"][0]["agreement"] == content["rows"][2]["agreement"] == 3  # float16 weights, widened alike
    profiled = [(one["side"], one["visual_tokens"]) for one in content["profiles"]]
    assert content["bars"] and profiled == [("onnxruntime-cpu", 25), ("onnxruntime-cpu", 16)]
    assert all(one[part]["wall_ms"] > 0 for one in content["profiles"] for part in ("first_token", "decode"))


@pytest.mark.parametrize("broken", ["capture", "everything"])
def test_a_side_that_fails_at_first_is_tried_without_a_cuda_graph(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "found.json"

    def opened(bundle: Bundle, cuda_graph: bool = True) -> FusedSession:
        session = FusedSession(bundle, "cpu")
        session.backend = "onnxruntime-cuda"

        def run_bound(name: str, binding: Any, captured: int | None = None, wait: bool = True) -> None:
            if captured is not None and (cuda_graph or broken == "everything"):
                raise UserError("decode cannot run (no capture)")
            FusedSession.run_bound(session, name, binding, captured, wait)

        monkeypatch.setattr(session, "run_bound", run_bound)
        return session

    record = replace(BACKENDS["onnxruntime-cuda"], open=opened, device="cpu")
    monkeypatch.setitem(BACKENDS, "onnxruntime-cuda", record)
    gpu_generate.main(["--tiny", "--backends", "onnxruntime-cuda", *SHORT, "--profile", "--output", str(output)])
    content = json.loads(output.read_text())
    name = "onnxruntime-cuda"
    failed = content["failures"]
    assert "no capture" in failed[f"{name}, first answer, with a CUDA graph"]
    assert (f"{name}, first answer" in failed) == (broken == "everything")
    if broken == "capture":
        assert content["sides"][name] == NO_CUDA_GRAPH
        assert [one["side"] for one in content["rows"]] == 2 * [name, name, "torch-eager"]
        assert content["rows"][0]["agreement"] == content["rows"][2]["agreement"] == 3
        assert content["profiles"][0]["operators"]["decode"]
    else:
        assert [one["side"] for one in content["rows"]] == 2 * ["torch-eager"]


def test_torch_compiled_takes_part_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, list[str]]] = []

    def measure(self: Bench, contestants: list[Contestant], prompt: Prompt) -> list[Row]:
        measured.append((prompt.visual, [one.side.name for one in contestants]))
        return []

    monkeypatch.setattr(Bench, "measure", measure)
    peers = ["--peers", "torch-eager", "torch-compiled", "--compiled-sizes", "16"]
    quick = ["--tiny", "--backends", "onnxruntime-cpu", *SHORT, *peers]
    gpu_generate.main([*quick, "--output", str(tmp_path / "found.json")])
    both = ["onnxruntime-cpu", "torch-eager"]
    assert measured == [(25, both), (16, [*both, "torch-compiled"])]


def test_packed_weights_are_measured_beside(tmp_path: Path) -> None:
    output, checkpoint = tmp_path / "found.json", make_checkpoint(tmp_path / "checkpoint", TINY["qwen2_vl"])
    bundle = export(ExportRecipe(checkpoint, tmp_path / "packed", quantisation=Quantisation("int4", 32)))
    one = ["--tokens", "2", "--rounds", "1", "--warmups", "0", "--sizes", "16", "--ratios", "1", "--peers"]
    arguments = ["--tiny", "--backends", "onnxruntime-cpu", *one, "--packed", str(bundle.folder), "--long", "40"]
    gpu_generate.main([*arguments, "--output", str(output)])
    content = json.loads(output.read_text())
    mine, packed = content["rows"]
    assert content["long"]["settings"]["count"] == 40
    assert [(row["side"], len(row["tokens"])) for row in content["long"]["rows"]] == [
        (mine["side"], 32),
        (packed["side"], 32),
    ]
    assert (mine["side"], packed["side"]) == ("onnxruntime-cpu", "onnxruntime-cpu, packed")
    assert mine["ideal"]["decode"] > packed["ideal"]["decode"]  # each by its own bundle's weights


def test_the_profile_names_operators(golden_bundle: Bundle) -> None:
    prompt = noise_prompt(golden_bundle, 20, 16)
    found = gpu_generate.operators(FusedSession(golden_bundle, "cpu"), prompt, 2)
    assert set(found) == {*GRAPH_NAMES, "decode", "rows", "pixels.0"}  # those of what goes up, too
    assert "GroupQueryAttention" in {one["name"] for one in found["decode"]}


ERRORS = [
    (["--backend", "onnxruntime"], "choose from 'onnxruntime-cpu', 'onnxruntime-cuda', 'tensorrt', 'tensorrt-rtx'"),
    (["--provider", "cuda"], "--provider was removed: give --backend onnxruntime-cpu in place of --provider cpu"),
    (["--backend", "tpu"], "invalid choice: 'tpu'"),
    (["--backend", "onnxruntime-cuda"], "has no CUDA provider: install onnxruntime-gpu"),
    (["--op-library", "libops.so"], "--op-library is for onnxruntime-cuda: use it with --backend onnxruntime-cuda"),
    (["--visual", "5000"], "5000 visual tokens are out of range: give 1 to 1280"),
    (["--visual", "0"], "0 visual tokens are out of range"),
    (["--text", "3"], "3 text tokens are too few"),
    (["--ratio", "1.5"], "ratio 1.5 is out of range"),
    (["--rounds", "0"], "rounds 0 is out of range"),
    (["--tokens", "0"], "tokens 0 is out of range"),
    (["--peer", "torch-eager"], "--peer needs the checkpoint"),
    (["--against", "TMP/nowhere"], "nowhere is not a folder"),
    (["--against", "samples/spatial-vl"], "the decoder of samples/spatial-vl differs from that of"),
    (["--json", "TMP/no/file.json"], "does not exist: create it"),
    (["--json", "TMP"], "is a folder: name a file in it"),
    (["--plot", "TMP/plot.gif"], "does not end in .png"),
    (["--json", "TMP/plot.png", "--plot", "TMP/plot.png"], "plot.png: give two different files"),
    (["--json", "TMP/a.json", "--report", "TMP/a.json"], "--json and --report both name"),
    (["--report", "TMP/no/file.json"], "does not exist: create it"),
]


@pytest.mark.parametrize(("options", "sentence"), ERRORS, ids=[" ".join(options) for options, _ in ERRORS])
def test_mistakes_are_one_sentence(
    sample_bundle: Bundle, tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [option.replace("TMP", str(tmp_path)) for option in options]
    assert ivc_bench([str(sample_bundle.folder), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("package", "options", "sentence"),
    [
        ("torch", ["--against", "."], "--against needs torch: install ivc-export[check]"),
        ("matplotlib", ["--plot", "plot.png"], "--plot needs matplotlib: install ivc-export[check]"),
    ],
)
def test_missing_packages_are_one_sentence(
    sample_bundle: Bundle,
    package: str,
    options: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert ivc_bench([str(sample_bundle.folder), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_lowered_bundle_cannot_be_taken_apart(
    sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = export(ExportRecipe(sample_checkpoint, tmp_path / "bundle", lowering="native"))
    assert ivc_bench([str(bundle.folder), *QUICK]) == 2
    assert "ivc-bench needs portable graphs" in capsys.readouterr().err
