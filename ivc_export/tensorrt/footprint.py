"""How much memory engines take, and their build, estimated from the graphs."""

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
from ivc_export.tensorrt.memory import available_bytes
from ivc_export.tensorrt.profiles import profiles
from ivc_export.tensorrt.recipe import EngineRecipe


@dataclass(frozen=True)
class Footprint:
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


def estimate(bundle: Bundle, recipe: EngineRecipe, models: Mapping[GraphName, ir.Model]) -> Footprint:
    """Estimate memory from the graphs themselves, at the profiles' maxima."""
    m = bundle.manifest
    activations = {}
    for name, model in models.items():
        largest = {axis: extents[2] for axis, extents in profiles(bundle, name, recipe)["prefill"].items()}
        activations[name] = count(ir.to_proto(model), largest).peak_bytes
    weights = {
        value.name: int(value.const_value.nbytes)
        for model in models.values()
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }
    caches = m.decoder.layers * recipe.capacity * m.decoder.row_values
    return Footprint(sum(weights.values()), int(caches * FLOATS[recipe.dtype or m.dtype].bytes), activations)


def check_memory(found: Footprint, recipe: EngineRecipe) -> None:
    """Refuse before it starts a build that this machine has no memory for.

    Raises:
        UserError: it has not.
    """
    free = available_bytes()
    if free is not None and found.building > free:
        largest = max(found.activations, key=lambda name: found.activations[name])
        raise UserError(
            f"the build needs about {decimal(found.building)} and {decimal(free)} are free: close programs or add "
            f"swap, use --dtype float16, or lower --max-visual {recipe.max_visual} (the {largest} graph takes "
            f"{decimal(found.activations[largest])}); --force builds anyway"
        )
