"""Estimates from the graphs how much memory engines and their build take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from rich.filesize import decimal

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GraphName
from ivc_export.dtypes import FLOATS
from ivc_export.errors import UserError
from ivc_export.graph.counting import count
from ivc_export.tensorrt.graphs import EngineChoices
from ivc_export.tensorrt.loading import device_bytes
from ivc_export.tensorrt.memory import available_bytes
from ivc_export.tensorrt.profiles import profiles
from ivc_export.tensorrt.recipe import EngineRecipe


@dataclass(frozen=True)
class Footprint:
    """Bytes that engines take when they run, and bytes that their build takes."""

    weights: int
    caches: int
    activations: dict[GraphName, int]

    @property
    def running(self) -> int:
        """Weights, caches, and the largest graph's activations."""
        return self.weights + self.caches + max(self.activations.values())

    @property
    def building(self) -> int:
        """While it builds, TensorRT has the weights twice: those of the graph and those of the engine."""
        return 2 * self.weights + max(self.activations.values())


def estimate(
    bundle: Bundle, recipe: EngineRecipe, choices: EngineChoices, models: Mapping[GraphName, ir.Model]
) -> Footprint:
    """Estimate memory from the graphs themselves, at the profiles' maxima.

    models: as `graphs.graph_to_count` makes them. They are the same for every softmax and attention of `choices`.
    """
    m = bundle.manifest
    activations = {}
    for name, model in models.items():
        largest = {axis: extents[2] for axis, extents in profiles(bundle, name, recipe)["prefill"].items()}
        activations[name] = count(ir.to_proto(model), largest, score_bytes=choices.score_bytes(name)).peak_bytes
    weights = {
        value.name: int(value.const_value.nbytes)
        for model in models.values()
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }
    caches = m.decoder.layers * recipe.capacity * m.decoder.row_values
    return Footprint(sum(weights.values()), int(caches * FLOATS[choices.dtype].bytes), activations)


def shortage(found: Footprint, recipe: EngineRecipe) -> str | None:
    """A sentence on missing memory, to build here or to run on the target device. None if there is enough."""
    free = available_bytes()
    if free is not None and found.building > free:
        return (
            f"the build needs about {decimal(found.building)} of memory, but only {decimal(free)} are free: close "
            "other programs or add swap"
        )
    if recipe.memory is not None and found.running > recipe.memory:
        return f"the engines need about {decimal(found.running)}, but --memory is {decimal(recipe.memory)}: give more"
    device = device_bytes() if recipe.memory is None and recipe.target == "tensorrt" else None
    if device is not None and found.running > device:
        return f"the engines need about {decimal(found.running)}, but the GPU has {decimal(device)}: use a larger one"
    return None


def check_memory(found: Footprint, recipe: EngineRecipe) -> None:
    """Check before a build that this machine, and the target device, have enough memory.

    Raises:
        UserError: one of them has not.
    """
    lacking = shortage(found, recipe)
    if lacking is not None:
        largest = max(found.activations, key=lambda name: found.activations[name])
        raise UserError(
            f"{lacking}, use --dtype float16, or lower --max-visual {recipe.max_visual} (the {largest} graph takes "
            f"{decimal(found.activations[largest])}). --force builds anyway"
        )
