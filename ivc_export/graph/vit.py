"""Vision transformers over pictures of fixed size: patches, class token, blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ivc_export.graph.attention import encoder_attention, split_heads
from ivc_export.graph.builder import Graph
from ivc_export.graph.norms import layer_norm


def pixel_patches(g: Graph, pixels: ir.Value, size: int, patch: int) -> ir.Value:
    """Pixels [B, 3, size, size] cut into patches, row-major: [B (size / patch)^2, 3 patch^2].

    So a convolution whose stride is its width becomes a Gemm on the same weight.
    """
    side = size // patch
    cut = g.transpose(g.reshape(pixels, -1, 3, side, patch, side, patch), 0, 2, 4, 1, 3, 5)
    return g.reshape(cut, -1, 3 * patch**2)


def with_class_token(
    g: Graph, patches: ir.Value, frames: ir.Value, token: ir.Value, positions: ir.Value, width: int
) -> ir.Value:
    """Put the class token before each frame's patches, and add positions.

    patches: [B patches, width]; frames: B, int64 [1]; token: [1, 1, width]; positions: [1, 1 + patches, width]; returns
    [B (1 + patches), width]. Source: Dosovitskiy et al. 2021 (ViT), section 3.1.
    """
    first = g.op("Expand", token, g.op("Concat", frames, g.ints(1, width), axis=0))
    framed = g.op("Reshape", patches, g.op("Concat", frames, g.ints(-1, width), axis=0))
    return g.reshape(g.op("Add", g.op("Concat", first, framed, axis=1), positions), -1, width)


def without_class_token(g: Graph, x: ir.Value, frames: ir.Value, width: int) -> ir.Value:
    """Drop each frame's first row. x: [B (1 + patches), width]; returns [B, patches, width]."""
    framed = g.op("Reshape", x, g.op("Concat", frames, g.ints(-1, width), axis=0))
    return g.op("Slice", framed, g.ints(1), g.ints(2**31 - 1), g.ints(1))


@dataclass(frozen=True)
class EncoderBlock:
    """A pre-norm block of a vision transformer. Names are those of its weights within a block.

    qkv: one name each for queries, keys and values, or one for a weight that has all three. scales: factors of the
    results of attention and MLP, by channel, if any. Source: Dosovitskiy et al. 2021 (ViT), section 3.1; Touvron et al.
    2021 (CaiT), section 2, for the scales.
    """

    width: int
    heads: int
    mlp_size: int
    epsilon: float
    activation: Callable[[Graph, ir.Value], ir.Value]
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    scales: tuple[str, str] | None = None
    qkv_bias: bool = True

    def add(self, g: Graph, name: str, x: ir.Value, frames: ir.Value) -> ir.Value:
        """Add the block `name`. x: [B rows, width]; frames: B, int64 [1]; returns x's shape."""
        with g.scope("attention"):
            y = layer_norm(g, x, f"{name}.{self.norms[0]}", self.width, self.epsilon)
            x = self._plus(g, name, 0, x, self._attention(g, name, y, frames))
        with g.scope("mlp"):
            y = layer_norm(g, x, f"{name}.{self.norms[1]}", self.width, self.epsilon)
            y = self.activation(g, g.linear(y, f"{name}.mlp.fc1", self.mlp_size, self.width, bias=True))
            return self._plus(g, name, 1, x, g.linear(y, f"{name}.mlp.fc2", self.width, self.mlp_size, bias=True))

    def _plus(self, g: Graph, name: str, which: int, x: ir.Value, y: ir.Value) -> ir.Value:
        if self.scales is not None:
            y = g.op("Mul", y, g.weight(f"{name}.{self.scales[which]}", (self.width,)))
        return g.op("Add", x, y)

    def _attention(self, g: Graph, name: str, x: ir.Value, frames: ir.Value) -> ir.Value:
        head_dim = self.width // self.heads
        out = 3 * self.width // len(self.qkv)
        parts: Sequence[ir.Value] = [g.linear(x, f"{name}.{part}", out, self.width, self.qkv_bias) for part in self.qkv]
        if len(parts) == 1:
            parts = g.op_with_outputs(3, "Split", parts[0], axis=-1)
        q, k, v = (split_heads(g, part, frames, self.heads, head_dim) for part in parts)
        y = encoder_attention(g, q, k, v, self.heads, head_dim)
        return g.linear(y, f"{name}.{self.out}", self.width, self.width, bias=True)
