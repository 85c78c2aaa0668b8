"""Tables of what kernels take on a GPU, from profiles of benchmarks.gpu_generate and benchmarks.cuda_packed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from tools.benchmark_tables import gpu_rows, milliseconds, number, source
from tools.results import percent, result, table

KERNELS = {
    "matrix products": (
        "nvjet",
        "splitKreduce",
        "OneRowLinear",
        "FewInt4",
        "FewPacked",
        "OneRowPacked",
        "stagedKernel",
        "MatMulFloat8bKernel",
    ),
    "attention": ("sdpa", "lean_reduction", "attendKernel", "attendRowKernel", "attendTogetherKernel", "combineKernel"),
    "copies to the device": ("Memcpy HtoD",),
    "rotations": ("RotaryEmbedding", "UnpackRoPEAppend", "turnKernel"),
    "activations": ("QuickGelu", "Activate"),
    "biases behind products": ("RhsPerChannel",),
    "splits of heads": ("SplitSmallInner",),
    "norms, with the sums before them": ("LayerNorm", "NormRows"),
    "weights unpacked": ("unpackKernel",),
}
"""What a kernel does, by parts of its name; the first that fits."""
HEADS = ("OneRowLinear<__half, 4,", "MatMulFloat8bKernel", "FewPacked<__half, 8,", "OneRowPacked<__half, 8,")
SIZES = (256, 1024, 4096)
MIDDLE = 1024
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
    """The times of a run that was not profiled, nothing pruned."""
    found = (row for row in result(name)["rows"] if row["visual_tokens"] == visual)
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
    found = profiled()
    for when in WAYS:
        left = [f"{visual:,}" for visual in SIZES if (visual, when) not in found]
        told += [f'"{when.capitalize()}" was not profiled at {" and ".join(left)} visual tokens.'] if left else []
    return [*table(head, rows), *(line for text in told for line in ("", text))]


def command(name: str) -> str:
    """The command of a file's profile."""
    content = result(name)
    return str(content.get("profile_command", content["command"]))


def profile_first() -> list[str]:
    """Kernels up to the first token by what they do."""
    found = profiled()
    columns = [by_kind(one["first_token"]) for one in found.values()]
    head = " | ".join(f"{visual:,} {when}" for visual, when in found)
    return [*table(f"kernels, ms | {head}", of_kinds(columns)), "", *wrapped(what_changed(found))]


def what_changed(found: Mapping[tuple[int, str], dict[str, Any]]) -> str:
    """What took less time from before to now, at 1,024 visual tokens."""

    def taken(when: str, *names: str) -> float:
        kernels = found[MIDDLE, when]["first_token"]["kernels"]
        return float(sum(one["ms"] for one in kernels if any(name in one["name"] for name in names)))

    norms, turns = (
        [taken(when, *names) for when in WAYS]
        for names in (("cuApplyLayerNorm", "NormRows<__half, 5"), ("turnKernel",))
    )
    return (
        f"Layer norms alone went from {norms[0]:.2f} to {norms[1]:.2f} ms at {MIDDLE:,} visual tokens, and the splits "
        f"and rotations of `TurnHeads` from {turns[0]:.2f} to {turns[1]:.2f} ms."
    )


def newest() -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """The latest profile of each size, and the times of its run."""
    found = profiled()
    last = {visual: [when for size, when in found if size == visual][-1] for visual in SIZES}
    return {visual: (found[visual, when], profiled_row(WAYS[when], visual)) for visual, when in last.items()}


def profile_left() -> list[str]:
    """What is left to the roofline, and why."""
    lines = []
    for visual, (profile, row) in newest().items():
        first, kinds = profile["first_token"], by_kind(profile["first_token"])
        ideal = row["ideal"]["vision"] + row["ideal"]["prefill"]
        text = (
            f"- **{visual:,} visual tokens.** Kernels take {first['kernel_ms']:.1f} of {row['first_token']:.1f} ms, "
            f"where the roofline is {ideal:.1f} ms. Products take {kinds['matrix products']:.1f} ms, and attention "
            f"{kinds['attention']:.1f} ms. The host's part is {row['stages']['host']:.1f} ms. There are "
            f"{first['launches']} launches."
        )
        lines += wrapped(text, "  ")
    middle = by_kind(newest()[MIDDLE][0]["first_token"])
    others = sum(middle[kind] for kind in ("rotations", "activations", "norms, with the sums before them"))
    text = f"- Rotations, activations and norms take {others:.1f} ms at {MIDDLE:,} visual tokens. "
    text += "The roofline does not count them."
    return lines + wrapped(text, "  ")


def profile_reads() -> list[str]:
    """What a decode step reads, and how long that takes."""
    found = newest()
    steps = {visual: by_kind(one["decode"], one["decoded_tokens"]) for visual, (one, _) in found.items()}
    products, attention = (
        sorted((step[kind], f"{visual:,}") for visual, step in steps.items())
        for kind in ("matrix products", "attention")
    )
    row, speed = found[SIZES[0]][1], result(NOW)["ceilings"][0]["copy_gb_per_second"] / 1000
    return wrapped(
        f"The products read all weights. The roofline allows {row['ideal']['decode']:.2f} ms for it, at {speed:.1f} "
        f"TB/s, the measured speed of a copy. Their kernels take {products[0][0]:.2f} to {products[-1][0]:.2f} ms in "
        f"sum. Attention grows with the cache, from {attention[0][0]:.2f} ms at {attention[0][1]} to "
        f"{attention[-1][0]:.2f} ms at {attention[-1][1]} visual tokens."
    )


def wrapped(text: str, indent: str = "") -> list[str]:
    """A paragraph's lines."""
    return textwrap.wrap(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def profile_step() -> list[str]:
    """Kernels of a decode step by what they do, in float16 and with weights in 4 bits."""
    found = profiled()
    columns = [by_kind(one["decode"], one["decoded_tokens"]) for one in found.values()]
    packed = result("cuda_packed-h200")["profile"]
    columns.append(by_kind(packed["decode"], packed["decoded_tokens"]))
    for column, profile in zip(columns, [*found.values(), packed], strict=True):
        column["of the products: lm_head"] = head_of(profile["decode"]) / profile["decoded_tokens"]
    heads = [f"{visual:,} {when}" for visual, when in found]
    heads.append(f"{result('cuda_packed-h200')['visual_tokens']:,} now, 4 bits")
    return table(f"kernels, ms | {' | '.join(heads)}", of_kinds(columns))


def head_of(step: dict[str, Any]) -> float:
    """Milliseconds of lm_head's products, of all profiled steps: in float16, or in 8 bits."""
    return float(sum(one["ms"] for one in step["kernels"] if any(part in one["name"] for part in HEADS)))


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
    profile_left,
    profile_reads,
    profile_step,
    profile_walls,
)
TABLES = {make.__name__.replace("_", "-"): make for make in MAKERS}
