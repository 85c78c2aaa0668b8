"""ivc-export: a model to a bundle."""

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
    p = Parser(prog=prog, description="Export a vision-language model with IVC-Prune inside.")
    p.add_argument("--model", help="checkpoint folder, hub id (owner/name) or alias (qwen2-vl-2b)")
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
    p.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the bundle to this repository; without --model, the one that is at --output",
    )
    p.add_argument("--private", action="store_true", help="make the repository private, where there is none yet")
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


PUSHING = ("output", "push_to_hub", "private", "json", "quiet")
"""Options that a bundle is uploaded by which is there already."""


def command(arguments: Sequence[str], prog: str = "ivc-export") -> int:
    """Export, with progress, and say what came of it; or only say what would. Upload the bundle where asked to."""
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
    for note in bundle.notes if options.quiet else notes:  # describe has said the bundle's own
        make_console().print(note, style="yellow", markup=False)
    return 0


def check_options(p: Parser, options: argparse.Namespace) -> None:
    """Refuse what cannot go together.

    Raises:
        UserError: an option is missing, or has no meaning beside another.
    """
    if options.model is None:
        if options.output is None or options.push_to_hub is None:
            p.error("the following arguments are required: --model")
        given = [name for name, value in vars(options).items() if value != p.get_default(name) and name not in PUSHING]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} is for an export, and without --model there is none: give --model as "
                "well, or leave it out"
            )
    if options.picture and not options.dry_run:
        raise UserError("--picture is for --dry-run: add that, or leave --picture out")
    if options.push_to_hub and options.dry_run:
        raise UserError("--dry-run writes nothing: leave out --push-to-hub")
    if options.private and not options.push_to_hub:
        raise UserError("--private is for --push-to-hub: add that, or leave --private out")


def given_recipe(options: argparse.Namespace) -> ExportRecipe:
    """What is to be exported.

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


UNLICENSED = "the base model's licence is not known, and the card names none: add it there"
