"""ivc-check: compares a bundle with PyTorch, or with a recorded run of PyTorch, and verifies its files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
from pydantic import Field, ValidationError
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ivc_export import __version__
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.integrity import verify_files
from ivc_export.bundle.recording import INDEX, Recording, identity
from ivc_export.cli import Parser, check_output, make_console
from ivc_export.cli.backends import add_backend_options, check_taken, given_libraries
from ivc_export.cli.bundles import add_bundle_argument, given_bundle
from ivc_export.cli.methods import add_method_options, given_method
from ivc_export.contract.records import Frozen, Seed, TokenId, first_problem
from ivc_export.dtypes import long_name
from ivc_export.errors import UserError
from ivc_export.files import confined, replace_text
from ivc_export.report.junit import junit
from ivc_export.runtime.backend import Backend
from ivc_export.runtime.backends import find_backend
from ivc_export.runtime.interface import Session, Step
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.processor import Processor, placed
from ivc_export.runtime.videos import MOST_FRAMES, Video
from ivc_export.selection.method import Method, find_method
from ivc_export.verify.baseline import ERRORS_FACTOR, compare_errors, read_errors
from ivc_export.verify.parity import ParityReport, compare, find_tolerances
from ivc_export.verify.testdata import draw_picture, make_prompt

REPORT, REFERENCE = "report", "report/reference"
PROMPT_OPTIONS = ("image", "video", "fps", "max_frames", "prompt", "ratio", "steps", "method", "method_seed")
STEPS = 8
UNMEASURED = (
    "these tolerances are derived from other backends: errors of a correct bundle on {backend} in {dtype} have not "
    "been measured yet"
)

Images = list[PIL.Image.Image | Video]


class StoredFacts(Frozen):
    """The facts in the index of a bundle's recorded run, besides its tensors."""

    format: int
    model: dict[str, Any]
    checkpoint: str
    ratio: float = Field(gt=0, le=1)
    method: str = "ivc-prune"
    method_seed: Seed | None = None
    prompt_tokens: tuple[TokenId, ...]
    drawn_tokens: tuple[TokenId, ...]
    versions: dict[str, str]
    pictures: tuple[str, ...]
    """Files; for videos, folders of their frames."""
    rates: dict[str, float] = Field(default_factory=dict)
    """Frames for each second, of each video."""


def parser() -> Parser:
    """The command's options."""
    p = Parser(prog="ivc-check", description="Compare a bundle with its checkpoint on PyTorch, and verify its files.")
    add_bundle_argument(p)
    p.add_argument(
        "--against",
        type=Path,
        metavar="CHECKPOINT",
        help="compare with this checkpoint, from which the bundle was exported",
    )
    p.add_argument(
        "--onnx-only",
        action="store_true",
        help="compare with the run that --against stored in the bundle, without PyTorch",
    )
    p.add_argument(
        "--weights", action="store_true", help="verify the SHA-256 of graphs and weight files, and add missing ones"
    )
    p.add_argument("--image", type=Path, action="append", help="a picture; may be repeated (default: a generated one)")
    p.add_argument(
        "--video", type=Path, action="append", metavar="FILE|FOLDER", help="a video, or a folder of its frames"
    )
    p.add_argument(
        "--fps", type=float, help="frames to take per second, or the rate of a folder's frames (default: the model's)"
    )
    p.add_argument("--max-frames", type=int, help="maximum frames to take of a video (default: the model's)")
    p.add_argument("--prompt", help="the question (default: one about the generated picture)")
    p.add_argument("--ratio", type=float, help="fraction of visual tokens kept (default: the bundle's)")
    add_method_options(p, "default: the bundle's")
    p.add_argument("--steps", type=int, help=f"decode steps to compare (default: {STEPS})")
    p.add_argument(
        "--precision",
        type=long_name,
        choices=("float32", "float16"),
        help="precision of onnxruntime-cpu; float16 shows the errors of a float16 bundle (default: float32)",
    )
    add_backend_options(p, levels=False)  # tolerances are of float32
    p.add_argument("--junit", type=Path, metavar="FILE", help="also write the comparisons as JUnit XML")
    p.add_argument("--baseline", type=Path, metavar="FILE", help="an earlier parity.json: exit with 1 if an error grew")
    p.add_argument(
        "--baseline-factor",
        type=float,
        metavar="X",
        help=f"for --baseline: an error grew if it is X times as large (default: {ERRORS_FACTOR:g})",
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def command(arguments: Sequence[str]) -> int:
    """Check, print a table, write report/parity.json and parity.html. Returns 1 if anything is out of tolerance, or
    grew."""
    options = parser().parse_args(arguments)
    check_options(options)
    bundle, console = given_bundle(options), make_console(stderr=False)
    find_method(bundle.manifest.selection, given_method(options))  # raises UserError before any work
    baseline = None
    if options.baseline:
        baseline = read_errors(options.baseline, options.baseline_factor)
        baseline.check_same({"model": identity(bundle.manifest)})
    if options.weights:
        bundle = verify(bundle, console)
    if not options.against and not options.onnx_only:
        return 0
    check_report(bundle)
    backend, more = find_backend(options.backend), opening(options)
    backend.check(bundle, **more)
    with make_console().status("checking") as status:
        # GPU errors come before the checkpoint runs; on a CPU both would need memory at once
        early = open_for_check(bundle, backend, more) if backend.device == "cuda" else None
        reference, images = stored(bundle) if options.onnx_only else record_reference(bundle, options, status.update)
        session = early or open_for_check(bundle, backend, more)
        report, step = compare(session, reference, images, status.update)
        changes = compare_errors(baseline, report) if baseline else None
        status.update("writing the report")
        page = write_report(bundle, report, step, images)
    told = changes.sentences(baseline) if baseline and changes else {}
    passed = report.passed and not (changes and changes.grown)
    if options.junit:
        replace_text(options.junit, junit(report, {name: told[name] for name in changes.grown} if changes else {}))
    console.print(table(report))
    for sentence in told.values():
        console.print(sentence, markup=False)
    console.print(f"{'passed' if passed else 'FAILED'}; the report is {page}", markup=False)
    if not backend.tolerances[report.dtype].measured:
        console.print(UNMEASURED.format(backend=report.backend, dtype=report.dtype), markup=False)
    if page.suffix != ".html":
        console.print("for report/parity.html, with plots, install matplotlib", markup=False)
    return 0 if passed else 1


def opening(options: argparse.Namespace) -> dict[str, Any]:
    """Options with which the session is opened.

    Raises:
        UserError: an option belongs to another backend.
    """
    found = given_libraries(options, [options.backend])
    if options.precision:
        check_taken("--precision", "dtype", [options.backend])
        found["dtype"] = options.precision
    return found


def open_for_check(bundle: Bundle, backend: Backend, more: Mapping[str, Any]) -> Session:
    """A session whose steps have every tensor between the graphs.

    Raises:
        UserError: it cannot be opened, or its precision is not known.
    """
    session = (backend.open_shown or backend.open)(bundle, **backend.exact, **more)
    find_tolerances(session)
    return session


def check_options(options: argparse.Namespace) -> None:
    """Check, before any work, that options go together.

    Raises:
        UserError: there is nothing to do, an option has no meaning beside another, or torch is missing.
    """
    opening(options)
    given_method(options)
    for path, option in ((options.junit, "--junit"), (options.baseline, "--baseline")):
        if path and not options.against and not options.onnx_only:
            raise UserError(f"{option} is for a comparison: use it with --against CHECKPOINT or --onnx-only")
    if options.baseline_factor is not None and not options.baseline:
        raise UserError("--baseline-factor needs a report to compare with: give it with --baseline")
    if (options.fps is not None or options.max_frames is not None) and not options.video and not options.onnx_only:
        raise UserError("--fps and --max-frames are for a video: give one with --video")
    if options.junit:
        check_output(options.junit)
        if options.baseline and options.junit.resolve() == options.baseline.resolve():
            raise UserError(f"--junit and --baseline both name {options.junit}: give two different files")
    if options.onnx_only:
        given = [
            f"--{name.replace('_', '-')}" for name in ("against", *PROMPT_OPTIONS) if getattr(options, name) is not None
        ]
        if given:
            raise UserError(f"--onnx-only repeats the stored run unchanged: leave out {' and '.join(given)}")
    elif options.against:
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"ivc-check --against needs {' and '.join(missing)}: install ivc-export[check], "
                "or use --onnx-only on a bundle that was checked on another machine"
            )
    elif not options.weights:
        raise UserError("there is nothing to check: give --against CHECKPOINT, --onnx-only or --weights")


def check_report(bundle: Bundle) -> None:
    """Check, before any work, that a report can be written within the bundle.

    Raises:
        UserError: it cannot.
    """
    for folder in (bundle.folder / REPORT, bundle.folder / REFERENCE):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UserError(f"the report cannot be written to {folder}, which is a link or a file: remove it")
    folder = bundle.folder / REPORT
    if not os.access(folder if folder.exists() else bundle.folder, os.W_OK):
        raise UserError(
            f"the report cannot be written to {folder}: check its permissions, or run ivc-check on a copy of the bundle"
        )


def verify(bundle: Bundle, console: Console) -> Bundle:
    """Verify the graphs and weight files, show progress, and print the result."""
    m = bundle.manifest
    lacking = [graph.file for graph in m.graphs.values() if graph.sha256 is None]
    lacking += [file.file for file in m.weights if file.sha256 is None]
    total = sum((bundle.folder / file).stat().st_size for file in bundle.files)
    columns = (TextColumn("sha256"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    errors = make_console()
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("sha256", total=total)
        bundle = verify_files(bundle, lambda done, total: bar.update(task, completed=done, total=total))
    found = f"sha256 added to the manifest for {', '.join(lacking)}" if lacking else "sha256 as in the manifest"
    files = len(m.weights)
    console.print(
        f"{files} weight file{'s' if files > 1 else ''} and 3 graphs, {decimal(total)}: {found}", markup=False
    )
    return bundle


def record_reference(
    bundle: Bundle, options: argparse.Namespace, progress: Callable[[str], None]
) -> tuple[Recording, Images]:
    """Run the checkpoint on PyTorch, and record the run in the bundle, for machines without torch."""
    from ivc_export.verify.oracle import record

    with TemporaryDirectory() as scratch:
        videos = [Video(path, options.fps, options.max_frames) for path in options.video or []]
        tokens, images = question(bundle, options.prompt, options.image or [], videos, Path(scratch))
        ratio = bundle.manifest.default_ratio if options.ratio is None else options.ratio
        steps = STEPS if options.steps is None else options.steps
        recording = record(bundle, options.against, tokens, images, ratio, steps, progress, given_method(options))
        folder = bundle.folder / REFERENCE
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        names, rates = list[str](), dict[str, float]()
        for number, image in enumerate(images):
            if isinstance(image, Video):
                names.append(f"video-{number}")
                rates[names[-1]] = float(image.fps or 0)
                shutil.copytree(image.path, folder / names[-1])
            else:
                names.append(f"picture-{number}.png")
                image.save(folder / names[-1])
    recording = Recording({**recording.facts, "pictures": names, "rates": rates}, recording.tensors)
    recording.write(folder)
    return recording, reopened(folder, names, rates)


def reopened(folder: Path, names: Sequence[str], rates: Mapping[str, float]) -> Images:
    """Pictures and videos of a run recorded in a bundle. All frames of a video are used."""
    advice = "run ivc-check --against again"
    paths = {name: confined(folder, name, advice) for name in names}
    return [
        Video(path, rates[name], max_frames=MOST_FRAMES) if name in rates else open_picture(path)
        for name, path in paths.items()
    ]


def stored(bundle: Bundle) -> tuple[Recording, Images]:
    """The run that `recorded` left in the bundle.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = bundle.folder / REFERENCE
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder} holds no stored run: run ivc-check --against on a machine with PyTorch, then copy the bundle "
            "here"
        )
    advice = "run ivc-check --against again"
    recording = Recording.read(folder)
    try:
        facts = StoredFacts.model_validate(dict(recording.facts))
    except ValidationError as error:
        raise UserError(f"{folder / INDEX} is damaged ({first_problem(error)}): {advice}") from error
    return recording, reopened(folder, facts.pictures, facts.rates)


def question(
    bundle: Bundle, text: str | None, images: Sequence[Path], videos: Sequence[Video], scratch: Path
) -> tuple[list[int], Images]:
    """The user's prompt, or one about a drawn picture, as token ids, and pictures and videos in their order.

    scratch: a folder for the frames that are taken from videos. The check uses them from there.

    Raises:
        UserError: there are pictures without a question, or the bundle has no tokenizer.
    """
    if text is None:
        if images or videos:
            raise UserError("there is a picture but no question: give one with --prompt")
        image = draw_picture()
        return make_prompt(bundle, image)[1], [image]
    processor = Processor(bundle)
    opened: Images = [open_picture(image, partial(make_console().print, markup=False)) for image in images]
    opened += [frozen(processor, video, scratch / f"video-{number}") for number, video in enumerate(videos)]
    order = [part for part in placed(text, opened) if not isinstance(part, str)]
    return processor.question(text, [visual for part in order for visual in processor.look(part)[1]]), order


def frozen(processor: Processor, video: Video, folder: Path) -> Video:
    """The frames that are taken from a video, in a folder of their own."""
    look, _ = processor.video(video)
    folder.mkdir()
    for number, frame in enumerate(video.open().frames(look.frames)):
        frame.save(folder / f"{number:06}.png")
    return Video(folder, look.rate, max_frames=MOST_FRAMES)


def panels(bundle: Bundle, images: Images) -> list[PIL.Image.Image]:
    """Pictures, and of videos the first frame of each temporal patch."""
    deep, found = getattr(bundle.manifest.preprocessing, "temporal_patch_size", 1), list[PIL.Image.Image]()
    for image in images:
        if isinstance(image, Video):
            footage = image.open()
            found += footage.frames(range(0, footage.total, deep))
        else:
            found.append(image)
    return found


def write_report(bundle: Bundle, report: ParityReport, step: Step, images: Images) -> Path:
    """Write parity.json, and parity.html if matplotlib is installed. Returns the page if there is one, else
    parity.json."""
    path = bundle.folder / REPORT / "parity.json"
    path.parent.mkdir(exist_ok=True)
    replace_text(path, json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    page = path.with_suffix(".html")
    page.unlink(missing_ok=True)
    if importlib.util.find_spec("matplotlib") is None:
        return path
    from ivc_export.report.page import parity_page

    replace_text(page, parity_page(bundle, report, step, panels(bundle, images)))
    return page


def table(report: ParityReport) -> Table:
    """The comparisons as a table."""
    kept = f"{report.kept_tokens} of {report.visual_tokens} visual tokens kept"
    by = "" if report.method == "ivc-prune" else f", {Method(report.method, report.method_seed or 0)}"
    found = Table(title=f"{report.backend}, {report.dtype}, against PyTorch, float32, ratio {report.ratio}{by}: {kept}")
    for heading, side in (("tensor", "left"), ("error", "right"), ("tolerance", "right"), ("", "left")):
        found.add_column(heading, justify=side)  # type: ignore[arg-type]
    for c in report.comparisons:
        error, tolerance = (f"{x:.1e}" if x is not None else "" for x in (c.error, c.tolerance))
        verdict = "[green]ok[/]" if c.passed else "[red]FAILED[/]"
        found.add_row(c.name, error, tolerance, f"{verdict} {c.note}".strip())
    return found
