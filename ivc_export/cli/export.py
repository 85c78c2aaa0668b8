"""ivc-export: a model to a bundle."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ivc_export import __version__
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import Parser, make_console
from ivc_export.cli.methods import SCORED_HELP
from ivc_export.contract.manifest import Scored
from ivc_export.contract.names import GRAPH_NAMES, PREPROCESSOR
from ivc_export.dtypes import long_name
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import Cost, Estimate, PictureEstimate, Size, estimate_bundle, estimate_recipe
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import GROUPS, Dtype, ExportRecipe, Placing, Quantisation, Rounded
from ivc_export.lowering import exported
from ivc_export.selection.method import exported_methods
from ivc_export.source import hub

PICTURES = (Size(448, 448), Size(1024, 768), Size(1920, 1080))
TYPICAL = Size(1024, 768)
KEEP = "keep"


def parser(prog: str = "ivc-export") -> Parser:
    """The command's options."""
    p = Parser(prog=prog, description="Export a vision-language model with IVC-Prune inside.")
    p.add_argument("--model", required=True, help="checkpoint folder, hub id (owner/name) or alias (qwen2-vl-2b)")
    p.add_argument("--revision", help="branch, tag or commit on the hub (default: its main branch)")
    p.add_argument("--output", type=Path, help="bundle folder (default: the model's name with -ivc)")
    p.add_argument("--ratio", type=float, help="default fraction of visual tokens kept (default: the family's)")
    p.add_argument("--layer", type=int, help="layers below this one see every token (default: the family's)")
    p.add_argument("--calibration", type=Path, metavar="FILE", help="take the layer that ivc-calibrate found")
    p.add_argument(
        "--method",
        choices=exported_methods(),
        default="ivc-prune",
        help="how visual tokens are chosen; fastv: by what the last row attends to (default: ivc-prune, whose bundles "
        "take foreground and random at run time)",
    )
    p.add_argument("--scored", choices=get_args(Scored), help=SCORED_HELP)
    p.add_argument("--max-visual", type=int, default=1280, help="visual tokens a picture at most (default: 1280)")
    p.add_argument(
        "--dtype",
        type=long_name,
        choices=get_args(Dtype),
        default="checkpoint",
        help="of weights and graphs (default: the checkpoint's, which sessions and engines cast as they need)",
    )
    p.add_argument("--weight-format", choices=get_args(Rounded), help="round decoder layers' weights, without data")
    p.add_argument(
        "--group-size",
        type=int,
        choices=GROUPS,
        metavar=f"{{{','.join(map(str, GROUPS))}}}",
        default=128,
        help="values that share a scale (default: 128)",
    )
    p.add_argument("--asym", action="store_true", help="give groups of decoder layers zero points")
    for name, kinds, what in (
        (
            "lm-head",
            get_args(Rounded),
            "the weight of lm_head; of tied embeddings a copy, unless --embeddings has it too",
        ),
        ("embeddings", ("int8",), "the table of token embeddings"),
        ("vision", ("int8",), "the vision encoder's weights"),
    ):
        p.add_argument(f"--{name}", choices=(*kinds, KEEP), default=KEEP, help=f"round {what} (default: keep)")
    p.add_argument(
        "--weights",
        choices=get_args(Placing),
        default="copy",
        help="copy the weight files, or hard-link them: no time, no space, and shared with the checkpoint",
    )
    p.add_argument(
        "--lowering", choices=exported(), default="portable", help="native: graphs of standard operators only"
    )
    p.add_argument(
        "--testdata", action="store_true", help="add inputs and outputs of every graph, to test a runtime by"
    )
    p.add_argument("--force", action="store_true", help="replace an older bundle, and nothing else")
    p.add_argument("--dry-run", action="store_true", help="say what the export would buy, and write nothing")
    p.add_argument(
        "--picture", metavar="WIDTHxHEIGHT", action="append", type=parse_size, help="for --dry-run; may be repeated"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--quiet", action="store_true", help="print errors, and what changes answers")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def given_quantisation(options: argparse.Namespace) -> Quantisation:
    """What is rounded.

    Raises:
        UserError: zero points are asked for, and no format that has them.
    """
    if options.asym and not options.weight_format:
        raise UserError("--asym is for decoder layers that are rounded: give --weight-format int4 or int8 as well")
    return Quantisation(
        weights=options.weight_format,
        group_size=options.group_size,
        asymmetric=options.asym,
        lm_head=None if options.lm_head == KEEP else options.lm_head,
        embeddings=None if options.embeddings == KEEP else options.embeddings,
        vision=None if options.vision == KEEP else options.vision,
    )


def parse_size(text: str) -> Size:
    """A size such as 1024x768."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1024x768")
    return Size(int(match[1]), int(match[2]))


def command(arguments: Sequence[str], prog: str = "ivc-export") -> int:
    """Export, with progress, and say what came of it; or only say what would."""
    options = parser(prog).parse_args(arguments)
    if options.picture and not options.dry_run:
        raise UserError("--picture is for --dry-run: add that, or leave --picture out")
    output = options.output or Path(f"{Path(options.model).resolve().name}-ivc")
    recipe = ExportRecipe(
        model=options.model,
        output=output,
        ratio=options.ratio,
        layer=options.layer,
        max_visual=options.max_visual,
        force=options.force,
        revision=options.revision,
        dtype=options.dtype,
        weights=options.weights,
        lowering=options.lowering,
        testdata=options.testdata,
        calibration=options.calibration,
        method=options.method,
        scored=options.scored,
        quantisation=given_quantisation(options),
    )
    console = make_console(quiet=options.quiet or options.json)
    if console.quiet:
        hub.silence()
    if options.dry_run:
        found = estimate_recipe(recipe, options.picture or PICTURES)
        if options.json:
            print(json.dumps(found.to_dict()))
        elif not options.quiet:
            show_estimate(found, make_console(stderr=False))
        return 0
    start = time.perf_counter()
    with progress_bars(console) as progress:
        bundle = export(recipe, progress)
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps(export_record(bundle, seconds)))
    elif options.quiet:
        for note in bundle.notes:
            make_console().print(note, style="yellow", markup=False)
    else:
        describe(bundle, console)
    return 0


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage, from the first report on: the hub's own bars come before."""
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()
            tasks[stage] = bars.add_task(stage)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield progress
    finally:
        bars.stop()


def export_record(bundle: Bundle, seconds: float) -> dict[str, Any]:
    """What --json prints after an export."""
    m = bundle.manifest
    return {
        "bundle": str(bundle.folder),
        "family": m.family,
        "dtype": m.dtype,
        "lowering": m.lowering,
        "selection_layer": m.selection_layer,
        "layers": m.decoder.layers,
        "calibrated": m.calibrated,
        "method": m.selection.method,
        "ratio": m.default_ratio,
        "weight_bytes": sum(file.size for file in m.weights),
        "seconds": round(seconds, 3),
        "warnings": warnings(bundle),
        "estimate": estimate_bundle(bundle, [TYPICAL]).to_dict(),
    }


def describe(bundle: Bundle, console: Console) -> None:
    """What was written, and what the user should know about it."""
    m = bundle.manifest
    size = decimal(sum(file.size for file in m.weights))
    console.print(f"[bold]{escape(str(bundle.folder))}[/]: {m.family}, {m.dtype}, {size} of weights")
    found = estimate_bundle(bundle, [TYPICAL])
    console.print(
        f"layers below {m.selection_layer} of {m.decoder.layers} see every token; {saving(found.pictures[0])}"
    )
    if m.selection.method != "ivc-prune":
        console.print(f"they choose tokens by {m.selection.method}, and by nothing else")
    for layer in m.selection.whole_layers:
        console.print(f"the cache of layer {layer} keeps every visual token, as in the official code")
    for warning in warnings(bundle):
        console.print(warning, style="yellow", markup=False)


def saving(p: PictureEstimate) -> str:
    """What pruning saves for one picture, in words."""
    return (
        f"of a {p.picture.width}x{p.picture.height} picture's {p.visual_tokens} visual tokens the others keep "
        f"{p.kept_tokens}: {p.saved_cache:.0%} of the KV cache is saved, {p.saved('prefix', 'decoder'):.0%} of the "
        f"language model's prefill, {p.saved(*GRAPH_NAMES):.0%} with the vision encoder, in which nothing is"
    )


def warnings(bundle: Bundle) -> list[str]:
    """What is missing or unsure, a sentence each."""
    m = bundle.manifest
    found = [*bundle.notes]
    if not m.calibrated:
        found.append(UNCALIBRATED)
    missing = bundle.missing_processor_files()
    if missing:
        found.append(
            f"the checkpoint has no {' and no '.join(missing)}: ivc-run will not work; the graphs and ivc-check do"
        )
    if not (bundle.folder / PREPROCESSOR).is_file():
        found.append(f"the checkpoint has no {PREPROCESSOR}: pictures are scaled by the family's own settings")
    if not m.tokens.stop:
        found.append("the checkpoint names no end-of-sequence token: answers end at the token limit")
    return found


UNCALIBRATED = "this layer is not calibrated: nobody has measured which one suits this model best"


def show_estimate(found: Estimate, console: Console) -> None:
    """The dry run's tables."""
    console.print(
        f"{found.family}, {found.dtype}: layers below {found.selection_layer} of {found.layers} see every token, the "
        f"others keep {found.ratio:.0%} of the visual ones, chosen by {found.method}; "
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
    """Tokens, FLOPs, cache and activations by picture, each against no pruning where that differs."""
    table = Table(title="one prefill, pruned of unpruned")
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
    """One value, or two and their difference."""
    if pruned == unpruned:
        return show(pruned)
    return f"{show(pruned)} of {show(unpruned)}\n{pruned / unpruned - 1:.0%}"


def tera(flops: int) -> str:
    """FLOPs with a unit."""
    return f"{flops / 1e12:.2f} T" if flops >= 1e10 else f"{flops / 1e6:.2f} M"


def device_table(found: Estimate) -> Table:
    """Which memories hold the model."""
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
