"""The vision encoder's graph."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.checkpoint.weights import Weights
from ivc_export.families import Family, Model
from ivc_export.graph.builder import Graph


def vision_graph(family: Family, model: Model, weights: Weights) -> ir.Model:
    """One picture, or frames of one size, to visual tokens; what is inside is the family's."""
    g = Graph(model.graph_info("vision", weights.dtype, 1), weights.dtype, weights)
    g.output("image_embeds", family.vision(g, model))
    return g.model("vision")
