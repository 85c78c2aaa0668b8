"""Lets onnxruntime gather rows of many caches in few nodes."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from ivc_export.lowering.edit import Editor

MOST = 16
"""Caches that are joined: their copies are in memory twice meanwhile."""
LEAST = 4
"""It takes three nodes."""


class JoinGathersPass(ir.passes.InPlacePass):
    """Gather from several caches of one shape at once, for a runtime that runs node by node.

    1. Needs: a graph after CompactCachesPass.
    2. Leaves: LEAST to MOST caches of one shape as Concat, one Gather by cache_index, and Split. Inputs and outputs
       stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Group by group."""
        found = joinable(model.graph)
        edit = Editor(model.graph)
        for nodes in found:
            join_gathers(edit, nodes)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that nothing is left to join."""
        for nodes in joinable(model.graph):
            raise ir.passes.PostconditionError(f"{nodes[0].name} is not joined with {nodes[1].name}")


def joinable(graph: ir.Graph) -> list[list[ir.Node]]:
    """Nodes to be joined: those that gather from caches of one shape that are inputs of the graph."""
    found = defaultdict[object, list[ir.Node]](list)
    for node in graph:
        index = node.inputs[1] if node.op_type == "Gather" else None
        if index is not None and index.name == "cache_index" and node.inputs[0] in graph.inputs:
            cache = node.inputs[0]
            assert cache is not None
            found[cache.dtype, tuple(map(str, cache.shape or ()))].append(node)
    parts = [nodes[i : i + MOST] for nodes in found.values() for i in range(0, len(nodes), MOST)]
    return [nodes for nodes in parts if len(nodes) >= LEAST]


def join_gathers(edit: Editor, nodes: list[ir.Node]) -> None:
    """Replace nodes that gather by one index and axis from caches [1, ...]."""
    first = nodes[0]
    (caches,) = edit.op(first, "Concat", *(node.inputs[0] for node in nodes), axis=0)
    (rows,) = edit.op(first, "Gather", caches, first.inputs[1], axis=first.attributes["axis"].as_int())
    for node, rows_of_one in zip(nodes, edit.op(first, "Split", rows, outputs=len(nodes), axis=0), strict=True):
        shape = node.outputs[0].shape
        edit.replace(node.outputs[0], rows_of_one)
        rows_of_one.shape = shape
        edit.graph.remove(node, safe=True)
