"""Products with what surrounds them, by the kernels' C interface from Python, and NumPy's answers in float64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.native.attention import STORED, Doubles, error, on_device
from tests.native.kernels import TYPES, Kernels

ACTIVATIONS = ("none", "swish", "gelu", "gelu_tanh")
DTYPES = ("float16", "bfloat16", "float32")
ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Of the answer: half a unit in the last place of 1, with a little more where that is no more than sums cost."""
SUMMED = 2.0**-19  # what sums in float32 may cost, of the sum of products' magnitudes
STEEPEST = 1.2  # of activations, and of x sigmoid(slope x) at any slope


class IvcLinear(ctypes.Structure):
    """As in ivc_types.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "features", "out", "type", "activation", "gated")),
        *((name, ctypes.c_float) for name in ("slope", "scale", "epsilon")),
        ("layer_norm", ctypes.c_int32),
        ("wide", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class LinearCase:
    """x [rows, K]; norm [K], or [2 K] of a layer norm; weight [N, K], or [2 N, K] where gated; bias, one a row of
    weight; residual [rows, N]."""

    x: npt.NDArray[Any]
    norm: npt.NDArray[Any] | None
    weight: npt.NDArray[Any]
    bias: npt.NDArray[Any] | None
    residual: npt.NDArray[Any] | None
    gated: bool
    activation: str
    slope: float
    scale: float
    epsilon: float
    dtype: str

    @property
    def out(self) -> int:
        return len(self.weight) // (1 + self.gated)

    @property
    def layer_norm(self) -> bool:
        return self.norm is not None and len(self.norm) == 2 * self.x.shape[1]

    def struct(self, **changed: int) -> IvcLinear:
        found = IvcLinear(*self.x.shape, self.out, TYPES[self.dtype], ACTIVATIONS.index(self.activation), self.gated)
        found.slope, found.scale, found.epsilon = self.slope, self.scale, self.epsilon
        found.layer_norm = self.layer_norm
        for name, value in changed.items():
            setattr(found, name, value)
        return found

    def run(self, kernels: Kernels, **changed: int) -> npt.NDArray[Any]:
        """y [rows, N] in one call; changed: extents that the kernels are told instead."""
        tensors = (self.x, self.norm, self.weight, self.bias, self.residual)
        return self._call(kernels, "ivcFusedLinear", self.struct(**changed), tensors, self.out)

    def run_apart(self, kernels: Kernels) -> npt.NDArray[Any]:
        """y [rows, N] of the norm, NumPy's product in the case's type, and the activation."""
        x = self.x
        if self.norm is not None:
            x = self._call(kernels, "ivcNormRows", self.struct(), (x, self.norm), x.shape[1])
        product = (self.scale * x.astype(np.float64) @ self.weight.astype(np.float64).T).astype(self.x.dtype)
        return self._call(kernels, "ivcActivate", self.struct(), (product, self.bias, self.residual), self.out)

    def _call(
        self, kernels: Kernels, name: str, struct: IvcLinear, tensors: tuple[npt.NDArray[Any] | None, ...], width: int
    ) -> npt.NDArray[Any]:
        placed = [None if one is None else on_device(kernels, one) for one in tensors]
        dtype = np.dtype(np.float32) if struct.wide else self.x.dtype
        y = on_device(kernels, np.full((len(self.x), width), np.nan, dtype))
        pointers = [0 if one is None else kernels.address(one) for one in (*placed, y)]
        kernels.call(name, ctypes.pointer(struct), *map(ctypes.c_void_p, pointers))
        found: npt.NDArray[Any] = kernels.to_host(y).view(dtype)
        return found

    def check(self, kernels: Kernels) -> float:
        """Against float64; returns the largest error, in units of what rounding may cost. Layer norms are apart."""
        return self.check_apart(kernels) if self.layer_norm else self.compare(self.run(kernels), 0.0)

    def check_apart(self, kernels: Kernels) -> float:
        """The same of separate steps, whose results are rounded in between: of normed rows, and of products."""
        return self.compare(self.run_apart(kernels), ROUNDING[self.dtype])

    def compare(self, found: npt.NDArray[Any], between: float) -> float:
        x, weight, unit = self.x.astype(np.float64), self.weight.astype(np.float64), ROUNDING[self.dtype]
        lost = np.zeros_like(x)  # by the mean, in units of what sums cost
        if self.norm is not None:
            norm, *added = np.split(self.norm.astype(np.float64), 1 + self.layer_norm)
            mean = x.mean(axis=1, keepdims=True) if self.layer_norm else np.zeros((len(x), 1))
            norm = norm / np.sqrt(((x - mean) ** 2).mean(axis=1, keepdims=True) + self.epsilon)
            lost = np.abs(mean * norm) / 8 + sum(map(np.abs, added))
            x = (x - mean) * norm + sum(added)
        bias = np.zeros(len(weight)) if self.bias is None else self.bias.astype(np.float64)
        product = self.scale * x @ weight.T
        lost = SUMMED * lost + (SUMMED + between) * np.abs(x)
        lost = abs(self.scale) * lost @ np.abs(weight).T + between * np.abs(product)
        lost = lost + SUMMED * np.abs(product + bias)
        gate, up = np.split(product + bias, 2, axis=1) if self.gated else (product + bias, 1.0)
        lost_gate, lost_up = np.split(lost, 2, axis=1) if self.gated else (lost, 0.0)
        wanted = activated(gate, self.activation, self.slope)
        allowed = STEEPEST * lost_gate * np.abs(up) + np.abs(wanted) * lost_up
        wanted = wanted * up
        if self.residual is not None:
            wanted = wanted + self.residual.astype(np.float64)
        allowed = allowed + unit * np.abs(wanted) + 2.0**-24
        assert found.shape == wanted.shape
        return error(found.astype(np.float64) / allowed, wanted / allowed, 1.0)


def activated(x: Doubles, activation: str, slope: float) -> Doubles:
    """The activation in float64."""
    if activation == "swish":
        found: Doubles = x / (1 + np.exp(-slope * x))
    elif activation == "gelu":
        found = x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))) / 2
    elif activation == "gelu_tanh":
        found = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    else:
        found = x
    return found


def drawing(
    generator: np.random.Generator, dtype: str
) -> tuple[Callable[..., npt.NDArray[Any]], Callable[..., npt.NDArray[Any] | None]]:
    """What draws a tensor (shape, size=1), and what draws one (shape) or none."""

    def tensor(*shape: int, size: float = 1) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = generator.standard_normal(shape) * size
        return found.astype(STORED[dtype])

    return tensor, lambda *shape: tensor(*shape) if generator.integers(2) else None


def numbers(generator: np.random.Generator) -> tuple[float, float, float]:
    """A slope, a scale and an epsilon."""
    slope, scale, epsilon = (float(generator.choice(some)) for some in ([1, 1.702], [1, 0.0625], [1e-6, 1e-5]))
    return slope, scale, epsilon


def linear_case(seed: int) -> LinearCase:
    """Every activation, gated or not, with a norm of each kind or none, with and without bias and residual; K not
    always in octets, and rows of layer norms not always around 0."""
    generator = np.random.default_rng(seed)
    dtype, activation, gated = DTYPES[seed % 3], ACTIVATIONS[seed // 3 % 4], bool(seed // 12 % 2)
    rows = (1, int(generator.integers(2, 5)), int(generator.integers(5, 9)), int(generator.integers(9, 40)))[
        int(generator.choice(4, p=[0.4, 0.2, 0.2, 0.2]))
    ]
    features = int(generator.choice([generator.integers(1, 300), 8 * generator.integers(1, 200)]))
    out = int(generator.integers(1, 120))
    if seed % 50 == 1:  # of another row in the table of choices
        rows, features, out = 1, 8 * int(generator.integers(1, 30)), 4097 + int(generator.integers(0, 9))
    if seed % 50 == 2:
        rows, features, out = 1, 8 * int(generator.integers(1, 60)), 1537 + int(generator.integers(0, 9))

    if seed % 50 == 3:
        rows, features, out = 1, 8 * int(generator.integers(1, 30)), 16384 + int(generator.integers(0, 9))
    if seed % 50 == 4:  # rows longer than a block's registers, or than few of them
        rows, features, out = 1, int(generator.choice([10248, 6152])), int(generator.integers(1, 40))

    tensor, perhaps = drawing(generator, dtype)
    norm = perhaps(features)
    size = 1 if norm is None else float(generator.choice([0.01, 1, 1000]))  # squares beyond float16's range
    x = tensor(rows, features, size=size)
    if norm is not None and (seed // 24 % 2 or seed % 100 == 4):
        norm = np.concatenate([norm, tensor(features)])
        x = (x + size * generator.choice([0, 3, -50])).astype(x.dtype)
    return LinearCase(
        x,
        norm,
        tensor(out * (1 + gated), features, size=features**-0.5),
        perhaps(out * (1 + gated)),
        perhaps(rows, out),
        gated,
        activation,
        *numbers(generator),
        dtype,
    )
