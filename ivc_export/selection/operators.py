"""The `ivc` operators that select visual tokens and compact rows, as parts of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import onnx_ir as ir

from ivc_export.contract.manifest import FastVRule, SelectionRule
from ivc_export.graph.builder import Graph

SELECTIONS = ("SelectAttended", "SelectTileTokens", "SelectTokens", "SelectViewTokens")
"""The `ivc` operators that choose visual tokens."""

LayerTensor = Literal["query", "key", "past_key", "past_length", "scored"]
"""Tensors of layer k-1's attention: query [1, heads, S, head_dim] and key [1, kv_heads, S, head_dim], rotated, past_key
[1, kv_heads, P, head_dim], past_length int32 [1]; and the values that IVC-Prune's rule scores, [1, kv_heads, S, D]."""


class Call(NamedTuple):
    """An `ivc` operator, by name, and its attributes."""

    name: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Operator:
    """The operator that chooses visual tokens in a prefix graph.

    call: for a bundle's rule, and the factor by which the layer's attention scales its queries. looks_at: tensors of
    layer k-1 that it takes first. inputs: for a rule, the graph's inputs that it takes then. outputs: the graph's
    outputs that it gives.
    """

    call: Callable[[Any, float], Call]
    looks_at: Sequence[LayerTensor]
    inputs: Callable[[Any], Sequence[str]]
    outputs: Sequence[str] = ("keep_index", "token_score", "seed_index")

    def add(
        self, g: Graph, rule: SelectionRule | FastVRule, layer: Mapping[LayerTensor, ir.Value], scale: float
    ) -> None:
        """Add it to the prefix graph, and its outputs to the graph's outputs. layer: its tensors, by name."""
        name, attributes = self.call(rule, scale)
        inputs = [layer[tensor] for tensor in self.looks_at] + [g.inputs[one] for one in self.inputs(rule)]
        found = g.call_with_outputs(len(self.outputs), name, *inputs, **attributes)
        for output, tensor in zip(self.outputs, found, strict=True):
            g.output(output, tensor)


def selection_operator(rule: SelectionRule) -> str:
    """The `ivc` operator that chooses by `rule`."""
    return "SelectViewTokens" if rule.views else "SelectTileTokens" if rule.tiles else "SelectTokens"


def ivc_call(rule: SelectionRule, scale: float) -> Call:
    """The rule's operator; values are scaled by their own size."""
    shared = {} if rule.tiles or rule.views else {"softmax_all": int(rule.softmax == "all")}
    return Call(selection_operator(rule), {"seed_divisor": rule.seed_divisor} | shared)


def ivc_inputs(rule: SelectionRule) -> Sequence[str]:
    """The inputs of the rule's operator that come from a plan."""
    tiles = ("thumbnail_index", "tile_map") if rule.tiles or rule.views else ()
    views = ("candidate_index",) if rule.views else ()
    return ("ivc_priority", "visual_index", "text_index", "query_index", "keep_count", *tiles, *views)


IVC_OPERATOR = Operator(ivc_call, looks_at=("scored",), inputs=ivc_inputs)
"""SelectTokens, SelectTileTokens or SelectViewTokens."""

ATTENDED_OPERATOR = Operator(
    lambda rule, scale: Call("SelectAttended", {"scale": scale}),
    looks_at=("query", "key", "past_key", "past_length"),
    inputs=lambda rule: ("visual_index", "text_index", "keep_count"),
    outputs=("keep_index", "token_score"),
)


def attention_inputs(call: ir.Node) -> dict[LayerTensor, ir.Value]:
    """The inputs of a call of the `ivc` function Attention whose mask is CausalMask's."""
    query, key, _, past_key, _, visible = call.inputs
    mask = visible.producer() if visible is not None else None
    assert mask is not None and mask.op_type == "CausalMask"
    found: dict[LayerTensor, ir.Value | None] = {"query": query, "key": key, "past_key": past_key}
    found["past_length"] = mask.inputs[2]
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def compact_gather(g: Graph, x: ir.Value, keep_index: ir.Value, axis: int) -> ir.Value:
    """Add a CompactGather node: the rows `keep_index` of `x` along `axis`."""
    return g.call("CompactGather", x, keep_index, axis=axis)
