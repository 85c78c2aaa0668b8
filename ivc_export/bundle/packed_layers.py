"""Compares a manifest's statements on packed layers with the graphs that multiply by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from ivc_export.contract.manifest import Manifest
from ivc_export.lowering.packed import packed_products

NAMES = {4: "int4", 8: "int8"}
"""Names of formats, by bits."""


def find_false_claim(manifest: Manifest, graphs: Iterable[ir.Model]) -> str | None:
    """The first contradiction between a manifest and its graphs on how a layer is stored, or None.

    A table of embeddings is in no graph, unless it is also the last layer's weight. The manifest's `embedding`
    describes it.
    """
    found = {layer: name for graph in graphs for layer, name in layers_of(graph).items()}
    claimed = {layer: one.format for layer, one in manifest.weight_formats.items() if one.format in NAMES.values()}
    alone = [layer for layer in claimed if layer not in found]
    if manifest.embedding.packed is not None and len(alone) == 1:
        del claimed[alone[0]]
    for layer in sorted({*found, *claimed}):
        if claimed.get(layer) != found.get(layer):
            said, is_so = (known.get(layer, "floats") for known in (claimed, found))
            return f"it says that the weights of {layer} are {said}, and the graphs that they are {is_so}"
    return None


def layers_of(graph: ir.Model) -> Mapping[str, str]:
    """The format of each packed layer of a graph, by the name of its tensors."""
    weights = {node.inputs[1]: node.attributes["bits"].as_int() for node in packed_products(graph)}
    return {
        str(value.name).removesuffix(".packed").removesuffix(".weight"): NAMES[bits]
        for value, bits in weights.items()
        if value is not None
    }
