"""ONNX building blocks: each adds a few nodes to a graph and says its shapes.

Rows are two-dimensional ([rows, hidden]), so that every linear layer is one Gemm on the checkpoint's own weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ivc_export.contract import DecoderSizes, RotarySizes
from ivc_export.graph.builder import FLOAT, INT32, Graph

MASKED = -3e4
"""Added to the scores of masked keys: finite in every dtype, and far below any real score."""


def linear(g: Graph, x: ir.Value, name: str, out: int, features: int, bias: bool) -> ir.Value:
    """`x W^T + b`. x: [rows, features]; W: [out, features], as stored; returns [rows, out]."""
    inputs = [x, g.weight(f"{name}.weight", (out, features))]
    if bias:
        inputs.append(g.weight(f"{name}.bias", (out,)))
    return g.op("Gemm", *inputs, transB=1)


def rms_norm(g: Graph, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
    """Root-mean-square norm over the last axis, computed in float32; the weight is applied in the graph's dtype.

    x: [rows, size]; returns the same shape. Source: Zhang and Sennrich 2019, eq. 4; Qwen2RMSNorm in transformers.
    """
    y = g.to_float32(x)
    variance = g.op("ReduceMean", g.op("Mul", y, y), axes=[-1], keepdims=1)
    deviation = g.op("Sqrt", g.op("Add", variance, g.constant(epsilon, FLOAT)))
    return g.op("Mul", g.to_graph_dtype(g.op("Div", y, deviation)), g.weight(f"{name}.weight", (size,)))


def layer_norm(g: Graph, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
    """Layer norm over the last axis, with statistics in float32. x: [rows, size]; returns the same shape."""
    weight, bias = g.weight(f"{name}.weight", (size,)), g.weight(f"{name}.bias", (size,))
    return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)


def silu(g: Graph, x: ir.Value) -> ir.Value:
    """`x sigmoid(x)`."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def quick_gelu(g: Graph, x: ir.Value) -> ir.Value:
    """`x sigmoid(1.702 x)`."""
    return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.scalar(1.702))))


def gelu(g: Graph, x: ir.Value) -> ir.Value:
    """`x (1 + erf(x / sqrt 2)) / 2`, the exact form."""
    erf = g.op("Erf", g.op("Mul", x, g.scalar(math.sqrt(0.5))))
    return g.op("Mul", g.op("Mul", x, g.scalar(0.5)), g.op("Add", erf, g.scalar(1.0)))


def rotary_frequencies(head_dim: int, rotary: RotarySizes) -> np.ndarray:
    """Frequencies by axis, float64 [axes, head_dim / 2]: zero where another axis turns the pair.

    Source: Su et al. 2021, section 3.2.2; sections as Wang et al. 2024 (Qwen2-VL), M-RoPE.
    """
    table = np.zeros((len(rotary.sections), head_dim // 2))
    start = 0
    for axis, length in enumerate(rotary.sections):
        j = np.arange(start, start + length)
        table[axis, start : start + length] = rotary.theta ** (-2.0 * j / head_dim)
        start += length
    return table


def rotary_angles(g: Graph, positions: ir.Value, frequencies: np.ndarray) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of the rotary angles, float32 [rows, pairs].

    positions: int32 [axes, rows]; frequencies: [axes, pairs]. The sum over axes is of elementwise products: a
    MatMul might run in TF32, which cannot hold a position times a frequency.
    """
    turns = g.cast(g.op("Unsqueeze", positions, g.ints(2)), FLOAT)
    table = g.constant(frequencies[:, None, :], FLOAT)
    angles = g.op("ReduceSum", g.op("Mul", turns, table), g.ints(0), keepdims=0)
    return g.op("Cos", angles), g.op("Sin", angles)


def rotate(g: Graph, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Rotate the pairs (j, j + head_dim / 2) of `x` [..., rows, head_dim] by angles [rows, head_dim / 2]."""
    a, b = g.op_with_outputs(2, "Split", x, axis=-1)
    first = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    second = g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin))
    return g.op("Concat", first, second, axis=-1)


def rotated_heads(
    g: Graph, qkv: ir.Value, head_shape: ir.Value, cos: ir.Value, sin: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries and keys, rotated in float32, and values, [B, heads, rows, head_dim] each.

    qkv: [B rows, 3 heads head_dim]; head_shape: int64 [4], (B, -1, heads, head_dim); cos, sin: [rows, head_dim / 2].
    """

    def heads(part: ir.Value) -> ir.Value:
        return g.transpose(g.op("Reshape", part, head_shape), 0, 2, 1, 3)

    def turned(part: ir.Value) -> ir.Value:
        return g.to_graph_dtype(rotate(g, g.to_float32(heads(part)), cos, sin))

    q, k, v = g.op_with_outputs(3, "Split", qkv, axis=-1)
    return turned(q), turned(k), heads(v)


def gated_mlp(g: Graph, x: ir.Value, name: str, size: int, inner: int, bias: bool) -> ir.Value:
    """`down(silu(gate(x)) up(x))`. x: [rows, size]; returns the same shape. Source: Shazeer 2020, eq. 6 (SwiGLU)."""
    gate = silu(g, linear(g, x, f"{name}.gate_proj", inner, size, bias))
    up = linear(g, x, f"{name}.up_proj", inner, size, bias)
    return linear(g, g.op("Mul", gate, up), f"{name}.down_proj", size, inner, bias)


def attend(g: Graph, q: ir.Value, k: ir.Value, v: ir.Value, head_dim: int, mask: ir.Value | None = None) -> ir.Value:
    """Scaled dot-product attention with the softmax in float32.

    q: [a, b, rows, head_dim]; k, v: [a, b or 1, keys, head_dim]; mask: float32 [rows, keys], added; returns q's shape.
    The queries are scaled before the product, so that float16 scores do not overflow.
    """
    scaled = g.op("Mul", q, g.scalar(head_dim**-0.5))
    scores = g.to_float32(g.op("MatMul", scaled, g.transpose(k, 0, 1, 3, 2)))
    if mask is not None:
        scores = g.op("Add", scores, mask)
    return g.op("MatMul", g.to_graph_dtype(g.op("Softmax", scores, axis=-1)), v)


def causal_mask(g: Graph, rows: ir.Value, past: ir.Value, past_length: ir.Value) -> ir.Value:
    """What each row must not see: float32 [S, P + S], 0 or MASKED.

    rows: S, past: P, both int64 [1]; past_length: int32 [1]. Row s sees cache rows below past_length, and rows of this
    run up to itself. Rows count, never position ids: those do not ascend over a picture.
    """
    run, cache = g.cast(rows, INT32), g.cast(past, INT32)
    zero, one = g.constant(0, INT32), g.constant(1, INT32)

    def counting(length: ir.Value) -> ir.Value:
        return g.op("Range", zero, g.op("Squeeze", length, g.ints(0)), one)

    column = counting(g.op("Add", cache, run))
    row = g.op("Add", g.op("Unsqueeze", counting(run), g.ints(1)), cache)
    cached = g.op("Less", column, past_length)
    earlier = g.op("And", g.op("GreaterOrEqual", column, cache), g.op("Not", g.op("Less", row, column)))
    return g.op("Where", g.op("Or", cached, earlier), g.constant(0.0, FLOAT), g.constant(MASKED, FLOAT))


def pixel_patches(g: Graph, pixels: ir.Value, size: int, patch: int) -> ir.Value:
    """Pixels [B, 3, size, size] cut into patches, row-major: [B (size / patch)^2, 3 patch^2].

    A convolution whose stride is its width is then a Gemm on the same weight.
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
    """A pre-norm block of a vision transformer; names are those of its weights within a block.

    qkv: one name for queries, keys and values each, or one for a weight that holds all three. scales: of what attention
    and MLP add, by channel, if any. Source: Dosovitskiy et al. 2021 (ViT), section 3.1; Touvron et al. 2021 (CaiT),
    section 2, for the scales.
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
            y = self.activation(g, linear(g, y, f"{name}.mlp.fc1", self.mlp_size, self.width, bias=True))
            return self._plus(g, name, 1, x, linear(g, y, f"{name}.mlp.fc2", self.width, self.mlp_size, bias=True))

    def _plus(self, g: Graph, name: str, which: int, x: ir.Value, y: ir.Value) -> ir.Value:
        if self.scales is not None:
            y = g.op("Mul", y, g.weight(f"{name}.{self.scales[which]}", (self.width,)))
        return g.op("Add", x, y)

    def _attention(self, g: Graph, name: str, x: ir.Value, frames: ir.Value) -> ir.Value:
        head_dim = self.width // self.heads
        shape = g.op("Concat", frames, g.ints(-1, self.heads, head_dim), axis=0)
        out = 3 * self.width // len(self.qkv)
        parts: Sequence[ir.Value] = [
            linear(g, x, f"{name}.{part}", out, self.width, self.qkv_bias) for part in self.qkv
        ]
        if len(parts) == 1:
            parts = g.op_with_outputs(3, "Split", parts[0], axis=-1)
        q, k, v = (g.transpose(g.op("Reshape", part, shape), 0, 2, 1, 3) for part in parts)
        y = g.reshape(g.transpose(attend(g, q, k, v, head_dim), 0, 2, 1, 3), -1, self.width)
        return linear(g, y, f"{name}.{self.out}", self.width, self.width, bias=True)


class DecoderStack:
    """The decoder layers `numbers`, which share rotary angles and masks.

    position_ids: int32 [axes, 1, rows]. Caches are as long as each other, but for those of layers in `whole`.
    """

    def __init__(
        self,
        g: Graph,
        sizes: DecoderSizes,
        rotary: RotarySizes,
        position_ids: ir.Value,
        numbers: range,
        whole: Collection[int],
    ) -> None:
        self.g, self.sizes, self.numbers = g, sizes, numbers
        with g.scope("rotary"):
            positions = g.op("Squeeze", position_ids, g.ints(1))
            cos, sin = rotary_angles(g, positions, rotary_frequencies(sizes.head_dim, rotary))
            self.cos, self.sin = g.to_graph_dtype(cos), g.to_graph_dtype(sin)
        self.masks: dict[int, ir.Value] = {}
        with g.scope("mask"):
            rows = g.extent(position_ids, 2)
            compacted = [i for i in numbers if i not in whole]
            if compacted:
                past = g.extent(g.inputs[f"past_key.{compacted[0]}"], 2)
                self.masks |= dict.fromkeys(compacted, causal_mask(g, rows, past, g.inputs["past_length"]))
            for i in sorted({*numbers} - {*compacted}):
                past = g.extent(g.inputs[f"past_key.{i}"], 2)
                self.masks[i] = causal_mask(g, rows, past, g.inputs[f"past_length.{i}"])

    def layers(self, hidden: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Add the layers, whose keys (rotated) and values become the outputs new_key.i and new_value.i.

        hidden: [1, rows, hidden]. Returns [rows, hidden], and the last layer's values [1, kv_heads, rows, head_dim].
        """
        x = value = self.g.op("Squeeze", hidden, self.g.ints(0))
        for number in self.numbers:
            x, key, value = self._layer(number, x)
            self.g.output(f"new_key.{number}", key)
            self.g.output(f"new_value.{number}", value)
        return x, value

    def _layer(self, number: int, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        g, s, name = self.g, self.sizes, f"model.layers.{number}"
        with g.scope(f"layers.{number}"):
            normed = rms_norm(g, x, f"{name}.input_layernorm", s.hidden_size, s.rms_norm_epsilon)
            attended, key, value = self._attention(number, normed)
            x = g.op("Add", x, attended)
            normed = rms_norm(g, x, f"{name}.post_attention_layernorm", s.hidden_size, s.rms_norm_epsilon)
            with g.scope("mlp"):
                y = gated_mlp(g, normed, f"{name}.mlp", s.hidden_size, s.intermediate_size, bias=False)
            return g.op("Add", x, y), key, value

    def _attention(self, number: int, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        g, s, name = self.g, self.sizes, f"model.layers.{number}.self_attn"
        with g.scope("attention"):

            def project(projection: str, count: int) -> ir.Value:
                return linear(g, x, f"{name}.{projection}", count * s.head_dim, s.hidden_size, s.qkv_bias)

            def heads(y: ir.Value, count: int) -> ir.Value:
                return g.transpose(g.reshape(y, 1, -1, count, s.head_dim), 0, 2, 1, 3)

            if s.fused_qkv:  # by key-value head: its queries, its key, its value
                group = s.heads // s.kv_heads
                fused = g.reshape(project("qkv_proj", s.heads + 2 * s.kv_heads), -1, s.kv_heads, group + 2, s.head_dim)
                parts: Iterator[ir.Value] = iter(g.op_with_outputs(3, "Split", fused, g.ints(group, 1, 1), axis=2))
            else:
                counts = {"q_proj": s.heads, "k_proj": s.kv_heads, "v_proj": s.kv_heads}
                parts = (project(part, count) for part, count in counts.items())
            q = rotate(g, heads(next(parts), s.heads), self.cos, self.sin)
            key = rotate(g, heads(next(parts), s.kv_heads), self.cos, self.sin)
            value = heads(next(parts), s.kv_heads)
            keys = g.op("Concat", g.inputs[f"past_key.{number}"], key, axis=2)
            values = g.op("Concat", g.inputs[f"past_value.{number}"], value, axis=2)
            # grouped queries: [kv_heads, group, rows, head_dim] against [kv_heads, 1, P + rows, head_dim]
            grouped = g.reshape(q, s.kv_heads, s.heads // s.kv_heads, -1, s.head_dim)
            keys, values = (g.reshape(cache, s.kv_heads, 1, -1, s.head_dim) for cache in (keys, values))
            y = attend(g, grouped, keys, values, s.head_dim, self.masks[number])
            rows = g.reshape(g.transpose(y, 2, 0, 1, 3), -1, s.heads * s.head_dim)
            return linear(g, rows, f"{name}.o_proj", s.hidden_size, s.heads * s.head_dim, bias=False), key, value
