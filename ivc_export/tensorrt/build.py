"""TensorRT engines of a bundle: profiles, an estimate of memory, the build, and how stale engines are found."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import onnx_ir as ir
from pydantic import ConfigDict, Field, ValidationError
from rich.filesize import decimal

from ivc_export import __version__, contract
from ivc_export.bundle import staging
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract import GRAPH_NAMES, MOST_VISUAL, FloatName, Frozen, GraphName
from ivc_export.errors import UserError
from ivc_export.files import check_regular, confined, read_bytes, read_object
from ivc_export.graph.counting import count
from ivc_export.lowering import lower
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.lowering.precision.scale_residuals import SCALE, ScaleResidualsPass
from ivc_export.lowering.precision.widen_residuals import WidenResidualsPass
from ivc_export.tensorrt.library import (
    Extents,
    Options,
    Target,
    compile_graph,
    load_plugin,
    load_tensorrt,
    major,
    own_capability,
)
from ivc_export.tensorrt.memory import available_bytes

FOLDER = "engines"
RECORD = "build.json"
MOST_PLUGIN_BYTES = 1 << 30
SMALLEST_SCALE = 2.0**-16
"""Of a residual stream: below it embeddings would no longer be normal numbers of float16."""
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

Progress = Callable[[str, str, int, int], None]
"""Called with the graph's name, a phase of its build, and how many of how many steps are done."""


@dataclass(frozen=True)
class EngineRecipe:
    """How engines are built.

    compute_capability: of the GPU that they are for, as "8.6"; None takes this machine's, which TensorRT requires.
    dtype: None takes the bundle's, but float16 instead of bfloat16 for TensorRT before 10 and GPUs before 8.0.
    max_visual, max_text, max_new: visual tokens, other tokens of a prompt, and tokens of all answers, at most.
    opt_visual, opt_text: those that a prefill is tuned for.
    plugin: our plugin's library; None builds the `native` graphs.
    workspace: bytes that a layer may use; None leaves it to TensorRT.
    timing_cache: a folder of a file for each graph, read and written, so that a second build is short.
    tactic_sources: names of trt.TacticSource that may serve; None leaves it to TensorRT.

    Raises:
        UserError: a number is out of range.
    """

    target: Target = "tensorrt"
    compute_capability: str | None = None
    dtype: FloatName | None = None
    max_visual: int = 1280
    max_text: int = 512
    max_new: int = 512
    opt_visual: int = 576
    opt_text: int = 64
    plugin: Path | None = None
    workspace: int | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None
    tactic_sources: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, least, value, most in (
            ("max-visual", 1, self.max_visual, MOST_VISUAL),
            ("max-text", 1, self.max_text, 1 << 20),
            ("max-new", 1, self.max_new, 1 << 20),
            ("opt-visual", 1, self.opt_visual, self.max_visual),
            ("opt-text", 1, self.opt_text, self.max_text),
            ("optimization-level", 0, self.optimization_level, 5),
            ("workspace", 1, 1 if self.workspace is None else self.workspace, 1 << 40),
        ):
            if not least <= value <= most:
                raise UserError(f"{name} {value} is out of range: give {least} to {most}")
        if self.target == "tensorrt-rtx":
            if self.plugin is not None:
                raise UserError("TensorRT-RTX has no plugins: leave --plugin out")
            if self.compute_capability not in RTX_CAPABILITIES:
                raise UserError(
                    f"TensorRT-RTX builds for a compute capability: give one of {', '.join(RTX_CAPABILITIES)} "
                    "with --compute-capability"
                )
        elif self.compute_capability is not None:
            raise UserError("TensorRT builds for this machine's GPU alone: leave --compute-capability out")

    @property
    def capacity(self) -> int:
        """Rows of the caches."""
        return self.max_visual + self.max_text + self.max_new

    def options(self, capability: str, dtype: FloatName, verbose: bool = False) -> Options:
        """How its graphs are compiled."""
        return Options(
            self.target,
            capability,
            self.workspace,
            self.optimization_level,
            self.timing_cache,
            self.tactic_sources,
            dtype != "float32",
            verbose,
        )


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class BuiltEngine(Frozen):
    """One engine: its file, that file's size, and its profiles in their order."""

    model_config = ConfigDict(strict=True)

    file: str
    bytes: int = Field(gt=0)
    profiles: tuple[str, ...]


class EngineRecord(Frozen):
    """build.json: what engines were built from, and how.

    residual_scale: of the residual stream and of hidden_states between the engines. weights_sha256: of each weight
    file, where the manifest had it by then. plugin_sha256: of the library whose operators the engines call.
    """

    model_config = ConfigDict(strict=True)

    ivc_export: str
    target: Target
    tensorrt: str = Field(pattern=r"^[\w.+-]{1,64}$")
    compute_capability: str = Field(pattern=r"^\d{1,2}\.\d$")
    dtype: FloatName
    graphs: Literal["native", "plugin"]
    capacity: int
    residual_scale: float
    recipe: EngineRecipe
    inputs_sha256: Sha256
    weights_sha256: dict[str, str | None]
    plugin_sha256: Sha256 | None
    engines: dict[GraphName, BuiltEngine]

    def contradictions(self) -> Iterator[str]:
        """What cannot be true of engines that ivc-build made: each field for itself may be right."""
        recipe, plugin = self.recipe, self.graphs == "plugin"
        if self.capacity != recipe.capacity:
            yield f"capacity is {self.capacity}, and the recipe's maxima give {recipe.capacity}"
        if self.target != recipe.target or recipe.compute_capability not in (None, self.compute_capability):
            yield "the recipe is for another target"
        if recipe.dtype not in (None, self.dtype):
            yield f"dtype is {self.dtype}, and the recipe's {recipe.dtype}"
        power = math.frexp(self.residual_scale)[0] == 0.5 and SMALLEST_SCALE <= self.residual_scale <= 1
        if not power or (self.dtype != "float16" and self.residual_scale != 1):
            yield f"residual_scale is {self.residual_scale:g}"
        if (recipe.plugin is not None, self.plugin_sha256 is not None) != (plugin, plugin):
            yield f"the graphs are {self.graphs}, and what it says of a plugin does not fit"
        for name in GRAPH_NAMES:
            engine = self.engines.get(name)
            if engine is None or (engine.file, engine.profiles) != (f"{name}.plan", profile_names(name)):
                yield f"engines.{name} is not as ivc-build makes it"


def profile_names(name: GraphName) -> tuple[str, ...]:
    """A graph's optimization profiles, in their order."""
    return ("prefill",) if name == "vision" else ("prefill", "decode")


def profiles(bundle: Bundle, name: GraphName, recipe: EngineRecipe) -> dict[str, Extents]:
    """A graph's optimization profiles: `prefill`, over caches of any length, and `decode`, over full buffers.

    Vision has `prefill` alone. Minima, optima and maxima each fit together, so that S = L + T.
    """
    m = bundle.manifest
    visual, text = recipe.opt_visual, recipe.opt_text
    most, longest, capacity = recipe.max_visual, recipe.max_text, recipe.capacity
    frame = m.graphs["vision"].outputs[0].shape[1]  # tokens of a frame: a number where frames are of one size
    frames = (1, max(1, visual // frame), max(1, most // frame)) if isinstance(frame, int) else (1, 1, 1)
    patches = getattr(m.preprocessing, "merge_size", 1) ** 2  # of a visual token, where pictures are cut into patches
    prefill: Extents = {
        "B": frames,
        "patches": (patches, patches * visual, patches * most),
        "visual": (1, visual, most),
        "L": (1, visual, most),
        "H": (1, visual, most),
        "T": (0, text, longest),
        "S": (1, visual + text, most + longest),
        "Q": (1, max(1, text // 2), longest),
        "M": (1, max(1, visual // 2) + text, most + longest),
        "P": (0, 0, capacity),
        "W": (0, 0, capacity),
        "R": (1, 1, 1),
        "keep_count": (1, max(1, visual // 2), most),
    }
    decode: Extents = dict.fromkeys(prefill, (1, 1, 1)) | {"T": (0, 0, 0)}
    decode |= dict.fromkeys(("P", "W"), (capacity, capacity, capacity))
    return {kind: {"prefill": prefill, "decode": decode}[kind] for kind in profile_names(name)}


@dataclass(frozen=True)
class Estimate:
    """Bytes that engines take when they run, and that their build takes."""

    weights: int
    caches: int
    activations: dict[GraphName, int]

    @property
    def running(self) -> int:
        """Weights, caches, and the largest graph's activations."""
        return self.weights + self.caches + max(self.activations.values())

    @property
    def building(self) -> int:
        """TensorRT holds the weights as the graph's and as the engine's while it builds."""
        return 2 * self.weights + max(self.activations.values())


def estimate(bundle: Bundle, recipe: EngineRecipe, models: Mapping[GraphName, ir.Model]) -> Estimate:
    """Estimate memory from the graphs themselves, at the profiles' maxima."""
    m = bundle.manifest
    activations = {}
    dtype = contract.FLOATS[recipe.dtype or m.dtype]
    for name, model in models.items():
        largest = {axis: extents[2] for axis, extents in profiles(bundle, name, recipe)["prefill"].items()}
        activations[name] = count(ir.to_proto(model), largest).peak_bytes
    weights = {
        value.name: int(value.const_value.nbytes)
        for model in models.values()
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }
    rows = 2 * m.decoder.layers * recipe.capacity * m.decoder.kv_heads * m.decoder.head_dim
    return Estimate(sum(weights.values()), int(rows * dtype.itemsize), activations)


def check_memory(found: Estimate, recipe: EngineRecipe) -> None:
    """Refuse before it starts a build that this machine has no memory for.

    Raises:
        UserError: it has not.
    """
    free = available_bytes()
    if free is not None and found.building > free:
        largest = max(found.activations, key=lambda name: found.activations[name])
        raise UserError(
            f"the build needs about {decimal(found.building)} and {decimal(free)} are free: close programs or add "
            f"swap, use --dtype fp16, or lower --max-visual {recipe.max_visual} (the {largest} graph takes "
            f"{decimal(found.activations[largest])}); --force builds anyway"
        )


def build_dtype(bundle: Bundle, recipe: EngineRecipe, trt: Any, capability: str) -> FloatName:
    """The dtype to build in.

    Raises:
        UserError: this TensorRT or this GPU has no bfloat16.
    """
    old = (recipe.target == "tensorrt" and major(trt) < 10) or float(capability) < 8.0
    if recipe.dtype == "bfloat16" and old:
        raise UserError("bfloat16 needs TensorRT 10 and a GPU of compute capability 8.0: use --dtype fp16")
    if recipe.dtype is not None:
        return recipe.dtype
    dtype: FloatName = bundle.manifest.dtype
    return "float16" if dtype == "bfloat16" and old else dtype


def lowered(bundle: Bundle, name: GraphName, dtype: FloatName, plugin: bool) -> ir.Model:
    """A graph as TensorRT gets it."""
    return lower(typed(bundle, name, dtype), "plugin" if plugin else "native")


def typed(bundle: Bundle, name: GraphName, dtype: FloatName) -> ir.Model:
    """A graph in `dtype`, in float16 with residual sums in float32 and in scale, before it is lowered.

    In scale, since TensorRT 8.6 holds them in float16 whatever it is told.
    """
    model = bundle.graph(name)
    if dtype != bundle.manifest.dtype:
        model = RetypeFloatsPass(dtype)(model).model
    if dtype == "float16":
        model = WidenResidualsPass()(ScaleResidualsPass()(model).model).model
    return model


def engine_folder(bundle: Bundle, trt: Any, target: Target, capability: str) -> Path:
    """Where engines of this TensorRT for this GPU lie.

    Raises:
        UserError: a link leads out of the bundle.
    """
    prefix = "rtx-" if target == "tensorrt-rtx" else ""
    name = f"{FOLDER}/{prefix}{trt.__version__}-sm{capability.replace('.', '')}"
    return confined(bundle.folder, name, "remove the link, and build the engines with ivc-build")


def residual_scale(dtype: FloatName) -> float:
    """Of the residual stream of graphs in `dtype`, as `typed` makes them."""
    return SCALE if dtype == "float16" else 1.0


def fingerprint(bundle: Bundle) -> str:
    """SHA-256 of what engines are built from: graphs, weights by their sizes and headers, and this program's version.

    Not of what `ivc-check --weights` may add to a manifest, which changes no engine; see weights_sha256.
    """
    digest = hashlib.sha256(__version__.encode())
    for name in GRAPH_NAMES:
        digest.update((bundle.folder / bundle.manifest.graphs[name].file).read_bytes())
    for weights in bundle.manifest.weights:
        digest.update(f"{weights.file} {weights.size} {weights.header_sha256}".encode())
    return digest.hexdigest()


def weights_sha256(bundle: Bundle) -> dict[str, str | None]:
    """SHA-256 of each weight file, None where the manifest does not have it."""
    return {weights.file: weights.sha256 for weights in bundle.manifest.weights}


def plugin_sha256(plugin: Path) -> str:
    """SHA-256 of a plugin's library.

    Raises:
        UserError: it cannot be read.
    """
    return hashlib.sha256(read_bytes(plugin, "name our plugin's library", MOST_PLUGIN_BYTES)).hexdigest()


def make_record(bundle: Bundle, recipe: EngineRecipe, trt: Any, capability: str, dtype: FloatName) -> EngineRecord:
    """What build.json is to say of engines that are still to be built.

    Raises:
        UserError: the plugin's library cannot be read.
    """
    paths = {name: path.resolve() for name in ("plugin", "timing_cache") if (path := getattr(recipe, name)) is not None}
    return EngineRecord(
        ivc_export=__version__,
        target=recipe.target,
        tensorrt=trt.__version__,
        compute_capability=capability,
        dtype=dtype,
        graphs="native" if recipe.plugin is None else "plugin",
        capacity=recipe.capacity,
        residual_scale=residual_scale(dtype),
        recipe=replace(recipe, **paths),
        inputs_sha256=fingerprint(bundle),
        weights_sha256=weights_sha256(bundle),
        plugin_sha256=None if recipe.plugin is None else plugin_sha256(recipe.plugin),
        engines={},
    )


def build(
    bundle: Bundle,
    recipe: EngineRecipe,
    progress: Progress = lambda *_: None,
    force: bool = False,
    verbose: bool = False,
) -> tuple[Path, Estimate]:
    """Build the three engines, and return their folder and the estimate. Nothing is visible until all are there.

    force: build also where memory seems too small. verbose: TensorRT's own messages go to standard error.

    Raises:
        UserError: TensorRT is missing or refuses a graph, the plugin does not load, timing caches cannot be written, or
            memory or max_visual is too small.
    """
    check_takes_a_picture(bundle, recipe)
    trt = load_tensorrt(recipe.target)
    bundle.check_portable("an engine")
    if recipe.plugin is not None:
        load_plugin(recipe.plugin)
    if recipe.timing_cache is not None:
        check_timing_cache(recipe.timing_cache)
    capability = recipe.compute_capability or own_capability(trt)
    dtype = build_dtype(bundle, recipe, trt, capability)
    models = {name: lowered(bundle, name, dtype, recipe.plugin is not None) for name in GRAPH_NAMES}
    estimated = estimate(bundle, recipe, models)
    if not force:
        check_memory(estimated, recipe)
    folder = engine_folder(bundle, trt, recipe.target, capability)
    record = make_record(bundle, recipe, trt, capability, dtype)
    built: dict[GraphName, BuiltEngine] = {}
    with working_folder(bundle) as work:
        (work / "done").mkdir()
        for name in GRAPH_NAMES:
            plan = compile_graph(
                trt,
                models.pop(name),
                profiles(bundle, name, recipe).values(),
                recipe.options(capability, dtype, verbose),
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


def check_takes_a_picture(bundle: Bundle, recipe: EngineRecipe) -> None:
    """Refuse, before anything is built, engines that could take no picture of the bundle's.

    Raises:
        UserError: every picture has more visual tokens.
    """
    least = bundle.manifest.preprocessing.least_visual
    if recipe.max_visual < least:
        raise UserError(
            f"max-visual {recipe.max_visual} is too small: a picture gives this model at least {least} visual tokens"
        )


def check_timing_cache(folder: Path) -> None:
    """Make the folder of timing caches, and refuse it before the build, whose end writes there.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"timing caches cannot be written to {folder} ({error.strerror}): name another folder"
        ) from error


@contextmanager
def working_folder(bundle: Bundle) -> Iterator[Path]:
    """A folder within the bundle that vanishes, from where a graph's weights are found as from the bundle.

    Those of builds that were killed, most often for lack of memory, vanish here, too.
    """
    staging.remove_abandoned(bundle.folder.glob(f"{staging.WORK}*"))
    with staging.fresh_folder(bundle.folder, staging.WORK) as work:
        for weights in {Path(file.file).parts[0] for file in bundle.manifest.weights}:
            (work / weights).symlink_to(f"../{weights}", target_is_directory=True)
        yield work


@dataclass(frozen=True)
class Engines:
    """Engines for this TensorRT and GPU. mend: the command that builds them anew."""

    folder: Path
    record: EngineRecord
    mend: str

    def path(self, name: GraphName) -> Path:
        """The file of one of them."""
        return self.folder / self.record.engines[name].file

    def check_plugin(self, plugin: Path | None) -> None:
        """Check that `plugin` is the library that these engines call, which nothing but the caller may name.

        Raises:
            UserError: it is not, or there is none, or they call none.
        """
        wanted = self.record.plugin_sha256
        if wanted is None:
            if plugin is not None:
                raise UserError(f"the engines in {self.folder} call no plugin: leave --plugin out")
        elif plugin is None:
            raise UserError(
                f"the engines in {self.folder} call our plugin: name its library, libivc_plugin.so, with --plugin"
            )
        elif plugin_sha256(plugin) != wanted:
            raise UserError(
                f"{plugin} is not the plugin that the engines in {self.folder} were built with (its SHA-256 is "
                f"another): name that one with --plugin, or {self.mend}"
            )


def find_engines(bundle: Bundle, target: Target, capability: str, trt: Any) -> Engines:
    """The engines for this TensorRT and GPU.

    Raises:
        UserError: there are none, or they are others' or older than the bundle; with the command that builds them.
    """
    folder = engine_folder(bundle, trt, target, capability)
    command = ["ivc-build", str(bundle.folder), "--target", target]
    if target == "tensorrt-rtx":
        command += ["--compute-capability", capability]
    mend = f"build them with {shlex.join(command)}"
    if not (folder / RECORD).is_file():
        others = sorted(path.parent.name for path in (bundle.folder / FOLDER).glob(f"*/{RECORD}"))
        found = f"; there are {', '.join(others)}" if others else ""
        raise UserError(f"{bundle.folder} has no engines for {folder.name}{found}: {mend}")
    record = read_record(confined(folder, RECORD, mend), mend)
    for engine in record.engines.values():
        path = confined(folder, engine.file, mend)
        if check_regular(path, mend) != engine.bytes:
            raise UserError(f"{path} is damaged (it has not the size that {RECORD} says): {mend}")
    if (record.target, record.tensorrt, record.compute_capability) != (target, trt.__version__, capability):
        raise UserError(
            f"the engines in {folder} are of TensorRT {record.tensorrt} for sm{record.compute_capability}: {mend}"
        )
    then, now = record.weights_sha256, weights_sha256(bundle)
    known = {file for file in {*then, *now} if then.get(file) and now.get(file)}
    if record.inputs_sha256 != fingerprint(bundle) or any(then[file] != now[file] for file in known):
        raise UserError(f"the engines in {folder} were built from other graphs or weights: {mend}")
    return Engines(folder, record, mend)


def read_record(path: Path, mend: str) -> EngineRecord:
    """What build.json says, if it says what ivc-build does.

    Raises:
        UserError: it is damaged, or another version's; with `mend`.
    """
    content = read_object(path, mend)
    try:
        record = EngineRecord.model_validate_json(json.dumps(content))  # as JSON, where lists stand for tuples
    except (ValidationError, UserError) as error:
        raise UserError(f"{path} cannot be used ({contract.first_problem(error)}): {mend}") from error
    for contradiction in record.contradictions():
        raise UserError(f"{path} cannot be used ({contradiction}): {mend}")
    return record
