"""ivc-check: a bundle against PyTorch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ivc_export import __version__
from ivc_export.bundle import Bundle
from ivc_export.cli import Parser, make_console
from ivc_export.errors import UserError
from ivc_export.families import Picture
from ivc_export.runtime.processor import Processor, user_message

if TYPE_CHECKING:
    from ivc_export.parity import ParityReport


def parser() -> Parser:
    """The command's options."""
    p = Parser(prog="ivc-check", description="Compare a bundle with its checkpoint on PyTorch.")
    p.add_argument("bundle", type=Path, help="folder that ivc-export wrote")
    p.add_argument("--against", type=Path, required=True, help="the checkpoint folder that was exported")
    p.add_argument("--image", type=Path, action="append", default=[], help="a picture (default: a random one)")
    p.add_argument("--prompt", help="a question (default: random tokens)")
    p.add_argument("--ratio", type=float, help="fraction of visual tokens kept (default: the bundle's)")
    p.add_argument("--steps", type=int, default=8, help="decode steps to compare (default: 8)")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def command(arguments: Sequence[str] | None) -> int:
    """Check, print a table, write report/parity.json; 1 if anything is out of tolerance."""
    options = parser().parse_args(arguments)
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ivc-check needs {' and '.join(missing)}: install ivc-export[check], its extra with both")
    from ivc_export.parity import check

    bundle = Bundle.load(options.bundle)
    prompt = own_prompt(bundle, options.prompt, options.image)
    console = make_console(stderr=False)
    with make_console().status("checking") as status:
        report = check(bundle, options.against, prompt, options.ratio, options.steps, status.update)
    console.print(table(report))
    path = bundle.folder / "report" / "parity.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"{'passed' if report.passed else 'FAILED'}; the report is {path}", markup=False)
    return 0 if report.passed else 1


def own_prompt(bundle: Bundle, text: str | None, images: Sequence[Path]) -> tuple[list[int], list[Picture]] | None:
    """The user's prompt as token ids and pictures, or None if there is none.

    Raises:
        UserError: pictures without a question, or a bundle without tokenizer.
    """
    if text is None:
        if images:
            raise UserError("there is a picture and no question: give one with --prompt")
        return None
    processor = Processor(bundle)
    pictures = [processor.picture(image) for image in images]
    return processor.encode(processor.render([user_message(text, len(images))]), pictures), pictures


def table(report: ParityReport) -> Table:
    """The comparisons as a table."""
    kept = f"{report.kept_tokens} of {report.visual_tokens} visual tokens kept"
    found = Table(title=f"{report.backend} against PyTorch, float32, ratio {report.ratio}: {kept}")
    for heading, side in (("tensor", "left"), ("error", "right"), ("tolerance", "right"), ("", "left")):
        found.add_column(heading, justify=side)  # type: ignore[arg-type]
    for c in report.comparisons:
        error, tolerance = (f"{x:.1e}" if x is not None else "" for x in (c.error, c.tolerance))
        verdict = "[green]ok[/]" if c.passed else "[red]FAILED[/]"
        found.add_row(c.name, error, tolerance, f"{verdict} {c.note}".strip())
    return found
