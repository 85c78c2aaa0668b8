"""ivc-export: a checkpoint folder to a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ivc_export import __version__
from ivc_export.bundle import PREPROCESSOR, Bundle
from ivc_export.cli import make_console
from ivc_export.contract import Manifest
from ivc_export.export import export
from ivc_export.recipe import ExportRecipe


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(prog="ivc-export", description="Export a vision-language model with IVC-Prune inside.")
    p.add_argument("--model", type=Path, required=True, help="checkpoint folder in Hugging Face's layout")
    p.add_argument("--output", type=Path, help="bundle folder (default: the model folder's name with -ivc)")
    p.add_argument("--ratio", type=float, default=0.5, help="default fraction of visual tokens kept (default: 0.5)")
    p.add_argument("--layer", type=int, help="layers below this one see every token (default: the family's)")
    p.add_argument("--max-visual", type=int, default=1280, help="visual tokens a picture at most (default: 1280)")
    p.add_argument(
        "--testdata", action="store_true", help="add inputs and outputs of every graph, to test a runtime by"
    )
    p.add_argument("--force", action="store_true", help="replace an older bundle")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def command(arguments: Sequence[str] | None) -> int:
    """Export, with progress, and say what came of it."""
    options = parser().parse_args(arguments)
    output = options.output or Path(f"{options.model.resolve().name}-ivc")
    recipe = ExportRecipe(
        options.model, output, options.ratio, options.layer, options.max_visual, options.force, options.testdata
    )
    console = make_console()
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        bundle = export(recipe, progress)
    describe(bundle, console)
    return 0


def describe(bundle: Bundle, console: Console) -> None:
    """What was written, and what the user should know about it."""
    m = bundle.manifest
    size = decimal(sum(file.size for file in m.weights))
    console.print(f"[bold]{escape(str(bundle.folder))}[/]: {m.family}, {m.dtype}, {size} of weights")
    console.print(
        f"layers below {m.selection_layer} of {m.decoder.layers} see every token, the others and every layer's cache "
        f"{m.default_ratio:.0%} of the visual ones: at most {saved_prefill(m):.0%} of the decoder's prefill is saved, "
        f"{1 - m.default_ratio:.0%} of the visual cache, and nothing in the vision encoder"
    )
    if not m.calibrated:
        console.print("[yellow]this layer is not calibrated[/]: nobody has measured which one suits this model best")
    missing = bundle.missing_processor_files()
    if missing:
        console.print(
            f"[yellow]the checkpoint has no {' and no '.join(missing)}[/]: ivc-run will not work; the graphs and "
            "ivc-check do"
        )
    if not (bundle.folder / PREPROCESSOR).is_file():
        console.print(
            f"[yellow]the checkpoint has no {PREPROCESSOR}[/]: pictures are scaled by the family's own settings"
        )
    if not m.tokens.stop:
        console.print("[yellow]the checkpoint names no end-of-sequence token[/]: answers end at the token limit")


def saved_prefill(m: Manifest) -> float:
    """The part of the decoder's prefill that pruning saves at most, where nearly all tokens are visual."""
    return (1 - m.default_ratio) * (m.decoder.layers - m.selection_layer) / m.decoder.layers
