"""ivc-calibrate: finds the layer at which to prune."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ivc_export import __version__
from ivc_export.cli import Parser, check_output, make_console
from ivc_export.cli.methods import SCORED_HELP, add_method_options, given_method
from ivc_export.contract.calibration import ENOUGH, Calibration, shortfall, verdict
from ivc_export.contract.manifest import Scored
from ivc_export.contract.ratio import check_ratio
from ivc_export.errors import UserError
from ivc_export.selection.method import IVC_PRUNE


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="ivc-calibrate",
        description="Try selection layers and ratios on pictures and prompts, and propose a layer.",
    )
    p.add_argument("--model", required=True, help="checkpoint folder, hub id (owner/name) or alias (qwen2-vl-2b)")
    p.add_argument(
        "--data", type=Path, metavar="FOLDER", help="pictures and prompts.json (default: a small set that is included)"
    )
    p.add_argument(
        "--ratio",
        type=float,
        action="append",
        help="fraction of visual tokens kept; may be repeated, and the first decides the layer (default: 0.5)",
    )
    p.add_argument(
        "--layer",
        type=int,
        action="append",
        help="layer to try; may be repeated (default: all, or 12 of a large model)",
    )
    p.add_argument("--tokens", type=int, default=16, help="maximum tokens of an answer (default: 16)")
    p.add_argument(
        "--agreement", type=float, default=ENOUGH, help=f"fraction of answers that must not change (default: {ENOUGH})"
    )
    add_method_options(p, "default: ivc-prune")
    p.add_argument("--scored", choices=get_args(Scored), help=SCORED_HELP)
    p.add_argument(
        "--compare",
        choices=("proposed", "all", "none"),
        default="proposed",
        help="layers at which foreground and 5 draws of random are tried too (default: proposed)",
    )
    p.add_argument(
        "--output",
        type=Path,
        default=Path("calibration.json"),
        help="file to write, with a plot beside it as .png (default: calibration.json)",
    )
    p.add_argument("--force", action="store_true", help="replace an existing file")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def command(arguments: Sequence[str]) -> int:
    """Calibrate, and write the file and a plot."""
    options = parser().parse_args(arguments)
    ratios = [check_ratio(ratio) for ratio in options.ratio or [0.5]]
    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens} is out of range: give 1 or more")
    if not 0 <= options.agreement <= 1:  # false for nan as well
        raise UserError(f"--agreement {options.agreement} is out of range: give 0 to 1")
    method = given_method(options)
    check_output(options.output)
    plot = options.output.with_suffix(".png")
    if plot == options.output:
        raise UserError(f"{plot} is the plot's name: give the file another one, such as {plot.with_suffix('.json')}")
    check_output(plot)
    for path in (options.output, plot):
        if path.exists() and not options.force:
            raise UserError(f"{path} exists: name another file with --output, or replace it with --force")
    missing = [name for name in ("torch", "transformers", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ivc-calibrate needs {' and '.join(missing)}: install ivc-export[check]")
    from ivc_export.calibrate.sweep import calibrate, default_examples, read_examples
    from ivc_export.report.sweep import plot_calibration

    console = make_console()
    examples = read_examples(options.data or default_examples())
    columns = (TextColumn("layers and ratios"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        found = calibrate(
            options.model,
            examples,
            list(dict.fromkeys(ratios)),
            options.layer,
            options.tokens,
            options.agreement,
            lambda done, total: bars.update(task, completed=done, total=total),
            method or IVC_PRUNE,
            options.compare,
            options.scored,
        )
    options.output.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    plot_calibration(found, plot)
    tables = [table(found), rivals_table(found)] if found.rivals else [table(found)]
    make_console(stderr=False).print(*tables)
    console.print(
        f"layer {found.layer} is proposed at ratio {found.ratio:g}: to use it, export with --calibration "
        f"{options.output}"
    )
    for sentence in (shortfall(found, options.agreement), verdict(found)):
        if sentence:
            console.print(sentence, markup=False)
    return 0


def table(found: Calibration) -> Table:
    """The results, one line for each layer and ratio."""
    shown = Table(title=f"{found.answers} answers, pruned against unpruned")
    for heading in (
        "layer",
        "kept",
        "divergence, nats",
        "same answers",
        "overlap with the row above",
        "prefill saved",
    ):
        shown.add_column(heading, justify="right")
    for trial in found.trials:
        chosen = trial.layer == found.layer and trial.ratio == found.ratio
        shown.add_row(
            f"{trial.layer}",
            f"{trial.ratio:.0%}",
            f"{trial.divergence:.4f}",
            f"{trial.agreement:.1%}",
            "" if trial.overlap is None else f"{trial.overlap:.0%}",
            f"{trial.saved:.0%}",
            style="bold" if chosen else None,
        )
    return shown


def rivals_table(found: Calibration) -> Table:
    """The method beside others, one line for each layer and method."""
    shown = Table(title=f"selection methods, {found.ratio:.0%} kept, ± the standard deviation over draws")
    for heading in ("layer", "method", "divergence, nats", "same answers"):
        shown.add_column(heading, justify="right")
    for trial in found.trials:
        rivals = [rival for rival in found.rivals if (rival.layer, rival.ratio) == (trial.layer, trial.ratio)]
        if rivals:
            shown.add_row(f"{trial.layer}", found.method, f"{trial.divergence:.4f}", f"{trial.agreement:.1%}")
        for rival in rivals:
            if rival.draws > 1:
                divergence = f"{rival.divergence:.4f} ± {rival.divergence_spread:.4f}"
                agreement = f"{rival.agreement:.1%} ± {rival.agreement_spread:.1%}"
                shown.add_row(f"{rival.layer}", f"{rival.name}, {rival.draws} draws", divergence, agreement)
            else:
                shown.add_row(f"{rival.layer}", rival.name, f"{rival.divergence:.4f}", f"{rival.agreement:.1%}")
    return shown
