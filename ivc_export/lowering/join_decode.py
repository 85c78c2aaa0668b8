"""Prefix and decoder as one graph for decode steps, where there is nothing to choose."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from ivc_export.contract import IVC_DOMAIN
from ivc_export.lowering.rotate_in_attention import RotateInAttentionPass


def join_decode(prefix: ir.Model, decoder: ir.Model) -> ir.Model:
    """All layers over one row, from the two graphs after the `ort-cuda` lowering; both are used up.

    The row is kept, so that selection and compaction fall away: its keys and values are where present_key.i and
    present_value.i have put them. Inputs and outputs are those of contract.ort_cuda_decode_info. Every extent but the
    caches' is 1, so that a CUDA graph can replay a step.
    """
    graph, above = prefix.graph, decoder.graph
    outputs = [value for value in above.outputs if str(value.name).startswith(("logits", "present_"))]
    above.outputs[:] = outputs
    graph.outputs[:] = [value for value in graph.outputs if value.name != "cache_index"]
    for node in list(above):
        if node.domain == IVC_DOMAIN or (node.op_type == "Gather" and node.inputs[1] in above.inputs):
            node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)  # type: ignore[arg-type]
            above.remove(node, safe=True)
    below = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    handed_over = [value for value in above.inputs if value.name in below]
    for value in handed_over:
        value.replace_all_uses_with(below[value.name])
    kept = [value for value in above.inputs if value.name not in below]
    caches = [value for value in kept if str(value.name).startswith(("past_key.", "past_value."))]
    move_initializers(above, graph)
    for node in list(above):
        above.remove(node)
        node.name = f"above/{node.name}"
        for value in node.outputs:
            if value.name and value not in outputs:
                value.name = f"above/{value.name}"
        graph.append(node)
    above.inputs.clear()
    above.outputs.clear()
    logits, *present = outputs
    own = [value for value in graph.outputs if str(value.name).startswith("present_")]
    graph.outputs[:] = [logits, *own, *present]
    names = ("inputs_embeds", "position_ids", "seqlens_k", "total_sequence_length", "past_key.", "past_value.")
    RemoveUnusedNodesPass()(prefix)  # the selection
    graph.inputs[:] = [*(value for value in graph.inputs if str(value.name).startswith(names)), *caches]
    for value in graph.inputs:
        if value.name == "position_ids":
            value.shape = ir.Shape([*list(value.shape or ())[:-1], "P"])
    graph.name = "decode"
    prefix.functions.clear()
    graph.opset_imports.pop(IVC_DOMAIN, None)
    CommonSubexpressionEliminationPass()(prefix)
    return RotateInAttentionPass()(prefix).model


def move_initializers(source: ir.Graph, target: ir.Graph) -> None:
    """Move constants and weights to another graph, those that it has already once."""
    for name, value in list(source.initializers.items()):
        known = target.initializers.get(name)
        del source.initializers[name]
        if known is None:
            target.initializers[name] = value
        elif same(known.const_value, value.const_value):
            value.replace_all_uses_with(known)
        else:
            value.name = f"above/{name}"
            target.initializers[value.name] = value


def same(a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> bool:
    """Whether two tensors are one: equal constants, or weights at the same place."""
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor):
        return (a.location, a.offset, a.length) == (b.location, b.offset, b.length)
    return a is not None and b is not None and a.dtype == b.dtype and a.tobytes() == b.tobytes() and a.shape == b.shape
