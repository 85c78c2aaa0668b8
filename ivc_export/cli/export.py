"""ivc-export: makes a bundle of a model."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ivc_export import __version__
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import Parser, make_console
from ivc_export.cli.estimate import UNCALIBRATED, show_estimate
from ivc_export.cli.methods import SCORED_HELP
from ivc_export.contract.manifest import Scored
from ivc_export.contract.names import GRAPH_NAMES, PREPROCESSOR
from ivc_export.dtypes import long_name
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import PictureEstimate, Size, estimate_bundle, estimate_recipe
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.push import check_push, push
from ivc_export.exporter.recipe import GROUPS, Dtype, ExportRecipe, Placing, Quantisation, Rounded
from ivc_export.lowering import exported
from ivc_export.selection.method import exported_methods
from ivc_export.source import hub

PICTURES = (Size(448, 448), Size(1024, 768), Size(1920, 1080))
TYPICAL = Size(1024, 768)
KEEP = "keep"


def parser(prog: str = "ivc-export") -> Parser:
    """The command's options."""
    p = Parser(
        prog=prog, description="Export a vision-language model to ONNX graphs that prune visual tokens by IVC-Prune."
    )
    p.add_argument("--model", help="checkpoint folder, hub id (owner/name) or alias (qwen2-vl-2b)")
    p.add_argument("--revision", help="branch, tag or commit on the hub (default: its main branch)")
    p.add_argument("--output", type=Path, help="bundle folder (default: the model's name with -ivc)")
    p.add_argument(
        "--ratio", type=float, help="fraction of visual tokens that runs keep by default (default: the family's)"
    )
    p.add_argument("--layer", type=int, help="first layer that runs without the pruned tokens (default: the family's)")
    p.add_argument("--calibration", type=Path, metavar="FILE", help="use the layer that ivc-calibrate proposed")
    p.add_argument(
        "--method",
        choices=exported_methods(),
        default="ivc-prune",
        help="how visual tokens are selected; fastv: by the last token's attention (default: ivc-prune, whose bundles "
        "also run with foreground and random)",
    )
    p.add_argument("--scored", choices=get_args(Scored), help=SCORED_HELP)
    p.add_argument("--max-visual", type=int, default=1280, help="maximum visual tokens of a picture (default: 1280)")
    p.add_argument(
        "--dtype",
        type=long_name,
        choices=get_args(Dtype),
        default="checkpoint",
        help="precision of weights and graphs (default: the checkpoint's; runtimes cast it if they need to)",
    )
    p.add_argument(
        "--weight-format",
        choices=get_args(Rounded),
        help="quantise the decoder layers' weights, without calibration data",
    )
    p.add_argument(
        "--group-size",
        type=int,
        choices=GROUPS,
        metavar=f"{{{','.join(map(str, GROUPS))}}}",
        default=128,
        help="weights that share a scale (default: 128)",
    )
    p.add_argument("--asym", action="store_true", help="quantise decoder layers with zero points")
    for name, kinds, what in (
        (
            "lm-head",
            get_args(Rounded),
            "the weight of lm_head, or a copy of tied embeddings unless --embeddings quantises them too",
        ),
        ("embeddings", ("int8",), "the table of token embeddings"),
        ("vision", ("int8",), "the vision encoder's weights"),
    ):
        p.add_argument(f"--{name}", choices=(*kinds, KEEP), default=KEEP, help=f"quantise {what} (default: keep)")
    p.add_argument(
        "--weights",
        choices=get_args(Placing),
        default="copy",
        help="copy the weight files, or hard-link them, which is instant but shares them with the checkpoint (default: "
        "copy)",
    )
    p.add_argument(
        "--lowering",
        choices=exported(),
        default="portable",
        help="native: graphs of standard operators only (default: portable)",
    )
    p.add_argument(
        "--testdata", action="store_true", help="add inputs and outputs of every graph, to test a runtime with"
    )
    p.add_argument("--force", action="store_true", help="replace an existing bundle, but no other folder")
    p.add_argument(
        "--dry-run", action="store_true", help="print tokens, FLOPs and memory with and without pruning; write nothing"
    )
    p.add_argument(
        "--picture",
        metavar="WIDTHxHEIGHT",
        action="append",
        type=parse_size,
        help="picture size for --dry-run; may be repeated",
    )
    p.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the bundle to this repository; without --model, the existing bundle at --output",
    )
    p.add_argument("--private", action="store_true", help="make a new repository private")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--quiet", action="store_true", help="print only errors, and warnings that concern answers")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def given_quantisation(options: argparse.Namespace) -> Quantisation:
    """Which weights are rounded.

    Raises:
        UserError: there are zero points without a format that has them.
    """
    if options.asym and not options.weight_format:
        raise UserError("--asym works only with quantised decoder layers: give --weight-format int4 or int8 as well")
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1024x768")
    return Size(int(match[1]), int(match[2]))


PUSHING = ("output", "push_to_hub", "private", "json", "quiet")
"""Options that are allowed when an existing bundle is uploaded."""


def command(arguments: Sequence[str], prog: str = "ivc-export") -> int:
    """Export, show progress, and print the result; or only estimate it. Upload the bundle if that is wanted."""
    p = parser(prog)
    options = p.parse_args(arguments)
    check_options(p, options)
    console = make_console(quiet=options.quiet or options.json)
    if console.quiet:
        hub.silence()
    recipe = None if options.model is None else given_recipe(options)
    if recipe and options.dry_run:
        found = estimate_recipe(recipe, options.picture or PICTURES)
        if options.json:
            print(json.dumps(found.to_dict()))
        elif not options.quiet:
            show_estimate(found, make_console(stderr=False))
        return 0
    if options.push_to_hub:
        check_push(options.push_to_hub, options.private)
    start = time.perf_counter()
    with progress_bars(console) as progress:
        bundle = export(recipe, progress) if recipe else Bundle.load(options.output)
    seconds = time.perf_counter() - start
    if not console.quiet:
        describe(bundle, console)
    pushed = push(bundle, options.push_to_hub, options.private) if options.push_to_hub else None
    notes = [] if pushed is None or pushed.licensed else [UNLICENSED]
    if options.json:
        record = export_record(bundle, seconds)
        record["warnings"] += notes
        print(json.dumps(record | ({"pushed": {**asdict(pushed)}} if pushed else {})))
        return 0
    if pushed:
        console.print(f"uploaded to {pushed.url}", markup=False)
    for note in bundle.notes if options.quiet else notes:  # describe has printed the bundle's own
        make_console().print(note, style="yellow", markup=False)
    return 0


def check_options(p: Parser, options: argparse.Namespace) -> None:
    """Check that options go together.

    Raises:
        UserError: an option is missing, or has no meaning beside another.
    """
    if options.model is None:
        if options.output is None or options.push_to_hub is None:
            p.error("the following arguments are required: --model")
        given = [name for name, value in vars(options).items() if value != p.get_default(name) and name not in PUSHING]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} works only with --model: give --model as well, or leave it out"
            )
    if options.picture and not options.dry_run:
        raise UserError("--picture works only with --dry-run: add --dry-run, or leave --picture out")
    if options.push_to_hub and options.dry_run:
        raise UserError("--dry-run writes nothing: leave out --push-to-hub")
    if options.private and not options.push_to_hub:
        raise UserError("--private works only with --push-to-hub: add --push-to-hub, or leave --private out")


def given_recipe(options: argparse.Namespace) -> ExportRecipe:
    """The recipe of the export.

    Raises:
        UserError: see ExportRecipe.
    """
    return ExportRecipe(
        model=options.model,
        output=options.output or Path(f"{Path(options.model).resolve().name}-ivc"),
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


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each stage, from its first report on, because the hub's own bars come before."""
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
    """The object that --json prints after an export."""
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
    """Print what was written, and remarks for the user."""
    m = bundle.manifest
    size = decimal(sum(file.size for file in m.weights))
    console.print(f"[bold]{escape(str(bundle.folder))}[/]: {m.family}, {m.dtype}, {size} of weights")
    found = estimate_bundle(bundle, [TYPICAL])
    console.print(
        f"layers below {m.selection_layer} of {m.decoder.layers} process every token; {saving(found.pictures[0])}"
    )
    if m.selection.method != "ivc-prune":
        console.print(f"this bundle selects tokens by {m.selection.method} only")
    for layer in m.selection.whole_layers:
        console.print(f"the cache of layer {layer} keeps every visual token, as in the official code")
    for warning in warnings(bundle):
        console.print(warning, style="yellow", markup=False)


def saving(p: PictureEstimate) -> str:
    """What pruning saves for one picture, in words."""
    return (
        f"the others keep {p.kept_tokens} of the {p.visual_tokens} visual tokens of a "
        f"{p.picture.width}x{p.picture.height} picture, which saves {p.saved_cache:.0%} of the KV cache and "
        f"{p.saved('prefix', 'decoder'):.0%} of the language model's prefill ({p.saved(*GRAPH_NAMES):.0%} with the "
        "vision encoder, where nothing is pruned)"
    )


def warnings(bundle: Bundle) -> list[str]:
    """What is missing or uncertain, one sentence each."""
    m = bundle.manifest
    found = [*bundle.notes]
    if not m.calibrated:
        found.append(UNCALIBRATED)
    missing = bundle.missing_processor_files()
    if missing:
        found.append(
            f"the checkpoint has no {' and no '.join(missing)}: ivc-run cannot use this bundle; the graphs and "
            "ivc-check work"
        )
    if not (bundle.folder / PREPROCESSOR).is_file():
        found.append(f"the checkpoint has no {PREPROCESSOR}: pictures are scaled by the family's own settings")
    if not m.tokens.stop:
        found.append("the checkpoint names no end-of-sequence token: answers end at the token limit")
    return found


UNLICENSED = "the base model's licence is not known: add it to the model card"
