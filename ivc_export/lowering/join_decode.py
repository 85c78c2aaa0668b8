"""Joins prefix and decoder to one graph for decode steps, in which nothing is selected."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import IVC_DOMAIN, IVC_VERSION
from ivc_export.lowering.edit import called, remove_unused

ABOVE = "above"
"""Prefix for names of the decoder that the prefix graph has too."""


def join_decode(prefix: ir.Model, decoder: ir.Model) -> ir.Model:
    """Join the two portable graphs of one model to the contract's `decode`. The two graphs are used up.

    Its one row is always kept, so selection and compaction are left out.
    """
    graph, above = prefix.graph, decoder.graph
    for node in list(graph):
        if called(node.outputs[0], "SpreadRows"):
            for total in node.outputs[0].consumers():
                hand_through(total)  # the row is not visual
    kept = [value for value in above.outputs if TensorName.of(value.name).role in ("", "new")]
    above.outputs[:] = kept
    for node in list(above):
        if called(node.outputs[0], "CompactGather") or (
            node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name == "logit_index"
        ):
            hand_through(node)
    below = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    caches = []
    for value in above.inputs:
        if value.name in below:
            value.replace_all_uses_with(below[value.name])
        elif TensorName.of(value.name).role == "past":
            caches.append(value)
    move_initializers(above, graph)
    for node in list(above):
        above.remove(node)
        node.name = f"{ABOVE}/{node.name}"
        for value in node.outputs:
            if value.name and value not in kept:
                value.name = f"{ABOVE}/{value.name}"
        graph.append(node)
    above.inputs.clear()
    above.outputs.clear()
    for value in graph.outputs:
        if TensorName.of(value.name).role != "new":
            value.type = value.shape = None  # no longer an output, whose type is written down
    logits, *new = kept
    graph.outputs[:] = [logits, *(v for v in graph.outputs if TensorName.of(v.name).role == "new"), *new]
    for identifier, function in decoder.functions.items():
        prefix.functions.setdefault(identifier, function)
    remove_unused(prefix.graph)  # the selection
    used = {(node.domain, node.op_type) for node in graph}
    for identifier in [i for i in prefix.functions if i[:2] not in used]:
        del prefix.functions[identifier]
    if prefix.functions:
        graph.opset_imports[IVC_DOMAIN] = IVC_VERSION
    roles = ("inputs_embeds", "position_ids", "past_length")
    own = [v for v in graph.inputs if TensorName.of(v.name).role == "past" or TensorName.of(v.name).stem in roles]
    graph.inputs[:] = [*own, *caches]
    for value in (*graph.inputs, *graph.outputs):
        one = {"S", "M", "R"}
        value.shape = ir.Shape(
            [1 if isinstance(axis, ir.SymbolicDim) and axis.value in one else axis for axis in value.shape or ()]
        )
    graph.name = "decode"
    CommonSubexpressionEliminationPass()(prefix)
    return prefix


def hand_through(node: ir.Node) -> None:
    """Replace a node's output by its first input, and remove the node."""
    node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)  # type: ignore[arg-type]
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def move_initializers(source: ir.Graph, target: ir.Graph) -> None:
    """Move constants and weights to another graph. Those that it already has stay once."""
    for name, value in list(source.initializers.items()):
        known = target.initializers.get(name)
        del source.initializers[name]
        if known is None:
            target.initializers[name] = value
        elif same(known.const_value, value.const_value):
            value.replace_all_uses_with(known)
        else:
            value.name = f"{ABOVE}/{name}"
            target.initializers[value.name] = value


def same(a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> bool:
    """Whether two tensors are the same: equal constants, or weights at the same place."""
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor):
        return (a.location, a.offset, a.length) == (b.location, b.offset, b.length)
    return a is not None and b is not None and a.dtype == b.dtype and a.tobytes() == b.tobytes() and a.shape == b.shape
