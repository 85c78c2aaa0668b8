"""Tables of what kernels take on a GPU, from profiles of benchmarks.gpu_generate and benchmarks.cuda_packed."""

from __future__ import annotations

from typing import Any

from tools.benchmark_tables import gpu_rows, milliseconds, number, source
from tools.results import percent, result, table

KERNELS = {
    "matrix products": ("nvjet", "splitKreduce", "OneRowLinear", "FewInt4", "MatMulFloat8bKernel"),
    "attention": ("sdpa", "lean_reduction", "attendRowKernel"),
    "copies to the device": ("Memcpy HtoD",),
    "rotations": ("RotaryEmbedding", "UnpackRoPEAppend", "turnKernel"),
    "activations": ("QuickGelu", "Activate"),
    "biases behind products": ("RhsPerChannel",),
    "splits of heads": ("SplitSmallInner",),
    "norms, with the sums before them": ("LayerNorm", "NormRows"),
    "weights unpacked": ("unpackKernel",),
}
"""What a kernel does, by parts of its name; the first that fits."""
SIZES = (256, 1024, 4096)
BEFORE, NOW = "profile_before-h200", "generate-h200"
WAYS = {"before": BEFORE, "now": NOW}


def kind_of(kernel: str) -> str:
    """What a kernel does."""
    return next((kind for kind, parts in KERNELS.items() if any(part in kernel for part in parts)), "others")


def by_kind(profile: dict[str, Any], runs: int = 1) -> dict[str, float]:
    """Milliseconds of a run's kernels by what they do; "others" has those that are too short to be listed."""
    sums = dict.fromkeys((*KERNELS, "others"), 0.0)
    for kernel in profile["kernels"]:
        sums[kind_of(kernel["name"])] += kernel["ms"] / runs
    sums["others"] += profile["kernel_ms"] / runs - sum(sums.values())
    return sums


def of_kinds(columns: list[dict[str, float]]) -> list[list[object]]:
    """A row for each kind of kernel that takes time in any of these columns."""
    kinds = [kind for kind in columns[0] if any(column[kind] >= 0.005 for column in columns)]
    return [[kind, *(f"{column[kind]:.2f}" for column in columns)] for kind in kinds]


def profiles(name: str) -> dict[int, dict[str, Any]]:
    """The profiles of a file, by the number of visual tokens."""
    return {one["visual_tokens"]: one for one in result(name)["profiles"]}


def gpu_kernels() -> list[str]:
    """Kernel time by what kernels do, with 1,024 visual tokens, on an H100."""
    profile = profiles("generate-h100")[1024]
    parts = (("first_token", 1), ("decode", profile["decoded_tokens"]))
    rows = of_kinds([by_kind(profile[part], runs) for part, runs in parts])
    rows.append(["all kernels", *(f"{profile[part]['kernel_ms'] / runs:.2f}" for part, runs in parts)])
    rows.append(["launches", *(f"{profile[part]['launches'] // runs:,}" for part, runs in parts)])
    return table("kernels | to the first token, ms | a token, ms", rows)


def profiled_row(name: str, visual: int) -> dict[str, Any]:
    """The times of a profiled run before it was profiled, nothing pruned."""
    content = result(name)
    found = (row for row in content.get("profile_rows", content["rows"]) if row["visual_tokens"] == visual)
    return dict(next(row for row in found if row["ratio"] == 1.0))


def operators() -> list[str]:
    """Answers before our operators for products, and now, with and without our library."""
    ways = {
        name: {(row["visual_tokens"], row["ratio"]): row for row in rows}
        for name, rows in result("operators-h200")["ways"].items()
    }
    ours = {(visual, ratio): row for (visual, _, ratio), row in gpu_rows(NOW).items()}
    rows = []
    for visual in SIZES:
        for name, found in (ways | {"now, our library": ours}).items():
            whole, half = found[visual, 1.0], found[visual, 0.5]
            stages = [milliseconds(whole["stages"][stage]) for stage in ("vision", "prefix", "decoder", "host")]
            first = [milliseconds(one["first_token"]) for one in (whole, half)]
            rows.append([f"{visual:,}", name, *first, *stages, *(number(one, "decode") for one in (whole, half))])
    head = (
        "visual tokens | what | first token, all kept | half kept | of all kept: vision | prefix | decoder | host | "
        "a token, all kept | half kept"
    )
    return table(head, rows) + source("operators-h200")


def profiled() -> dict[tuple[int, str], dict[str, Any]]:
    """Every profile by its size and by when it was taken, in this order."""
    found = {when: profiles(name) for when, name in WAYS.items()}
    return {(visual, when): one[visual] for visual in SIZES for when, one in found.items() if visual in one}


def profile_walls() -> list[str]:
    """Wall time, kernels and the roofline, to the first token and of a token."""
    rows = []
    for (visual, when), profile in profiled().items():
        row = profiled_row(WAYS[when], visual)
        first, step, count = profile["first_token"], profile["decode"], profile["decoded_tokens"]
        ideal = row["ideal"]
        cells = [milliseconds(row["first_token"]), milliseconds(first["kernel_ms"]), f"{first['launches']:,}"]
        cells += [milliseconds(ideal["vision"] + ideal["prefill"]), number(row, "decode")]
        cells += [f"{step['kernel_ms'] / count:.2f}", f"{step['launches'] // count}", number(ideal, "decode")]
        rows.append([f"{visual:,}", when, *cells])
    head = (
        "visual tokens | when | first token, ms | its kernels, ms | launches | roofline, ms | a token, ms | "
        "its kernels, ms | launches | roofline, ms"
    )
    told = [f"From `benchmarks/results/{name}.json`: `{command(name)}`" for name in (NOW, BEFORE)]
    return [*table(head, rows), "", told[0], "", told[1]]


def command(name: str) -> str:
    """The command of a file's profile."""
    content = result(name)
    return str(content.get("profile_command", content["command"]))


def profile_first() -> list[str]:
    """Kernels up to the first token by what they do."""
    found = profiled()
    columns = [by_kind(one["first_token"]) for one in found.values()]
    head = " | ".join(f"{visual:,} {when}" for visual, when in found)
    return table(f"kernels, ms | {head}", of_kinds(columns))


def profile_step() -> list[str]:
    """Kernels of a decode step by what they do."""
    found = profiled()
    columns = [by_kind(one["decode"], one["decoded_tokens"]) for one in found.values()]
    for column, profile in zip(columns, found.values(), strict=True):
        column["of the products: lm_head"] = head_of(profile["decode"]) / profile["decoded_tokens"]
    head = " | ".join(f"{visual:,} {when}" for visual, when in found)
    return table(f"kernels, ms | {head}", of_kinds(columns))


def head_of(step: dict[str, Any]) -> float:
    """Milliseconds of lm_head's products, of all profiled steps."""
    return float(sum(one["ms"] for one in step["kernels"] if "OneRowLinear<__half, 4," in one["name"]))


def packed_on_cuda() -> list[str]:
    """Answers with weights in 4 bits and in float16."""
    found = result("cuda_packed-h200")
    rows = []
    for what, way in (("with", found), ("without", found["without_library"])):
        for name, row in way["rows"].items():
            memory = [f"{row['device_bytes'][when] / 1e9:.2f}" for when in ("opened", "answered")]
            times = [number(row, "decode"), number(row, "decode_of_float16s"), milliseconds(row["first_token"])]
            rows.append([what, name, *times, number(row, "first_token_of_float16s"), *memory])
    head = (
        "our library | weights | a token, ms | of float16's | first token, ms | of float16's | "
        "GPU memory when opened, GB | after answers, GB"
    )
    return table(head, rows) + source("cuda_packed-h200")


def packed_kernels() -> list[str]:
    """Kernels with weights in 4 bits, by what they do."""
    profile = result("cuda_packed-h200")["profile"]
    columns = [by_kind(profile["first_token"]), by_kind(profile["decode"], profile["decoded_tokens"])]
    rows = of_kinds(columns)
    rows.append(["all kernels", *(f"{sum(column.values()):.2f}" for column in columns)])
    return table("kernels | to the first token, ms | a token, ms", rows)


def agreement() -> list[str]:
    """Answers of Spatial-VL that are those of PyTorch."""
    found = result("agreement-h200")
    rows = []
    for name, run in found["runs"].items():
        ratios = [run["ratios"][ratio] for ratio in ("1.0", "0.5")]
        same = [f"{one['identical']} of {found['questions']}" for one in ratios]
        gap = max(part["gap"] for one in ratios for part in one["differing"])
        rows.append([name, *same, f"{percent(gap, 2)}%"])
    head = "runtime | same answer, nothing pruned | half kept | largest difference of two logits where an answer parts"
    return table(head, rows) + source("agreement-h200", versions=False)


MAKERS = (
    agreement,
    gpu_kernels,
    operators,
    packed_kernels,
    packed_on_cuda,
    profile_first,
    profile_step,
    profile_walls,
)
TABLES = {make.__name__.replace("_", "-"): make for make in MAKERS}
