"""The prefix decoder's graph: the layers that see every token, and the selection."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.checkpoint.weights import Weights
from ivc_export.families import Model
from ivc_export.graph.builder import Graph
from ivc_export.graph.layers import DecoderStack
from ivc_export.selection.ivc_prune import operator, select_tokens, selection_operator


def prefix_graph(model: Model, weights: Weights, selection_layer: int) -> ir.Model:
    """Layers 0..selection_layer-1 over all rows, then the selection by the values of the last of them."""
    g = Graph(model.graph_info("prefix", weights.dtype, selection_layer), weights.dtype, weights)
    rule = model.selection
    stack = DecoderStack(
        g, model.decoder, model.rotary, g.inputs["position_ids"], range(selection_layer), rule.whole_layers
    )
    x, values = stack.layers(g.inputs["inputs_embeds"])
    g.output("hidden_states", g.op("Unsqueeze", x, g.ints(0)))
    with g.scope("select"):
        selected = select_tokens(g, rule, values)
    for name, tensor in zip(("keep_index", "token_score", "seed_index"), selected, strict=True):
        g.output(name, tensor)
    return g.model("prefix", [operator(selection_operator(rule))])
