"""Products over weights in 4 bits by the kernels' C interface from Python, and NumPy's answers in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.formats.nbits import pack_values, unpack_values
from tests.native.attention import STORED, error, on_device
from tests.native.kernels import TYPES, Kernels

BLOCKS = (16, 32, 64, 128, 256)
DTYPES = ("float16", "bfloat16")
# Half a unit in the last place of 1: of the answer, and where rows are many of each weight.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
SUMMED = 2.0**-17  # what sums in float32 of 136 times a weight's values may cost, of the sum of products' magnitudes
FEW = 16  # rows whose weights are not rounded


class IvcInt4(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("rows", "features", "out", "block_size", "type")]


@dataclass(frozen=True)
class Int4Case:
    """x [rows, K]; packed uint8 [N, blocks, block / 2]; scales [N, blocks]; points uint8 [N, ceil(blocks / 2)]."""

    x: npt.NDArray[Any]
    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    points: npt.NDArray[np.uint8] | None
    dtype: str

    @property
    def block_size(self) -> int:
        return 2 * int(self.packed.shape[2])

    def weights(self) -> npt.NDArray[np.float64]:
        """[N, K]."""
        out, blocks = self.scales.shape
        stored = unpack_values(self.packed.reshape(out, -1), 4).reshape(out, blocks, -1).astype(np.float64)
        zeros = np.full((out, blocks), 8) if self.points is None else unpack_values(self.points, 4, blocks)
        dense = (stored - zeros[..., None]) * self.scales.astype(np.float64)[..., None]
        found: npt.NDArray[np.float64] = dense.reshape(out, -1)[:, : self.x.shape[1]]
        return found

    def run(self, kernels: Kernels, **changed: int) -> npt.NDArray[Any]:
        """y [rows, N]; changed: extents that the kernels are told instead."""
        (rows, features), out = self.x.shape, len(self.packed)
        struct = IvcInt4(rows, features, out, self.block_size, TYPES[self.dtype])
        for name, value in changed.items():
            setattr(struct, name, value)
        x, scales = on_device(kernels, self.x), on_device(kernels, self.scales)
        packed = kernels.to_device(self.packed)
        points = None if self.points is None else kernels.to_device(self.points)
        y = on_device(kernels, np.full((rows, out), np.nan, self.x.dtype))
        pointers = [kernels.address(x), kernels.address(packed), kernels.address(scales)]
        pointers += [0 if points is None else kernels.address(points), kernels.address(y)]
        kernels.call("ivcMatMulInt4", ctypes.pointer(struct), *map(ctypes.c_void_p, pointers))
        found: npt.NDArray[Any] = kernels.to_host(y).view(self.x.dtype)
        return found

    def check(self, kernels: Kernels) -> float:
        """Against float64; returns the largest error, in units of what rounding may cost."""
        x, weights = self.x.astype(np.float64), self.weights()
        wanted, magnitudes = x @ weights.T, np.abs(x) @ np.abs(weights).T
        found = self.run(kernels)
        assert found.shape == wanted.shape
        unit = ROUNDING[self.dtype]
        # rounding errors of weights are independent: over their sum's root of squares, six times what is expected
        weighed = 6 * unit * np.sqrt(x**2 @ (weights**2).T) if len(x) > FEW else 0.0
        plain = np.abs(x).sum(axis=1)[:, None] * np.abs(self.scales.astype(np.float64)).max(axis=1)
        allowed = unit * np.abs(wanted) + SUMMED * (magnitudes + plain) + weighed + 2.0**-24
        return error(found.astype(np.float64) / allowed, wanted / allowed, 1.0)


def int4_case(seed: int, most: int = 300) -> Int4Case:
    """Every block size, with and without zero points, one row or many, K not always a multiple of a block or of 8."""
    generator = np.random.default_rng(seed)
    dtype, block = DTYPES[seed % 2], BLOCKS[seed // 2 % len(BLOCKS)]
    rows = (1, int(generator.integers(2, 5)), int(generator.integers(5, 129)), int(generator.integers(1, most + 1)))[
        int(generator.choice(4, p=[0.4, 0.2, 0.25, 0.15]))
    ]
    features = int(generator.integers(1, 500 if rows > FEW else 2000))
    features -= features % int(generator.choice([1, 8, 16, 128])) if features > 128 else 0
    out = int(generator.integers(1, 150 if rows > FEW else 500))
    if seed % 50 == 1:
        rows, features, out = 1, int(generator.integers(1, 80)), 4097 + int(generator.integers(0, 9))
    if seed % 50 == 2:
        rows, features, out = 130, int(generator.integers(1, 80)), 1025 + int(generator.integers(0, 9))
    blocks = -(-features // block)
    x = (generator.standard_normal((rows, features)) * generator.choice([0.5, 4])).astype(STORED[dtype])
    stored = generator.integers(0, 16, (out, blocks * block), dtype=np.uint8)
    scales = (generator.standard_normal((out, blocks)) * 0.05).astype(STORED[dtype])
    packed = pack_values(stored, 4).reshape(out, blocks, block // 2)
    points = pack_values(generator.integers(0, 16, (out, blocks), dtype=np.uint8), 4) if generator.integers(2) else None
    return Int4Case(x, packed, scales, points, dtype)
