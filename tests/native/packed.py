"""Products over weights in 4 or 8 bits by the kernels' C interface from Python, and NumPy's answers in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.formats.nbits import pack_values
from tests.native.attention import on_device
from tests.native.kernels import Kernels
from tests.native.linear import ACTIVATIONS, ROUNDING, LinearCase, drawing, numbers

BLOCKS = (16, 32, 64, 128, 256)
DTYPES = ("float16", "bfloat16")


class IvcPacked(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "scales", "zero_points")),
        *((name, ctypes.c_int32) for name in ("block_size", "bits")),
    ]


@dataclass(frozen=True)
class PackedCase:
    """A product whose weights lie packed, too, and mean what `linear.weight` has in float64.

    packed uint8 [N, blocks, block bits / 8], or [2 N, ..] where gated; scales [N, blocks]; points uint8
    [N, ceil(blocks bits / 8)].
    """

    bits: int

    linear: LinearCase
    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    points: npt.NDArray[np.uint8] | None

    @property
    def block_size(self) -> int:
        return int(self.packed.shape[2]) * 8 // self.bits

    def run(self, kernels: Kernels, **changed: int) -> npt.NDArray[Any]:
        """y [rows, N] in one call; changed: extents that the kernels are told instead."""
        case = self.linear
        tensors = (case.x, case.norm, case.bias, case.residual)
        found = np.full((len(case.x), case.out), np.nan, case.x.dtype)
        return self._call(kernels, "ivcFusedPacked", tensors, found, changed)

    def unpack(self, kernels: Kernels) -> npt.NDArray[Any]:
        """The weights, [N, K], or [2 N, K] where gated."""
        found = np.full(self.linear.weight.shape, np.nan, self.linear.x.dtype)
        return self._call(kernels, "ivcUnpack", (), found, {})

    def _call(
        self,
        kernels: Kernels,
        name: str,
        tensors: tuple[npt.NDArray[Any] | None, ...],
        found: npt.NDArray[Any],
        changed: dict[str, int],
    ) -> npt.NDArray[Any]:
        placed = [None if one is None else on_device(kernels, one) for one in tensors]
        scales, packed, y = on_device(kernels, self.scales), kernels.to_device(self.packed), on_device(kernels, found)
        points = None if self.points is None else kernels.to_device(self.points)
        weight = IvcPacked(
            kernels.address(packed),
            kernels.address(scales),
            None if points is None else kernels.address(points),
            changed.pop("block_size", self.block_size),
            changed.pop("bits", self.bits),
        )
        product = self.linear.struct(**changed)
        pointers = [0 if one is None else kernels.address(one) for one in (*placed, y)]
        kernels.call(name, ctypes.pointer(product), ctypes.pointer(weight), *map(ctypes.c_void_p, pointers))
        answer: npt.NDArray[Any] = kernels.to_host(y).view(found.dtype)
        return answer

    def check(self, kernels: Kernels) -> float:
        """Against float64; returns the largest error, in units of what rounding may cost, of normed rows too."""
        between = 0.0 if self.linear.norm is None else ROUNDING[self.linear.dtype]
        return self.linear.compare(self.run(kernels), between)

    def check_unpacked(self, kernels: Kernels) -> None:
        """Each value is what the weight means, rounded once."""
        np.testing.assert_array_equal(self.unpack(kernels), self.linear.weight.astype(self.linear.x.dtype))


def packed_case(seed: int, bits: int = 4) -> PackedCase:
    """Every block size, with and without zero points, one row or more, K not always a multiple of a block or of 8; with
    and without what surrounds a product.
    """
    generator = np.random.default_rng(seed)
    dtype, block = DTYPES[seed % 2], BLOCKS[seed // 2 % len(BLOCKS)]
    gated, activation = bool(seed // 10 % 2), ACTIVATIONS[seed // 20 % 4]
    rows = (1, 2, int(generator.integers(3, 5)), int(generator.integers(5, 20)))[
        int(generator.choice(4, p=[0.4, 0.2, 0.2, 0.2]))
    ]
    features = int(generator.integers(1, 500 if rows > 2 else 2500))
    features -= features % int(generator.choice([1, 8, 16, 128])) if features > 128 else 0
    out = int(generator.integers(1, 100))
    if seed % 50 == 1:  # of another row in the table of choices
        rows, features, out = 1, int(generator.integers(1, 80)), 4097 + int(generator.integers(0, 9))
    if seed % 50 == 13:  # of one that is gated
        rows, features, out = 1, int(generator.integers(1, 300)), 2049 + int(generator.integers(0, 9))
    if seed % 100 in (33, 34):  # of one whose weights wait in shared memory
        rows, features, out = 1, int(generator.integers(1, 1537)), 2064 + 16 * int(generator.integers(0, 2))
    if seed % 50 == 2:
        rows, features, out = 2, int(generator.integers(1, 80)), 4097 + int(generator.integers(0, 9))
    columns, blocks = out * (1 + gated), -(-features // block)

    tensor, perhaps = drawing(generator, dtype)
    most = 1 << bits
    stored = generator.integers(0, most, (columns, blocks * block), dtype=np.uint8)
    scales = tensor(columns, blocks, size=1.6 / most * features**-0.5)
    zeros = generator.integers(0, most, (columns, blocks), dtype=np.uint8) if generator.integers(2) else None
    less = np.full((columns, blocks), most // 2) if zeros is None else zeros
    dense = stored.reshape(columns, blocks, block) - less[..., None].astype(np.float64)
    dense = (dense * scales[..., None].astype(np.float64)).reshape(columns, -1)[:, :features]
    norm = perhaps(features)
    linear = LinearCase(
        tensor(rows, features, size=1 if norm is None else float(generator.choice([0.01, 1, 1000]))),
        norm,
        dense,
        perhaps(columns),
        perhaps(rows, out),
        gated,
        activation,
        *numbers(generator),
        dtype,
    )
    packed = pack_values(stored, bits).reshape(columns, blocks, block * bits // 8)
    return PackedCase(bits, linear, packed, scales, None if zeros is None else pack_values(zeros, bits))
