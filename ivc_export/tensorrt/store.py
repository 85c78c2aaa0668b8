"""The folder of engines in a bundle: its build.json, and how outdated engines are found."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from ivc_export import __version__
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.contract.records import Frozen, Sha256, first_problem
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.files import check_regular, confined, read_bytes, read_object
from ivc_export.tensorrt.graphs import (
    DecoderAttention,
    EngineChoices,
    EngineGraphs,
    attentions,
    packed_weights,
    residual_scale,
)
from ivc_export.tensorrt.loading import Target
from ivc_export.tensorrt.profiles import profile_names
from ivc_export.tensorrt.recipe import EngineRecipe

FOLDER = "engines"
RECORD = "build.json"
MOST_PLUGIN_BYTES = 1 << 30
SMALLEST_SCALE = 2.0**-16
"""The smallest scale of a residual stream. Below it, embeddings would no longer be normal numbers of float16."""


class BuiltEngine(Frozen):
    """One engine: its file, that file's size, and its profiles in their order."""

    model_config = ConfigDict(strict=True)

    file: str
    bytes: int = Field(gt=0)
    profiles: tuple[str, ...]


class EngineRecord(Frozen):
    """build.json: from what engines were built, and how.

    residual_scale: of the residual stream and of hidden_states between the engines. weights_sha256: of each weight
    file, if the manifest had it at the time. plugin_sha256: of the library whose operators the engines call. graphs:
    the lowering. softmax: dtype of the vision encoder's. attention: the kind of attention of decoder layers.
    packed_weights: what packed layers of the bundle became, by how they are packed.
    """

    model_config = ConfigDict(strict=True)

    ivc_export: str
    target: Target
    tensorrt: str = Field(pattern=r"^[\w.+-]{1,64}$")
    compute_capability: str = Field(pattern=r"^\d{1,2}\.\d$")
    dtype: FloatName
    graphs: EngineGraphs
    softmax: FloatName
    attention: DecoderAttention
    packed_weights: dict[str, str]
    capacity: int
    residual_scale: float
    recipe: EngineRecipe
    inputs_sha256: Sha256
    weights_sha256: dict[str, str | None]
    plugin_sha256: Sha256 | None
    engines: dict[GraphName, BuiltEngine]

    def contradictions(self) -> Iterator[str]:
        """Contradictions between fields, each of which may be correct alone."""
        recipe, plugin = self.recipe, self.graphs == "plugin"
        if self.capacity != recipe.capacity:
            yield f"capacity is {self.capacity}, but the recipe's maxima give {recipe.capacity}"
        if self.target != recipe.target or recipe.compute_capability not in (None, self.compute_capability):
            yield "the recipe is for another target"
        if recipe.dtype not in (None, self.dtype):
            yield f"dtype is {self.dtype}, but the recipe has {recipe.dtype}"
        possible = ("float16", "float32") if self.dtype == "float16" else ("float32",)
        if self.softmax not in possible or recipe.softmax not in (None, self.softmax):
            yield f"softmax is {self.softmax}"
        if self.attention not in attentions(self.graphs) or recipe.attention not in ("auto", self.attention):
            yield f"attention is {self.attention}"
        if not {*self.packed_weights.values()} <= {"int4", self.dtype}:
            yield f"packed_weights is {self.packed_weights}"
        power = math.frexp(self.residual_scale)[0] == 0.5 and SMALLEST_SCALE <= self.residual_scale <= 1
        if not power or (self.dtype != "float16" and self.residual_scale != 1):
            yield f"residual_scale is {self.residual_scale:g}"
        if (recipe.plugin is not None, self.plugin_sha256 is not None) != (plugin, plugin):
            yield f"the graphs are {self.graphs}, but plugin and plugin_sha256 do not fit them"
        for name in GRAPH_NAMES:
            engine = self.engines.get(name)
            if engine is None or (engine.file, engine.profiles) != (f"{name}.plan", profile_names(name)):
                yield f"engines.{name} is not what ivc-build makes"


def engine_folder(bundle: Bundle, trt: Any, target: Target, capability: str) -> Path:
    """The folder for engines of this TensorRT and this GPU.

    Raises:
        UserError: a link leads out of the bundle.
    """
    prefix = "rtx-" if target == "tensorrt-rtx" else ""
    name = f"{FOLDER}/{prefix}{trt.__version__}-sm{capability.replace('.', '')}"
    return confined(bundle.folder, name, "remove the link, and build the engines with ivc-build")


def fingerprint(bundle: Bundle) -> str:
    """SHA-256 of everything that engines are built from: graphs, weights by their sizes and headers, and this program's
    version.

    It does not cover hashes that `ivc-check --weights` may add to a manifest, which change no engine; see
    weights_sha256.
    """
    digest = hashlib.sha256(__version__.encode())
    for name in GRAPH_NAMES:
        digest.update((bundle.folder / bundle.manifest.graphs[name].file).read_bytes())
    for weights in bundle.manifest.weights:
        digest.update(f"{weights.file} {weights.size} {weights.header_sha256}".encode())
    return digest.hexdigest()


def weights_sha256(bundle: Bundle) -> dict[str, str | None]:
    """SHA-256 of each weight file. None if the manifest does not have it."""
    return {weights.file: weights.sha256 for weights in bundle.manifest.weights}


def plugin_sha256(plugin: Path) -> str:
    """SHA-256 of a plugin's library.

    Raises:
        UserError: it cannot be read.
    """
    return hashlib.sha256(
        read_bytes(plugin, "give the path of the plugin, libivc_plugin.so", MOST_PLUGIN_BYTES)
    ).hexdigest()


def make_record(
    bundle: Bundle, recipe: EngineRecipe, trt: Any, capability: str, choices: EngineChoices
) -> EngineRecord:
    """The content of build.json for engines that will be built.

    Raises:
        UserError: the plugin's library cannot be read.
    """
    paths = {name: path.resolve() for name in ("plugin", "timing_cache") if (path := getattr(recipe, name)) is not None}
    return EngineRecord(
        ivc_export=__version__,
        target=recipe.target,
        tensorrt=trt.__version__,
        compute_capability=capability,
        dtype=choices.dtype,
        graphs=choices.graphs,
        softmax=choices.softmax,
        attention=choices.attention,
        packed_weights=packed_weights(bundle, choices.graphs, choices.dtype),
        capacity=recipe.capacity,
        residual_scale=residual_scale(choices.dtype),
        recipe=replace(recipe, **paths),
        inputs_sha256=fingerprint(bundle),
        weights_sha256=weights_sha256(bundle),
        plugin_sha256=None if recipe.plugin is None else plugin_sha256(recipe.plugin),
        engines={},
    )


@dataclass(frozen=True)
class Engines:
    """Engines for this TensorRT and GPU. mend: the command that builds them again."""

    folder: Path
    record: EngineRecord
    mend: str

    def path(self, name: GraphName) -> Path:
        """The file of one of them."""
        return self.folder / self.record.engines[name].file

    def check_plugin(self, plugin: Path | None) -> None:
        """Check that `plugin` is the library that these engines call. Only the caller may name a library.

        Raises:
            UserError: it is another library, it is missing, or they call none.
        """
        wanted = self.record.plugin_sha256
        if wanted is None:
            if plugin is not None:
                raise UserError(f"the engines in {self.folder} use no plugin: leave out --plugin")
        elif plugin is None:
            raise UserError(
                f"the engines in {self.folder} use our plugin: give its library, libivc_plugin.so, with --plugin"
            )
        elif plugin_sha256(plugin) != wanted:
            raise UserError(
                f"{plugin} is not the plugin that the engines in {self.folder} were built with (its SHA-256 "
                f"differs): give that one with --plugin, or {self.mend}"
            )


def find_engines(bundle: Bundle, target: Target, capability: str, trt: Any) -> Engines:
    """Find the engines for this TensorRT and GPU.

    Raises:
        UserError: there are none, or they are for another TensorRT or GPU, or older than the bundle; with the command
            that builds them.
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
            raise UserError(f"{path} is damaged (its size differs from the size in {RECORD}): {mend}")
    if (record.target, record.tensorrt, record.compute_capability) != (target, trt.__version__, capability):
        raise UserError(
            f"the engines in {folder} are for TensorRT {record.tensorrt} and sm{record.compute_capability}: {mend}"
        )
    then, now = record.weights_sha256, weights_sha256(bundle)
    known = {file for file in {*then, *now} if then.get(file) and now.get(file)}
    if record.inputs_sha256 != fingerprint(bundle) or any(then[file] != now[file] for file in known):
        raise UserError(f"the engines in {folder} were built from other graphs or weights: {mend}")
    return Engines(folder, record, mend)


def read_record(path: Path, mend: str) -> EngineRecord:
    """Read build.json, and check that ivc-build can have written it.

    Raises:
        UserError: it is damaged, or of another version; with `mend`.
    """
    content = read_object(path, mend)
    try:
        record = EngineRecord.model_validate_json(json.dumps(content))  # as JSON, in which tuples are lists
    except (ValidationError, UserError) as error:
        raise UserError(f"{path} cannot be used ({first_problem(error)}): {mend}") from error
    for contradiction in record.contradictions():
        raise UserError(f"{path} cannot be used ({contradiction}): {mend}")
    return record
