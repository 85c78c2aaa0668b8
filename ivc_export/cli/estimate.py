"""Prints what ivc-export --dry-run finds."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ivc_export.exporter.estimate import Cost, Estimate

UNCALIBRATED = "the selection layer is not calibrated for this model: ivc-calibrate finds the best one"


def show_estimate(found: Estimate, console: Console) -> None:
    """Print the dry run's tables."""
    console.print(
        f"{found.family}, {found.dtype}: layers below {found.selection_layer} of {found.layers} process every "
        f"token, the others {found.ratio:.0%} of the visual tokens, selected by {found.method}; "
        f"{found.parameters / 1e9:.2f} B parameters, "
        f"{decimal(found.weight_bytes)} of weights"
    )
    if found.quantisation:
        console.print(found.quantisation, style="yellow", markup=False)
    if not found.calibrated:
        console.print(UNCALIBRATED, style="yellow")
    console.print(picture_table(found))
    console.print(
        f"The prompt is the picture and {found.pictures[0].text_tokens} tokens of text. Activations are those of the "
        "graphs as they are written, one graph at a time; a runtime that fuses attention needs less.",
        style="dim",
    )
    console.print(device_table(found))


def picture_table(found: Estimate) -> Table:
    """Tokens, FLOPs, cache and activations by picture, each beside no pruning if that differs."""
    table = Table(title="one prefill: pruned of unpruned")
    table.add_column("")
    for p in found.pictures:
        table.add_column(f"{p.picture.width}x{p.picture.height}", justify="right")

    def row(name: str, show: Callable[[int], str], value: Callable[[Cost], int]) -> None:
        pairs = [(value(p.pruned), value(p.unpruned)) for p in found.pictures]
        table.add_row(name, *(against(show, pruned, unpruned) for pruned, unpruned in pairs))

    tokens = [against(str, p.kept_tokens, p.visual_tokens) for p in found.pictures]
    table.add_row("visual tokens", *tokens)
    row("vision FLOPs", tera, lambda cost: cost.flops["vision"])
    row("prefix FLOPs", tera, lambda cost: cost.flops["prefix"])
    row("decoder FLOPs", tera, lambda cost: cost.flops["decoder"])
    row("all FLOPs", tera, lambda cost: sum(cost.flops.values()))
    row("KV cache", decimal, lambda cost: cost.cache_bytes)
    row("peak activations", decimal, lambda cost: max(cost.activation_bytes.values()))
    table.add_row("weights", *(decimal(found.weight_bytes) for _ in found.pictures))
    return table


def against(show: Callable[[int], str], pruned: int, unpruned: int) -> str:
    """One value, or two values and their difference."""
    if pruned == unpruned:
        return show(pruned)
    return f"{show(pruned)} of {show(unpruned)}\n{pruned / unpruned - 1:.0%}"


def tera(flops: int) -> str:
    """FLOPs with a unit."""
    return f"{flops / 1e12:.2f} T" if flops >= 1e10 else f"{flops / 1e6:.2f} M"


def device_table(found: Estimate) -> Table:
    """Which devices have enough memory for the model."""
    table = Table(title=f"needs {decimal(found.memory_bytes)}: weights, largest cache and activations")
    for heading in ("memory", "fits", "does not fit"):
        table.add_column(heading)
    fits = found.fits()
    for kind in ("Jetson", "GPU"):
        by_answer: dict[bool, list[str]] = {True: [], False: []}
        for name, answer in fits.items():
            if name.startswith(kind):
                by_answer[answer].append(name.removeprefix(f"{kind} "))
        table.add_row(kind, ", ".join(by_answer[True]), ", ".join(by_answer[False]))
    return table
