"""The `ivc` operators that choose visual tokens and compact rows, in a graph."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.contract.manifest import SelectionRule
from ivc_export.graph.builder import Graph

SELECTIONS = ("SelectTileTokens", "SelectTokens")
"""The `ivc` operators that choose visual tokens."""


def selection_operator(rule: SelectionRule) -> str:
    """The `ivc` operator that chooses by `rule`."""
    return "SelectTileTokens" if rule.tiles else "SelectTokens"


def select_tokens(g: Graph, rule: SelectionRule, values: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Add the rule's operator on `values` [1, kv_heads, S, value_dim]: keep_index, token_score, seed_index."""
    names = ["ivc_priority", "visual_index", "text_index", "query_index", "keep_count"]
    attributes = {"seed_divisor": rule.seed_divisor}
    if rule.tiles:
        names += ["thumbnail_index", "tile_map"]
    else:
        attributes["softmax_all"] = int(rule.softmax == "all")
    inputs = [values, *(g.inputs[name] for name in names)]
    keep_index, token_score, seed_index = g.call_with_outputs(3, selection_operator(rule), *inputs, **attributes)
    return keep_index, token_score, seed_index


def compact_gather(g: Graph, x: ir.Value, keep_index: ir.Value, axis: int) -> ir.Value:
    """Add a CompactGather node: the rows `keep_index` of `x` along `axis`."""
    return g.call("CompactGather", x, keep_index, axis=axis)
