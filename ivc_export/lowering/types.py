"""Infers the element types of a graph's values. Portable graphs do not store them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.graph.functions import RESULTS

BOOLEANS = frozenset(("And", "Equal", "Greater", "GreaterOrEqual", "Less", "Not", "Or"))
"""Operators of the contract whose results are booleans."""

ALIKE = {
    **dict.fromkeys(("AttendInPlace", "AttendJoined", "EncodeAttend", "TurnHeads"), 0),
    **dict.fromkeys(("CacheIndex", "FusedLinear", "FusedLinearInt4", "FusedLinearInt8"), 0),
    "CompactIntoCaches": 2,
}
"""Our operators without a body whose outputs all have one input's type, with the number of this input."""

Types = MutableMapping[ir.Value, ir.DataType]


def types_of(graph: ir.Graph) -> Types:
    """The element type of every value of a graph of the contract's operators and `ivc` functions."""
    types = {value: value.dtype for value in (*graph.inputs, *graph.initializers.values()) if value.dtype is not None}
    add_types(graph, types)
    return types


def add_types(nodes: Iterable[ir.Node], types: Types) -> None:
    """Add the types of the outputs of `nodes`, in order."""
    for node in nodes:
        for value, dtype in zip(node.outputs, results(node, types), strict=True):
            types[value] = dtype


def results(node: ir.Node, types: Types) -> list[ir.DataType]:
    """The types of a node's outputs."""
    inputs = [types[value] for value in node.inputs if value is not None]
    if (node.domain, node.op_type) == (IVC_DOMAIN, "CompactGatherN"):  # an operator of ours, of many inputs
        return inputs[1:]
    if (node.domain, node.op_type) == (IVC_DOMAIN, "FusedLinearWide"):
        return [ir.DataType.FLOAT]
    if node.domain == IVC_DOMAIN and node.op_type in ALIKE:
        return [inputs[ALIKE[node.op_type]]] * len(node.outputs)
    if node.domain == IVC_DOMAIN:
        found = RESULTS[node.op_type]
        return list(found) if isinstance(found, tuple) else [inputs[found]]
    if node.op_type in BOOLEANS:
        dtype = ir.DataType.BOOL
    elif node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int())
    elif node.op_type == "Shape":
        dtype = ir.DataType.INT64
    else:
        dtype = inputs[1 if node.op_type in ("CastLike", "DequantizeLinear", "Where") else 0]
    return [dtype] * len(node.outputs)
