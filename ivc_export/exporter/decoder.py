"""The compacted-sequence decoder's graph: compaction, the remaining layers, the logits."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.checkpoint.weights import Weights
from ivc_export.families import Model
from ivc_export.graph.builder import Graph
from ivc_export.graph.layers import DecoderStack, linear, rms_norm
from ivc_export.selection.ivc_prune import compact_gather, operator


def decoder_graph(model: Model, weights: Weights, selection_layer: int) -> ir.Model:
    """CompactGather on everything that has rows, layers selection_layer..N-1, and lm_head on the rows asked for."""
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
    stack = DecoderStack(g, sizes, model.rotary, positions, range(selection_layer, sizes.layers), ())
    x, _ = stack.layers(hidden)
    with g.scope("lm_head"):
        rows = g.op("Gather", x, g.inputs["logit_index"], axis=0)
        normed = rms_norm(g, rows, "model.norm", sizes.hidden_size, sizes.rms_norm_epsilon)
        head = "model.embed_tokens" if sizes.tied_embeddings else "lm_head"
        logits = linear(g, normed, head, sizes.vocab_size, sizes.hidden_size, bias=False)
        g.output("logits", g.op("Unsqueeze", g.to_float32(logits), g.ints(0)))
    return g.model("decoder", [operator("CompactGather")])
