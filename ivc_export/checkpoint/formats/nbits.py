"""Weights in 4 or 8 bits, in the one form that bundles use for every checkpoint format.

A layer's row is cut into blocks that share a scale, and a zero point where there are any. A bundle holds:

- `<layer>.weight.packed`, uint8 [out, blocks, block bits / 8]: stored values of 0 to 2^bits - 1, lowest bits first
- `<layer>.weight.scales` [out, blocks], floats
- `<layer>.weight.zero_points`, uint8 [out, ceil(blocks bits / 8)], packed along the blocks; without, 2^(bits - 1)
- `<layer>.weight.order`, int32 [in]: the columns of x in the order that the values are in, where it is another

and a weight is (stored value - zero point) * scale. Source: MatMulNBits in onnxruntime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.checkpoint.formats.weight_format import Builder
from ivc_export.errors import UserError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]

LEAST_BLOCK, MOST_BLOCK = 16, 128
"""The smallest and the largest number of values in a block, a power of two. onnxruntime's CUDA kernels support no
larger one."""
BITS = (4, 8)


@dataclass(frozen=True)
class Packing:
    """How layers are packed.

    group: how many values of a row share a scale; None for the whole row. zero_points: whether groups have zero points.
    ordered: whether values are stored in another order than x's columns.

    Raises:
        UserError: blocks cannot make up groups of this size.
    """

    bits: int
    group: int | None = None
    zero_points: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        assert self.bits in BITS, self.bits
        if self.group is not None and (self.group < LEAST_BLOCK or self.group & -self.group < LEAST_BLOCK):
            raise UserError(
                f"weights in groups of {self.group} cannot be packed: this version takes multiples of {LEAST_BLOCK}, "
                "and -1 for one group per row"
            )

    @property
    def name(self) -> str:
        """Its name in manifests."""
        return f"int{self.bits}"

    @property
    def middle(self) -> int:
        """The zero point of layers without zero points."""
        return 1 << (self.bits - 1)

    def groups(self, features: int) -> int:
        """Number of groups in a row of so many values."""
        return -(-features // (self.group or features))

    def block(self, features: int) -> int:
        """Number of values in a block of such a row: the largest power of two that makes up groups, or that a row
        fills."""
        fits = LEAST_BLOCK
        while fits < MOST_BLOCK and (self.group % (2 * fits) == 0 if self.group else fits < features):
            fits *= 2
        return fits

    def blocks(self, features: int) -> int:
        """Number of blocks in such a row. The last may be short."""
        return -(-features // self.block(features))

    def spread(self, per_group: npt.NDArray[Any], features: int) -> npt.NDArray[Any]:
        """Repeat values of groups for their blocks: [out, groups] to [out, blocks]."""
        block = self.block(features)
        group_of_block = np.arange(self.blocks(features)) * block // (self.group or features)
        return per_group[:, group_of_block]


def packed_linear(
    g: Builder, x: ir.Value, name: str, out: int, features: int, bias: bool, packing: Packing
) -> ir.Value:
    """`x W^T + b` as a LinearNBits; see WeightFormat.linear."""
    p, block, blocks = packing, packing.block(features), packing.blocks(features)
    if p.ordered:
        x = g.op("Gather", x, g.weight(f"{name}.weight.order", (features,), dtype="I32"), axis=1)
    weights = [
        g.weight(f"{name}.weight.packed", (out, blocks, block * p.bits // 8), dtype="U8"),
        g.weight(f"{name}.weight.scales", (out, blocks)),
    ]
    function = "LinearNBits"
    if p.zero_points:
        function = "LinearNBitsZeroPoints"
        weights.append(g.weight(f"{name}.weight.zero_points", (out, -(-blocks * p.bits // 8)), dtype="U8"))
    y = g.call(function, x, *weights, bits=p.bits, block_size=block, K=features, N=out)
    return g.op("Add", y, g.weight(f"{name}.bias", (out,))) if bias else y


def pack_values(values: Bytes, bits: int) -> Bytes:
    """Pack values along the last axis into bytes, lowest bits first. An odd number of them is filled up with zeros.

    values: [..., n], each below 2^bits; returns [..., ceil(n bits / 8)].
    """
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return values[..., ::2] | (values[..., 1::2] << np.uint8(4))


def unpack_values(stored: Bytes, bits: int, count: int | None = None) -> Bytes:
    """Undo `pack_values`. count: number of values along the last axis; None for all in the bytes."""
    if bits == 8:
        return stored[..., :count]
    values = np.stack([stored & np.uint8(15), stored >> np.uint8(4)], axis=-1)
    return values.reshape(*stored.shape[:-1], -1)[..., :count]


def pack_blocks(values: Bytes, packing: Packing) -> Bytes:
    """Pack rows of values [rows, in] as in a bundle: [rows, blocks, block bits / 8]. The last block is filled up."""
    rows, features = values.shape
    width = packing.blocks(features) * packing.block(features)
    if width > features:
        values = np.pad(values, ((0, 0), (0, width - features)), constant_values=packing.middle)
    return pack_values(values, packing.bits).reshape(rows, packing.blocks(features), -1)


def dequantise(
    packed: Bytes, scales: Floats, zero_points: Bytes | None, bits: int, features: int
) -> npt.NDArray[np.float32]:
    """The values of a bundle's tensors, in their stored order: [out, features].

    This is exact if scales have at most 16 bits of mantissa: stored values less zero points have 8.
    """
    out, blocks, _ = packed.shape
    zero = (
        np.full((out, blocks), 1 << (bits - 1), np.uint8)
        if zero_points is None
        else unpack_values(zero_points, bits, blocks)
    )
    values = unpack_values(packed, bits).astype(np.float32)
    values -= zero[..., None].astype(np.float32)
    values *= scales[..., None].astype(np.float32)
    return values.reshape(out, -1)[:, :features]


def row_pieces(rows: int, width: int, most: int = 1 << 22) -> Iterator[slice]:
    """Ranges of rows of so many values, with about `most` values each."""
    step = max(1, most // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
