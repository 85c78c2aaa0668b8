"""ivc-bench: times a bundle's stages in its runtimes, beside PyTorch and the limits of the device."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table

from ivc_export import __version__
from ivc_export.bench.baseline import TIMES_FACTOR, compare_times, read_times, report_facts
from ivc_export.bench.entrants import PEERS, Entrants, check_entrants, open_contestants, report
from ivc_export.bench.measure import Bench, BenchSettings, Row
from ivc_export.bench.posting import posted
from ivc_export.bench.prompts import Prompt, noise_prompt
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import Parser, check_output, make_console
from ivc_export.cli.backends import add_backend_options, given_libraries
from ivc_export.cli.bundles import add_bundle_argument, given_bundle
from ivc_export.errors import UserError
from ivc_export.runtime.backends import DEFAULT

VISUAL = (256,)
WIDTH = 200
"""Width of tables in files and pipes."""
LEGEND = (
    "in brackets: the roofline's time in percent of the measured one; memory: the peak so far, without mapped files"
)


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="ivc-bench",
        description="Time each stage of a bundle on random pictures, and compare with the roofline and PyTorch.",
    )
    add_bundle_argument(p)
    add_backend_options(p, several=True)
    p.add_argument("--against", type=Path, metavar="CHECKPOINT", help="also time this checkpoint in stock transformers")
    p.add_argument(
        "--peer",
        action="append",
        choices=PEERS,
        help="how PyTorch runs the checkpoint of --against; may be repeated (default: torch-eager)",
    )
    p.add_argument(
        "--ratio",
        type=float,
        action="append",
        help="fraction of visual tokens kept; may be repeated (default: the bundle's); 1 is always timed too",
    )
    p.add_argument(
        "--visual",
        type=int,
        action="append",
        help=f"approximate visual tokens of the picture; may be repeated (default: {VISUAL[0]})",
    )
    p.add_argument("--text", type=int, default=64, help="text tokens of the prompt (default: 64)")
    p.add_argument("--tokens", type=int, default=32, help="tokens to decode (default: 32)")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds, whose medians are printed (default: 5)")
    p.add_argument("--warmups", type=int, default=2, help="rounds before the timed ones (default: 2)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    p.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a file to publish: all figures and the engines' record, no paths",
    )
    p.add_argument("--plot", type=Path, metavar="PNG", help="write a chart of the stages")
    p.add_argument(
        "--baseline", type=Path, metavar="FILE", help="file of an earlier --json: exit with 1 if a time has grown since"
    )
    p.add_argument(
        "--baseline-factor",
        type=float,
        metavar="X",
        help=f"for --baseline: a time has grown if it is X times as long (default: {TIMES_FACTOR:g})",
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def command(arguments: Sequence[str]) -> int:
    """Measure, print a table for each picture, and write the files. Returns 1 if a time grew beyond the baseline's."""
    options = parser().parse_args(arguments)
    check_outputs(options)
    backends = tuple(dict.fromkeys(options.backend or [DEFAULT]))
    entrants = Entrants(
        backends=backends,
        peers=tuple(dict.fromkeys(options.peer or PEERS[:1])) if options.against else (),
        checkpoint=options.against,
        options=given_libraries(options, backends),
    )
    check_entrants(entrants)
    baseline = read_times(options.baseline, options.baseline_factor) if options.baseline else None
    bundle = given_bundle(options)
    ratios = tuple(options.ratio or [bundle.manifest.default_ratio])
    settings = BenchSettings(ratios, options.tokens, options.rounds, options.warmups)
    prompts = make_prompts(bundle, options.visual or VISUAL, options.text)
    errors, console = make_console(), make_console(stderr=False)
    rows: list[Row] = []
    with errors.status("reading the graphs") as status:
        bench = Bench(bundle, settings, status.update)
        contestants = open_contestants(bundle, entrants, status.update)
        command = shlex.join(["ivc-bench", *arguments])
        if baseline:
            baseline.check_same(report_facts(report(bench, contestants, rows, command)))
        for prompt in prompts:
            rows += bench.measure(contestants, prompt)
        content = report(bench, contestants, rows, command)
    if options.json:
        options.json.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if options.report:
        text = json.dumps(posted(content, bundle), indent=2, allow_nan=False)
        options.report.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        from ivc_export.report.stages import plot_stages

        plot_stages(rows, options.plot)
    if not console.is_terminal:
        console.width = WIDTH
    for prompt in prompts:
        console.print(table([row for row in rows if row.visual_tokens == prompt.visual]))
    console.print(LEGEND)
    for limit in content["ceilings"]:
        console.print(
            f"{limit['device']}: copies {limit['copy_gb_per_second']:g} GB/s, multiplies {limit['matmul_tflops']:g} "
            f"TFLOP/s in {limit['dtype']} ({limit['source']})"
        )
    changes = compare_times(baseline, rows) if baseline else None
    if baseline and changes:
        for sentence in changes.sentences(baseline, " ms").values():
            console.print(sentence, markup=False)
    return 1 if changes and changes.grown else 0


def check_outputs(options: argparse.Namespace) -> None:
    """Check, before any work, that files can be written and that options go together.

    Raises:
        UserError: they do not.
    """
    names: dict[Path, str] = {}
    for option in ("json", "report", "plot"):
        path = getattr(options, option)
        if path:
            check_output(path)
            other = names.setdefault(path.resolve(), option)
            if other != option:
                raise UserError(f"--{other} and --{option} both name {path}: give two different files")
    if options.plot and options.plot.suffix.lower() != ".png":
        raise UserError(f"{options.plot} does not end in .png: give it that ending")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: install ivc-export[check]")
    if options.baseline_factor is not None and not options.baseline:
        raise UserError("--baseline-factor needs figures to compare with: give their file with --baseline")
    if options.peer and not options.against:
        raise UserError("--peer needs the checkpoint that was exported: give it with --against")


def make_prompts(bundle: Bundle, sizes: Sequence[int], text: int) -> list[Prompt]:
    """A prompt for each size, smallest first. Two sizes that give the same picture make one."""
    prompts = [noise_prompt(bundle, visual, text) for visual in sizes]
    return list({prompt.visual: prompt for prompt in sorted(prompts, key=lambda prompt: prompt.visual)}.values())


def table(rows: Sequence[Row]) -> Table:
    """One picture's rows, a column each: times in milliseconds, and how much of the roofline they reach."""
    first = rows[0]
    found = Table(title=f"{first.visual_tokens} visual and {first.text_tokens} text tokens, milliseconds")
    found.add_column("", no_wrap=True)
    for row in rows:
        found.add_column(f"{row.side}\n{row.dtype}\n{row.ratio:.0%} kept", justify="right")

    def line(name: str, cell: Callable[[Row], str | None]) -> None:
        found.add_row(name, *(cell(row) or "" for row in rows))

    def stage(name: str) -> Callable[[Row], str | None]:
        return lambda row: f"{row.stages[name]:.2f}" if name in row.stages else None

    def share(row: Row, times: Sequence[str], part: str) -> str | None:
        if row.selection is None:
            return None
        return f"{sum(row.selection[name] for name in times):.2f} = {row.selection[part]:.1%}"

    line("vision", lambda row: f"{row.stages['vision']:.2f} ({row.roofline['vision']:.0%})")
    line("prefill", lambda row: f"{row.prefill:.2f} ({row.roofline['prefill']:.0%})")
    line("  prefix", stage("prefix"))
    line("  decoder", stage("decoder"))
    line("  select, compact", lambda row: share(row, ("select", "compact"), "share"))
    line("host", stage("host"))
    line("first token", lambda row: f"{row.first_token:.2f}")
    line("decode step", lambda row: f"{row.decode:.2f} ({row.roofline['decode']:.0%})")
    line("  select, compact", lambda row: share(row, ("decode",), "decode_share"))
    line("KV cache", lambda row: decimal(row.cache_bytes))
    line("  visual tokens", lambda row: decimal(row.visual_cache_bytes))
    line("host memory", lambda row: decimal(row.host_bytes))
    if any(row.device_bytes is not None for row in rows):
        line("GPU memory", lambda row: None if row.device_bytes is None else decimal(row.device_bytes))
    return found
