"""Builds the three graphs of a model."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.checkpoint.weights import Weights
from ivc_export.contract.graphs import SCORED_VALUES, deepstack_names
from ivc_export.contract.names import GraphName
from ivc_export.families.family import Model
from ivc_export.graph.builder import Graph
from ivc_export.graph.decoder_stack import DecoderStack, spread_rows
from ivc_export.selection.method import METHODS
from ivc_export.selection.operators import attention_inputs, compact_gather


def build_graphs(model: Model, weights: Weights, selection_layer: int) -> dict[GraphName, ir.Model]:
    """The portable graphs of a model, by name, cut at `selection_layer`."""
    return {
        "vision": vision_graph(model, weights),
        "prefix": prefix_graph(model, weights, selection_layer),
        "decoder": decoder_graph(model, weights, selection_layer),
    }


def vision_graph(model: Model, weights: Weights) -> ir.Model:
    """The graph that turns one picture, or frames of one size, into visual tokens. The encoder adds its nodes."""
    g = Graph(model.graph_info("vision", weights.dtype, 1), weights.dtype, weights)
    g.output("image_embeds", model.encoder.graph(g))
    return g.model("vision")


def prefix_graph(model: Model, weights: Weights, selection_layer: int) -> ir.Model:
    """Layers 0..selection_layer-1 over all rows, then the selection by values of the last of them."""
    g = Graph(model.graph_info("prefix", weights.dtype, selection_layer), weights.dtype, weights)
    rule = model.selection
    stack = DecoderStack(
        g, model.block, model.decoder, model.rotary, g.inputs["position_ids"], range(selection_layer), rule.whole_layers
    )
    with g.scope("deepstack"):
        rows = [g.inputs[name] for name in deepstack_names(model.decoder)]
        added = {i: spread_rows(g, x, g.inputs["visual_index"], g.inputs["position_ids"]) for i, x in enumerate(rows)}
    x, scored = stack.layers(g.inputs["inputs_embeds"], added, model.block.scored[rule.scored])
    if rule.scored != "values":
        g.output(SCORED_VALUES, scored)
    g.output("hidden_states", g.op("Unsqueeze", x, g.ints(0)))
    with g.scope("select"):
        attention = g.last_call("Attention")
        looked_at = attention_inputs(attention) | {"scored": scored}
        METHODS[rule.method].operator.add(g, rule, looked_at, attention.attributes["scale"].as_float())
    return g.model("prefix")


def decoder_graph(model: Model, weights: Weights, selection_layer: int) -> ir.Model:
    """CompactGather on everything that has rows, layers selection_layer..N-1, and lm_head on the rows of
    logit_index."""
    g = Graph(model.graph_info("decoder", weights.dtype, selection_layer), weights.dtype, weights)
    sizes = model.decoder
    with g.scope("compact"):
        keep = g.inputs["keep_index"]
        hidden = compact_gather(g, g.inputs["hidden_states"], keep, axis=1)
        positions = compact_gather(g, g.inputs["position_ids"], keep, axis=2)
        for i in range(selection_layer):
            if i in model.selection.whole_layers:
                continue
            for kind in ("key", "value"):
                g.output(f"compact_{kind}.{i}", compact_gather(g, g.inputs[f"new_{kind}.{i}"], keep, axis=2))
    stack = DecoderStack(g, model.block, sizes, model.rotary, positions, range(selection_layer, sizes.layers), ())
    x, _ = stack.layers(hidden)
    with g.scope("lm_head"):
        rows = g.op("Gather", x, g.inputs["logit_index"], axis=0)
        normed = model.block.norm(g, sizes, rows, "model.norm")
        head = "model.embed_tokens" if sizes.tied_embeddings else "lm_head"
        logits = g.linear(normed, head, sizes.vocab_size, sizes.hidden_size, bias=False)
        g.output("logits", g.op("Unsqueeze", g.to_float32(logits), g.ints(0)))
    return g.model("decoder")
