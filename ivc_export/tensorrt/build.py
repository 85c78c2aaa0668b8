"""Builds the engines of a bundle. It checks everything first, and puts engines in place when all are complete."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ivc_export.bundle import staging
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.errors import UserError
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.decide import decide
from ivc_export.tensorrt.footprint import Footprint, check_memory
from ivc_export.tensorrt.graphs import choose_graphs, lowered
from ivc_export.tensorrt.loading import load_plugin, load_tensorrt, own_capability
from ivc_export.tensorrt.profiles import profile_names, profiles
from ivc_export.tensorrt.recipe import EngineRecipe
from ivc_export.tensorrt.store import RECORD, BuiltEngine, engine_folder, make_record

LEAST_FOR_PLUGIN = 8.0
"""The least compute capability for the plugin's attention."""

BuildProgress = Callable[[str, str, int, int], None]
"""Called with the graph's name, a phase of its build, how many steps are done, and how many there are."""


def build(
    bundle: Bundle,
    recipe: EngineRecipe,
    progress: BuildProgress = lambda *_: None,
    force: bool = False,
    verbose: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Path, Footprint]:
    """Build the three engines, and return their folder and the memory estimate. The folder appears only when all are
    complete.

    force: build even if memory seems too small. verbose: TensorRT's own messages go to standard error. tell: called
    before the build with sentences that say which softmax and attention are built, and what they cost.

    Raises:
        UserError: TensorRT is missing or refuses a graph, the plugin cannot be loaded or the GPU is too old for it,
            timing caches cannot be written, memory or max_visual is too small, or the model has experts.
    """
    bundle.check_portable("an engine")
    check_no_experts(bundle)
    check_takes_a_picture(bundle, recipe)
    trt = load_tensorrt(recipe.target)
    if recipe.plugin is not None:
        load_plugin(recipe.plugin)
    if recipe.timing_cache is not None:
        check_timing_cache(recipe.timing_cache)
    capability = recipe.compute_capability or own_capability(trt)
    if recipe.plugin is not None and float(capability) < LEAST_FOR_PLUGIN:
        raise UserError(
            f"the plugin's kernels need a GPU of compute capability {LEAST_FOR_PLUGIN}, but this GPU has "
            f"{capability}: leave out --plugin"
        )
    choices, estimated, sentences = decide(bundle, recipe, choose_graphs(bundle, recipe, trt, capability))
    if not force:
        check_memory(estimated, recipe)
    for sentence in sentences:
        tell(sentence)
    models = {name: lowered(bundle, name, choices) for name in GRAPH_NAMES}
    folder = engine_folder(bundle, trt, recipe.target, capability)
    record = make_record(bundle, recipe, trt, capability, choices)
    built: dict[GraphName, BuiltEngine] = {}
    with working_folder(bundle) as work:
        (work / "done").mkdir()
        for name in GRAPH_NAMES:
            plan = compile_graph(
                trt,
                models.pop(name),
                profiles(bundle, name, recipe).values(),
                recipe.options(capability, choices.dtype, verbose),
                work,
                partial(progress, name),
            )
            (work / "done" / f"{name}.plan").write_bytes(plan)
            built[name] = BuiltEngine(file=f"{name}.plan", bytes=len(plan), profiles=profile_names(name))
        record = record.model_copy(update={"engines": built})
        (work / "done" / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        folder.parent.mkdir(exist_ok=True)
        staging.put_in_place(work / "done", folder, force=True)
    return folder, estimated


def check_no_experts(bundle: Bundle) -> None:
    """Refuse mixtures of experts. There is no kernel for them yet, so every expert of every layer would run for every
    token.

    Raises:
        UserError: a graph has one.
    """
    found = [name for name in GRAPH_NAMES if any(n.op_type == "MixtureOfExperts" for n in bundle.graph(name).graph)]
    if found:
        raise UserError(
            f"{' and '.join(found)} of this model have mixtures of experts, for which ivc-build cannot build "
            "engines yet: run the bundle on onnxruntime with ivc-run"
        )


def check_takes_a_picture(bundle: Bundle, recipe: EngineRecipe) -> None:
    """Check, before anything is built, that the engines can take at least the bundle's smallest picture.

    Raises:
        UserError: every picture has more visual tokens.
    """
    least = bundle.manifest.preprocessing.least_visual
    if recipe.max_visual < least:
        raise UserError(
            f"max-visual {recipe.max_visual} is too small: a picture gives this model at least {least} visual tokens"
        )


def check_timing_cache(folder: Path) -> None:
    """Make the folder of timing caches before the build, because the build writes to it only at its end.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"timing caches cannot be written to {folder} ({error.strerror}): name another folder with --timing-cache"
        ) from error


@contextmanager
def working_folder(bundle: Bundle) -> Iterator[Path]:
    """A temporary folder within the bundle. A graph's weights have the same relative paths from there as from the
    bundle.

    Folders of builds that were killed, most often for lack of memory, are removed too.
    """
    staging.remove_abandoned(bundle.folder.glob(f"{staging.WORK}*"))
    with staging.fresh_folder(bundle.folder, staging.WORK) as work:
        link_weights(bundle, work)
        yield work


def link_weights(bundle: Bundle, work: Path) -> None:
    """Link a graph's weights so that `work`, a folder within the bundle, has them at the same relative paths as the
    bundle."""
    for weights in {Path(file.file).parts[0] for file in bundle.manifest.weights}:
        (work / weights).symlink_to(f"../{weights}", target_is_directory=True)
