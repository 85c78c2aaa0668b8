"""Optimisation profiles: the smallest, best and largest size of each axis of a graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.caches import owned_caches_info
from ivc_export.contract.manifest import Manifest
from ivc_export.contract.names import GraphName
from ivc_export.contract.preprocessing import ViewPreprocessing
from ivc_export.tensorrt.recipe import EngineRecipe

Extents = dict[str, tuple[int, int, int]]
"""Minimum, optimum and maximum of each symbolic axis, and of keep_count's value."""


def profile_names(name: GraphName) -> tuple[str, ...]:
    """A graph's optimization profiles, in their order."""
    return ("prefill",) if name == "vision" else ("prefill", "decode")


def profiles(bundle: Bundle, name: GraphName, recipe: EngineRecipe) -> dict[str, Extents]:
    """A graph's optimisation profiles: `prefill`, over caches of any length, and `decode`, over full buffers.

    Vision has only `prefill`. All minima fit together, and so do optima and maxima, so that S = L + T. Caches that our
    plugin writes to are full buffers in both.
    """
    m = bundle.manifest
    written = recipe.plugin is not None and owned_caches_info(m.graphs["decoder"]) != m.graphs["decoder"]
    visual, text = recipe.opt_visual, recipe.opt_text
    most, longest, capacity = recipe.max_visual, recipe.max_text, recipe.capacity
    patches = getattr(m.preprocessing, "merge_size", 1) ** 2  # of a visual token, where pictures are cut into patches
    prefill: Extents = {
        "B": (1, frames_of(m, visual), frames_of(m, most)),
        "patches": (patches, patches * visual, patches * most),
        "visual": (1, visual, most),
        "L": (1, visual, most),
        "H": (1, visual, most),
        "V": (1, visual, most),
        "T": (0, text, longest),
        "S": (1, visual + text, most + longest),
        "Q": (1, max(1, text // 2), longest),
        "M": (1, max(1, visual // 2) + text, most + longest),
        "P": (capacity,) * 3 if written else (0, 0, capacity),
        "W": (0, 0, capacity),
        "R": (1, 1, 1),
        "keep_count": (1, max(1, visual // 2), most),
    }
    decode: Extents = dict.fromkeys(prefill, (1, 1, 1)) | {"T": (0, 0, 0)}
    decode |= dict.fromkeys(("P", "W"), (capacity, capacity, capacity))
    return {kind: {"prefill": prefill, "decode": decode}[kind] for kind in profile_names(name)}


def frames_of(m: Manifest, visual: int) -> int:
    """The most frames, or tiles, of a picture that gives at most `visual` tokens."""
    frame = m.graphs["vision"].outputs[0].shape[1]  # tokens of a frame: a number where frames are of one size
    if isinstance(frame, int):
        return max(1, visual // frame)
    if not isinstance(m.preprocessing, ViewPreprocessing):
        return 1
    return 1 + max((c * r for c, r in m.preprocessing.shapes if m.preprocessing.visual(c, r) <= visual), default=1)


def make_profile(found: Any, model: ir.Model, extents: Extents) -> Any:
    """Polygraphy's empty profile, filled for a graph. It reads from the network which inputs are shapes."""
    for value in model.graph.inputs:
        if value.name == "keep_count":
            found.add(value.name, *[(extent,) for extent in extents["keep_count"]])
            continue
        axes = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape or ()]
        found.add(value.name, *[tuple(a if isinstance(a, int) else extents[a][i] for a in axes) for i in range(3)])
    return found
