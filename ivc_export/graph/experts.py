"""Feed-forward layers with a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ivc_export.checkpoint.stacks import Stack
from ivc_export.contract.manifest import DecoderSizes
from ivc_export.graph.builder import FLOAT
from ivc_export.graph.decoder_block import Layer, gated_feed_forward
from ivc_export.graph.linear import gated_mlp

PROJECTIONS = (("gate_proj", False), ("up_proj", False), ("down_proj", True))
"""Projections of an expert, and whether each is transposed in a stack."""


@dataclass(frozen=True)
class ExpertFeedForward:
    """A mixture of experts from layer `dense` on, and a gated MLP in the layers before.

    experts, inner: number of experts, and the width within one. chosen: experts of each row. shared: experts that every
    row takes, stored as one. sigmoid, normalise, factor: see RouteExperts. bias: whether a stored bias helps to choose.

    Source: DeepSeekMoE (arXiv 2401.06066), section 3.
    """

    dense: int
    experts: int
    inner: int
    chosen: int
    shared: int
    sigmoid: bool
    normalise: bool
    factor: float
    bias: bool

    def __call__(self, layer: Layer, x: ir.Value) -> ir.Value:
        """x: [rows, hidden], normed; returns what is added to each row."""
        if layer.number < self.dense:
            return gated_feed_forward(layer, x)
        g, size, name = layer.g, layer.sizes.hidden_size, f"{layer.name}.mlp"
        router = g.weight(f"{name}.gate.weight", (self.experts, size))
        if self.bias:
            bias = g.weight(f"{name}.gate.e_score_correction_bias", (self.experts,))
        else:
            bias = g.constant([0.0] * self.experts, FLOAT)
        flags = {"sigmoid": int(self.sigmoid), "normalise": int(self.normalise)}
        weights = g.call("RouteExperts", x, router, bias, chosen=self.chosen, factor=self.factor, **flags)
        shape = (self.experts * self.inner, size)
        stacked = [g.weight(f"{name}.experts.{part}.weight", shape) for part, _ in PROJECTIONS]
        y = g.call("MixtureOfExperts", x, weights, *stacked)
        if not self.shared:
            return y
        inner = self.shared * self.inner
        return g.op("Add", y, gated_mlp(g, x, f"{name}.shared_experts", size, inner, bias=False))

    def stacks(self, sizes: DecoderSizes) -> Iterator[Stack]:
        """The weights that it takes stacked, for a decoder of these sizes."""
        for number in range(self.dense, sizes.layers):
            name = f"model.layers.{number}.mlp.experts"
            for part, transposed in PROJECTIONS:
                parts = tuple(f"{name}.{expert}.{part}.weight" for expert in range(self.experts))
                shape = (sizes.hidden_size, self.inner) if transposed else (self.inner, sizes.hidden_size)
                yield Stack(f"{name}.{part}.weight", parts, shape, transposed)
