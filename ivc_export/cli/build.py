"""ivc-build: builds TensorRT engines of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ivc_export import __version__
from ivc_export.cli import Parser, make_console
from ivc_export.cli.bundles import add_bundle_argument, given_bundle
from ivc_export.dtypes import FLOATS, long_name
from ivc_export.errors import UserError
from ivc_export.tensorrt.build import build
from ivc_export.tensorrt.loading import MODULES
from ivc_export.tensorrt.recipe import RTX_CAPABILITIES, AttentionChoice, EngineRecipe, SoftmaxChoice


def parser() -> Parser:
    """The command's options."""
    p = Parser(prog="ivc-build", description="Build TensorRT engines from a bundle.")
    add_bundle_argument(p)
    p.add_argument(
        "--target", choices=tuple(MODULES), default="tensorrt", help="TensorRT or TensorRT-RTX (default: tensorrt)"
    )
    p.add_argument(
        "--compute-capability", help=f"of the target GPU, for --target tensorrt-rtx: {', '.join(RTX_CAPABILITIES)}"
    )
    p.add_argument(
        "--dtype",
        type=long_name,
        choices=tuple(FLOATS),
        help="precision of the engines (default: the bundle's, if TensorRT and the GPU have it)",
    )
    p.add_argument("--max-visual", type=int, help="maximum visual tokens of a prompt (default: the bundle's)")
    p.add_argument("--max-text", type=int, default=512, help="maximum text tokens of a prompt (default: 512)")
    p.add_argument("--max-new", type=int, default=512, help="maximum tokens of all answers together (default: 512)")
    p.add_argument("--opt-visual", type=int, help="visual tokens to tune for (default: half of --max-visual)")
    p.add_argument("--opt-text", type=int, help="text tokens to tune for (default: 64)")
    p.add_argument(
        "--plugin", type=Path, metavar="LIB", help="libivc_plugin.so to use (default: none, only standard operators)"
    )
    p.add_argument(
        "--softmax",
        choices=get_args(SoftmaxChoice),
        help="precision of the vision encoder's softmax (default: float16 in float16 engines, where TensorRT fuses it, "
        "else float32)",
    )
    p.add_argument(
        "--attention",
        choices=get_args(AttentionChoice),
        default="auto",
        help="attention of decoder layers that no single operator computes: grouped decodes faster, repeated prefills "
        "faster and takes less memory (default: auto, which is grouped if it fits)",
    )
    p.add_argument(
        "--memory", type=float, metavar="GIB", help="memory that engines may take (default: all of this machine's)"
    )
    p.add_argument(
        "--workspace",
        type=float,
        metavar="GIB",
        help="maximum scratch memory (workspace) of a layer (default: TensorRT's)",
    )
    p.add_argument(
        "--optimization-level", type=int, default=3, help="0 to 5: how long the builder searches (default: 3)"
    )
    p.add_argument(
        "--timing-cache", type=Path, metavar="FOLDER", help="folder that keeps timings, so that later builds are faster"
    )
    p.add_argument(
        "--tactic-sources", metavar="A,B", help="tactics to try, such as CUBLAS,JIT_CONVOLUTIONS (default: TensorRT's)"
    )
    p.add_argument("--verbose", action="store_true", help="print TensorRT's own messages")
    p.add_argument("--force", action="store_true", help="build even if memory seems too small")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def command(arguments: Sequence[str]) -> int:
    """Build, show progress, and print the result."""
    options = parser().parse_args(arguments)
    bundle = given_bundle(options)
    most = bundle.manifest.max_visual if options.max_visual is None else options.max_visual
    recipe = EngineRecipe(
        target=options.target,
        compute_capability=options.compute_capability,
        dtype=options.dtype,
        max_visual=most,
        max_text=options.max_text,
        max_new=options.max_new,
        opt_visual=max(1, most // 2) if options.opt_visual is None else options.opt_visual,
        opt_text=min(64, options.max_text) if options.opt_text is None else options.opt_text,
        plugin=options.plugin,
        softmax=options.softmax,
        attention=options.attention,
        memory=gib_to_bytes("memory", options.memory),
        workspace=gib_to_bytes("workspace", options.workspace),
        optimization_level=options.optimization_level,
        timing_cache=options.timing_cache,
        tactic_sources=None if options.tactic_sources is None else tuple(options.tactic_sources.split(",")),
    )
    console = make_console()
    columns = (TextColumn("{task.description:40.40}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(name: str, phase: str, done: int, total: int) -> None:
            task = f"{name}: {phase}"
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
            bars.update(tasks[task], completed=done, total=total, visible=done < total)

        folder, memory = build(bundle, recipe, progress, options.force, options.verbose, console.print)
    size = decimal(sum(plan.stat().st_size for plan in folder.glob("*.plan")))
    console.print(f"[bold]{folder}[/]: {size} of engines, KV caches of {recipe.capacity} tokens")
    largest = max(memory.activations.values())
    console.print(
        f"running them takes about {decimal(memory.running)}: {decimal(memory.weights)} of weights, "
        f"{decimal(memory.caches)} of KV caches, and at most {decimal(largest)} of activations"
    )
    return 0


def gib_to_bytes(name: str, gib: float | None) -> int | None:
    """GiB in bytes. None stays None.

    Raises:
        UserError: it is too large, or too small.
    """
    if gib is None:
        return None
    if not 0 < gib <= 1024:  # false for nan as well
        raise UserError(f"{name} {gib:g} is out of range: give GiB above 0 and up to 1024")
    return int(gib * 2**30)
