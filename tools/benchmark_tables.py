"""Tables of README and of docs/benchmarks.md: answers, times, memory and errors, each with what measured it.

Tables of GPUs take every file of their kind, so that figures of another GPU need no change here: `generate-*.json` of
benchmarks.gpu_generate; `tensorrt_layers-*.json`, `tensorrt_whole-*.json`, `whole-*.json` and `attention-*.json` of
these benchmarks; and `bench-*.json` of `ivc-bench --json`. Tables of profiles are in profile_tables.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tools.results import RESULTS, percent, result, table, with_interval


def source(name: str, *, versions: bool = True, command: bool = True) -> list[str]:
    """A line that tells where a table comes from: its file, the machine, versions and the command."""
    found = result(name)
    gpu = found.get("gpu") or found.get("device") or found.get("machine", "")
    parts = [gpu["name"] if isinstance(gpu, dict) else gpu]
    if versions:
        parts.append(
            ", ".join(f"{key} {value}" for key, value in found.get("versions", {}).items() if str(value) == value)
        )
    run = found.get("command") or found.get("to_repeat")
    if command and run:
        parts.append(f"`{run}`")
    told = "; ".join(part for part in parts if part)
    return ["", f"From `benchmarks/results/{name}.json`" + (f": {told}" if told else "")]


def milliseconds(value: float) -> str:
    """To a tenth."""
    return f"{value:.1f}"


def megabytes(value: float) -> str:
    """Bytes in MB, to a tenth."""
    return f"{value / 1e6:.1f}"


def gpu_rows(name: str) -> dict[tuple[int, str, float], dict[str, Any]]:
    """Rows of a file that ivc-bench or benchmarks.gpu_generate wrote, by size, side and ratio."""
    return {(row["visual_tokens"], row["side"], row["ratio"]): row for row in result(name)["rows"]}


def files(kind: str) -> list[str]:
    """Names of the results of one kind, of any GPU: `kind-*.json`."""
    return sorted(path.stem for path in RESULTS.glob(f"{kind}-*.json"))


def sources(kind: str) -> list[str]:
    """Where the figures of one kind come from."""
    return [line for name in files(kind) for line in source(name)]


def gpu_name(name: str) -> str:
    """The GPU of a file, in short: H100 of NVIDIA H100 80GB HBM3."""
    gpu = result(name).get("gpu") or ""
    words = str(gpu["name"] if isinstance(gpu, dict) else gpu).split()
    return words[1] if words[:1] == ["NVIDIA"] else " ".join(words)


def overview() -> list[str]:
    """README's table."""
    methods = result("spatial-vl-pruning")
    answers = [methods["methods"][name][ratio]["first"]["all"]["accuracy"] for name, ratio in BEST]
    gpu = {(row["side"], row["ratio"]): row for row in result("generate-h200")["beside"]["rows"]}
    ours, half, eager = (gpu[side] for side in SIDES[:3])
    cpu = {row["ratio"]: row for row in result("cpu_generate")["rows"] if (row["model"], row["threads"]) == ("0.2B", 1)}

    def times(key: str) -> list[str]:
        return [*(f"{cpu[ratio][key]['times_faster']} times as fast" for ratio in (1.0, 0.5)), "1"]

    def each(key: str, unit: str, write: Callable[[float], str]) -> list[str]:
        return [f"{write(row[key])} {unit}" for row in (ours, half, eager)]

    rows = [
        [
            f"Spatial-VL, right answers to {methods['test_questions']:,} questions",
            *(f"{percent(one)}%" for one in answers),
            "",
        ],
        ["Qwen2-VL-2B, KV cache with 1,024 visual tokens", *each("cache_bytes", "MB", megabytes)],
        ["the same on an H200, time to first token", *each("first_token", "ms", milliseconds)],
        ["the same, each further token", *each("decode", "ms", milliseconds)],
        ["0.2 B parameters on one CPU thread, time to first token", *times("time_to_first_token")],
        ["the same, each further token", *times("per_token")],
    ]
    return table("| nothing pruned | half kept | stock transformers", rows)


BEST = (("none", "1.0"), ("IVC-Prune", "0.5"))
SIDES = (("onnxruntime-cuda", 1.0), ("onnxruntime-cuda", 0.5), ("torch-eager", 1.0), ("torch-compiled", 1.0))
METHODS = {
    "IVC-Prune": "IVC-Prune",
    "foreground only": "foreground tokens alone",
    "random": "tokens at random",
    "IVC tokens and random": "IVC tokens, the others at random",
    "attention (FastV)": "attention of the last token (as FastV)",
    "embeddings (DART)": "embeddings, before layer 0 (as DART)",
}
RATIOS = ("0.7", "0.5", "0.3", "0.2")


def answers() -> list[str]:
    """Right answers of Spatial-VL by method and ratio."""
    methods = result("spatial-vl-pruning")["methods"]
    whole = methods["none"]["1.0"]

    def row(what: str, name: str, turn: str) -> list[str]:
        found = (methods[name][ratio][turn]["all"]["accuracy"] for ratio in RATIOS)
        return [what, percent(whole[turn]["all"]["accuracy"]), *map(percent, found)]

    rows = [row(what, name, "first") for name, what in METHODS.items()]
    rows.append(row("IVC-Prune, a second question over the compacted cache", "IVC-Prune", "second"))
    head = "right answers in % | nothing pruned | 70% kept | 50% | 30% | 20%"
    return table(head, rows) + source("spatial-vl-pruning")


def bundle_answers() -> list[str]:
    """Right answers of the exported bundle, and how many are those of stock transformers."""
    rows = []
    exact, methods = result("spatial-vl-bundle"), result("spatial-vl-bundle-methods")
    runs = [(f"ivc-prune {ratio}", one, exact["questions"]) for ratio, one in exact["ratios"].items()]
    runs += [(name, one, methods["questions"]) for name, one in methods["methods"].items()]
    for name, one, questions in runs:
        method, ratio = name.split()
        right = with_interval(one["accuracy"]["all"])
        rows.append([f"`{method}`", ratio, questions, right, f"{one['identical']} of {questions}"])
    head = "`--method` | kept | questions | right answers in % | same answer as stock transformers"
    return table(head, rows) + source("spatial-vl-bundle-methods") + source("spatial-vl-bundle", command=False)


def follow_ups() -> list[str]:
    """Second questions about the same picture."""
    found = result("spatial-vl-follow-ups")["ways"]
    rows = []
    names = {"again": "pruned again (the default)", "compacted": "`--follow-up compacted`"}
    for name, way in found.items():
        first, second = way["first"], way["second"]
        seconds = [f"{1000 * one['median_seconds_to_first_text']:.0f}" for one in (first, second)]
        right = [with_interval(one["all"]) for one in (first, second)]
        rows.append([names.get(name, name), way["ratio"], *right, *seconds])
    head = "conversation | kept | first question, right in % | second, right in % | ms to first text, first | second"
    return table(head, rows) + source("spatial-vl-follow-ups")


def cpu_answers() -> list[str]:
    """Times on a CPU beside stock transformers."""
    names = {"0.2B": "0.2 B parameters", "tiny": "0.3 M parameters"}
    found = {(row["model"], row["threads"], row["ratio"]): row for row in result("cpu_generate")["rows"]}
    rows = []
    for model, threads in sorted({key[:2] for key in found}):
        pair = [found[model, threads, ratio] for ratio in (1.0, 0.5)]
        cells = [one[key]["times_faster"] for key in ("time_to_first_token", "per_token") for one in pair]
        rows.append([names[model], threads, *cells])
    head = "model | threads | first token, all kept | first token, half kept | a token, all kept | a token, half kept"
    return table(head, rows) + source("cpu_generate")


def gpu_answers() -> list[str]:
    """Times on a GPU beside stock transformers, of every GPU measured."""
    rows = []
    for name in files("generate"):
        found = gpu_rows(name)
        for visual in sorted({key[0] for key in found}):
            ours, half, eager, compiled = (found.get((visual, *side)) for side in SIDES)
            first = [milliseconds(one["first_token"]) if one else "" for one in (ours, half, eager)]
            step = [milliseconds(one["decode"]) if one else "" for one in (ours, half, eager, compiled)]
            rows.append([gpu_name(name), f"{visual:,}", *first, *step])
    head = "GPU | visual tokens | first token, all kept | half kept | eager | a token, all kept | half kept | eager | "
    return table(f"{head}compiled", rows) + sources("generate")


def gpu_beside() -> list[str]:
    """Times beside stock transformers in one run, and in long answers, on an H200."""
    content, rows = result("generate-h200"), []
    runs = [content[name] for name in ("beside", "long") if name in content]
    for run in runs:
        for row in run["rows"]:
            cells = [row["side"], f"{run['settings']['count']:,}", row["ratio"], milliseconds(row["first_token"])]
            rows.append([*cells, number(row, "decode"), number(row, "decode_mean")])
    head = "side | tokens | kept | first token, ms | a token, ms: median | mean"
    told = [run["what"] for run in runs if "what" in run]
    if not any(row["side"] == "torch-compiled" for run in runs for row in run["rows"]):
        told.append("`torch.compile` was not measured")
    more = [f"From `benchmarks/results/generate-h200.json`: {'; '.join([*told, ''])}`{runs[0]['command']}`"]
    more += [f"Longer answers: `{run['command']}`" for run in runs[1:]]
    return [*table(head, rows), *(line for text in more for line in ("", text))]


def gpu_stages() -> list[str]:
    """Where the time to the first token goes, and memory."""
    rows = []
    for name in files("generate"):
        for (visual, side, ratio), row in sorted(gpu_rows(name).items(), key=lambda item: (item[0][0], -item[0][2])):
            if side == "onnxruntime-cuda":
                stages = [milliseconds(row["stages"][stage]) for stage in ("vision", "prefix", "decoder", "host")]
                ideal = [milliseconds(row["ideal"][part]) for part in ("vision", "prefill", "decode")]
                share = f"{percent(row['selection']['share'])}%" if row["selection"] else ""
                memory = [
                    megabytes(row["cache_bytes"]),
                    f"{row['device_bytes'] / 1e9:.2f}" if row["device_bytes"] else "",
                ]
                rows.append([gpu_name(name), f"{visual:,}", ratio, *stages, share, *ideal, *memory])
    head = (
        "GPU | visual tokens | kept | vision | prefix | decoder | host | selection and compaction, of the prefill | "
        "roofline: vision | prefill | a token | KV cache, MB | memory of the GPU, GB"
    )
    return table(head, rows)


def tensorrt_errors() -> list[str]:
    """Errors of TensorRT engines against PyTorch, and answers of Spatial-VL."""
    engines = {(e["model"].split("/")[1], e["dtype"], e["graphs"]): e for e in result("tensorrt-8.6-h100")["engines"]}
    rows = []
    for (model, dtype, graphs), engine in engines.items():
        if model == "goldens":
            continue
        exact = next(e for (other, *kind), e in engines.items() if other == "goldens" and kind == [dtype, graphs])
        errors = [f"{exact['largest_errors'][key]:.1e}" for key in ("logits", "keys_and_values", "token_score")]
        kept = "equal" if exact["kept_rows"].endswith("equal") else "one exchanged at a tie"
        same = [f"{one['identical']} of {one['asked']}" for one in engine["questions"].values()]
        rows.append([f"{dtype}, {graphs}", *errors, kept, *same])
    head = "engines | logits | keys and values | token scores | kept rows | same answers, nothing pruned | half kept"
    return table(head, rows) + source("tensorrt-8.6-h100")


def number(row: Mapping[str, Any] | None, key: str, digits: int = 2) -> str:
    """A figure of a row; nothing where it was not measured."""
    return "" if row is None or row.get(key) is None else f"{row[key]:.{digits}f}"


def tensorrt_layers() -> list[str]:
    """Milliseconds a layer in TensorRT engines, of every GPU and kind of engine."""
    rows = []
    for name in files("tensorrt_layers"):
        content = result(name)
        found = {
            (row.get("kind") or row["graphs"], row["visual_tokens"], row["stage"], row.get("ratio")): row
            for row in content["rows"]
        }
        for kind, visual in dict.fromkeys(key[:2] for key in found):
            whole, half, step, encoder = (
                found.get((kind, visual, *key))
                for key in (("prefill", 1.0), ("prefill", 0.5), ("decode", 1.0), ("vision", None))
            )
            cut = content["layers"]["prefix"]
            ideal = None if whole is None or not content["ceilings"] else whole["prefix_roofline_ms"] / cut
            cells = [number(encoder, "vision_ms_a_layer"), number(whole, "prefix_ms_a_layer")]
            cells += [number(row, "decoder_ms_a_layer") for row in (whole, half)]
            cells += ["" if ideal is None else f"{ideal:.2f}"]
            cells += [number(step, key) for key in ("prefix_ms_a_layer", "decoder_ms_a_layer")]
            cells += [number(whole, "select_ms"), number(whole, "compact_ms"), number(step, "compact_ms")]
            rows.append([gpu_name(name), kind, f"{visual:,}", *cells])
    head = (
        "GPU | engines | visual tokens | encoder block | prefix | decoder, all kept | decoder, half kept | roofline | "
        "decode step: prefix | decoder | select | compact, prefill | compact, decode step"
    )
    return table(head, rows) + sources("tensorrt_layers")


def benched() -> list[str]:
    """Answers of bundles as `ivc-bench --json` measured them."""
    rows, told = [], []
    for name in files("bench"):
        content = result(name)
        parts = {"": content} if "rows" in content else {key: one for key, one in content.items() if "rows" in one}
        for kind, part in parts.items():
            size = sum(part["bundle"]["parameters"].values()) / 1e6
            for row in part["rows"]:
                what = [part["gpu"]["name"].split()[1], f"{size:,.0f} M", " ".join([row["side"], kind]).strip()]
                times = [milliseconds(ms) for ms in (row["first_token"], row["stages"]["vision"], row["decode"])]
                rows.append([*what, f"{row['visual_tokens']:,}", row["ratio"], *times, megabytes(row["cache_bytes"])])
            versions = ", ".join(f"{key} {value}" for key, value in part["versions"].items())
            where = f"`benchmarks/results/{name}.json`: {kind or part['gpu']['name']}"
            told += ["", f"From {where}; {versions}; `{part['command']}`"]
    head = (
        "GPU | parameters | side | visual tokens | kept | first token, ms | vision of it | a token, ms | KV cache, MB"
    )
    return table(head, rows) + told


def tensorrt_builds() -> list[str]:
    """How long the engines of a whole Qwen2-VL-2B take to build."""
    rows = []
    for name in files("tensorrt_whole"):
        for one in result(name)["builds"]:
            sizes = [f"{one[key] / 1e9:.1f}" for key in ("engine_bytes", "host_peak_bytes", "device_peak_bytes")]
            rows.append([gpu_name(name), one["graph"], f"{one['seconds']:.0f}", *sizes])
    head = "GPU | engine | seconds to build | engine, GB | host memory at most, GB | GPU memory at most, GB"
    return table(head, rows) + [line for name in files("tensorrt_whole") for line in source(name, command=False)]


def whole() -> list[str]:
    """Answers of a whole Qwen2-VL-2B in each runtime."""
    rows = []
    for name in files("whole"):
        for side in result(name)["sides"]:
            for row in side["rows"]:
                stages = row["stages"]
                parts = [stages["vision"], sum(ms for stage, ms in stages.items() if stage not in ("vision", "host"))]
                cells = [milliseconds(ms) for ms in (row["first_token"], *parts, row["first_token"] - sum(parts))]
                what = [gpu_name(name), side["side"], side["first_token_from"], row["ratio"]]
                rows.append([*what, *cells, f"{row['decode']:.2f}", megabytes(row["cache_bytes"])])
    head = (
        "GPU | side | first token from | kept | first token, ms | vision of it | prefix and decoder | the rest | "
        "a token, ms | KV cache, MB"
    )
    return table(head, rows) + sources("whole")


def cpp_answers() -> list[str]:
    """Answers of C++ beside Python's over TensorRT engines."""
    rows = []
    for run in result("cpp-tensorrt-h200")["runs"]:
        for ratio, one in run["ratios"].items():
            same = [f"{one[kind]} of {run['questions']}" for kind in ("answers", "tokens", "kept_rows")]
            seconds = [f"{1000 * one['seconds_an_answer'][side]:.0f}" for side in ("cpp", "python")]
            rows.append([run["graphs"], ratio, *same, *seconds])
    head = "engines | kept | same answers | same tokens | same kept rows | C++, ms an answer | Python, ms an answer"
    return table(head, rows) + source("cpp-tensorrt-h200")


def attention() -> list[str]:
    """Our attention kernels beside PyTorch's."""
    names = {
        "prefill, rows": "prefill of {} rows",
        "appended rows over a cache": "{} cached rows, appended",
        "decode, cached rows": "a decode step over {} cached rows, appended",
        "encoder, patches": "encoder, {} patches",
    }
    rows = []
    for file in files("attention"):
        for key, name in names.items():
            for size, one in sorted(result(file)[key].items(), key=lambda item: int(item[0].split()[0])):
                fresh, _, cached = size.partition(" + ")
                told = f"{fresh} rows over {int(cached):,}" if cached else f"{int(size):,}"
                rows.append([gpu_name(file), name.format(told), f"{one['ours']:.1f}", f"{one['sdpa']:.1f}"])
    return table("GPU | attention | ours, μs | PyTorch, μs", rows) + sources("attention")


def joined() -> list[str]:
    """A decode step's split, rotation, append and attention in one launch."""
    found = result("joined-h200")["decode step (split, turn, append, attend)"]
    heads = "12 heads, 2 of keys, size 128, capacity 4480, "
    rows = [
        [int(name.removeprefix(heads).split()[0]), one["8 warps, 128 keys, 1 stage, 32 splits"], one["sdpa alone"]]
        for name, one in found.items()
        if name.startswith(heads)
    ]
    lines = table(
        "cached rows | `ivcAttendJoined`, μs | PyTorch's attention alone, μs",
        [[f"{cached:,}", f"{own:.1f}", f"{peer:.1f}"] for cached, own, peer in rows],
    )
    return lines + source("joined-h200")


def turned() -> list[str]:
    """Splitting and turning an encoder's rows."""
    found = result("joined-h200")["split and turn of many rows"]
    heads = ", 16 heads, 16 of keys, size 80"
    rows = [
        [f"{int(name.split()[0]):,}", f"{one['one head a lane']:.0f}"]
        for name, one in found.items()
        if name.endswith(heads)
    ]
    return table("patches | `ivcTurnHeads`, μs", rows)


def int4() -> list[str]:
    """Products of a decoder layer over weights in 4 bits."""
    found = result("int4-h200")
    one, many = found["one row"], found["many rows"]
    unpacked, floats = many["unpacked, then cuBLAS"], many["float16 by cuBLAS"]
    best = one["query, key and value in one, gate and up in one, begun before the kernel before has ended"]
    each = one["the same, those by tensor cores begun before the kernel before has ended"]
    rows = [["1", f"{best:.1f} ({each:.1f} with each product alone)", f"{one['float16 by cuBLAS']:.0f}"]]
    rows += [[f"{int(count):,}", f"{unpacked[count]:.0f}", f"{floats[count]:.0f}"] for count in floats]
    return table("rows | 4 bits, μs | float16 by cuBLAS, μs", rows) + source("int4-h200")


def serving() -> list[str]:
    """Requests to ivc-serve."""
    rows = []
    for name, what in (("serve-load", "Spatial-VL"), ("serve-soak", "a tiny model")):
        found = result(name)
        counts = found["outcomes"]
        asked = sum(counts[key] for key in ("answered", "left", "malformed"))
        seconds = [f"{found['seconds'][key]:.2f}" for key in ("p50", "p95")]
        rows.append([what, found["clients"], f"{asked:,}", f"{counts['answered']:,}", *seconds])
    lines = table("model | clients | requests | answered | seconds, median | seconds, 95th percentile", rows)
    return lines + source("serve-load") + source("serve-soak")


def exporting() -> list[str]:
    """How long exports of a checkpoint of 2.2 B parameters take."""
    found = result("export_speed-cpu")
    copied = sorted(found["copy"]["seconds"]["ivc-export"])
    plain = sorted(found["copy"]["seconds"]["cp"])
    rows: list[list[object]] = [
        ["`--weights link`", f"{found['link']['median_seconds']:.1f}", found["link"]["peak_anonymous_mib"]]
    ]
    rows.append(
        [
            f"copy of {found['copy']['gigabytes']} GB, hashed (`cp` takes {plain[0]:.1f} to {plain[-1]:.1f})",
            f"{copied[0]:.1f} to {copied[-1]:.1f}",
            "",
        ]
    )
    for name, one in found["conversion"].items():
        if isinstance(one, Mapping):
            rows.append([name, f"{one['seconds']:.0f}", one["peak_anonymous_mib"]])
    return table("export | seconds | memory, MiB", rows) + source("export_speed-cpu")


MAKERS = (
    overview,
    answers,
    bundle_answers,
    follow_ups,
    cpu_answers,
    gpu_answers,
    gpu_beside,
    gpu_stages,
    tensorrt_errors,
    tensorrt_layers,
    benched,
    tensorrt_builds,
    whole,
    cpp_answers,
    attention,
    joined,
    turned,
    int4,
    serving,
    exporting,
)
TABLES: dict[str, Callable[[], list[str]]] = {make.__name__.replace("_", "-"): make for make in MAKERS}
