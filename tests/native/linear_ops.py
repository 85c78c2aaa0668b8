"""FusedLinear, FusedLinearInt4 and FusedLinearInt8 in onnxruntime sessions of one node, against NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.runtime.onnxruntime.session_options import Provider
from tests.native.custom_ops import DTYPES, session, tensors
from tests.native.linear import ROUNDING, LinearCase
from tests.native.packed import PackedCase

FEW, FEW_PACKED = 2, 8  # rows that one launch multiplies

Operands = dict[str, npt.NDArray[Any] | None]


def run_linear(library: Path, provider: Provider, case: LinearCase, **changed: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """y of FusedLinear on float32 arrays that are cast to the case's type, cast back."""
    operands: Operands = {"x": case.x, "weight": case.weight, "norm": case.norm, "bias": case.bias}
    operands |= {"residual": case.residual} | changed
    return run_node(library, provider, "FusedLinear", case, operands)


def run_node(
    library: Path,
    provider: Provider,
    operator: str,
    case: LinearCase,
    operands: Operands,
    wide: bool = False,
    **more: int,
) -> npt.NDArray[Any]:
    """An operator of such attributes. Operands that are bytes go in as they are, those that are None are left out.

    wide: whether y stays float32.
    """
    given = {name: array for name, array in operands.items() if array is not None}
    typed = {name: name if array.dtype == np.uint8 else f"{name}/typed" for name, array in given.items()}
    attributes: dict[str, Any] = {"activation": case.activation, "gated": int(case.gated), "slope": case.slope}
    attributes |= {"scale": case.scale, "epsilon": case.epsilon} | more
    casts = [helper.make_node("Cast", [n], [t], to=DTYPES[case.dtype]) for n, t in typed.items() if n != t]
    names = [typed.get(name, "") for name in operands]
    while not names[-1]:
        names.pop()
    node = helper.make_node(operator, names, ["y/typed"], domain=IVC_DOMAIN, **attributes)
    back = helper.make_node("Cast", ["y/typed"], ["y"], to=1)
    kinds = {name: TensorProto.UINT8 if array.dtype == np.uint8 else 1 for name, array in given.items()}
    inputs = [tensors(kinds[name], [name], array.ndim)[0] for name, array in given.items()]
    opened = session(library, provider, [*casts, node, back], inputs, tensors(1, ["y"], case.x.ndim))
    feeds = {n: array if array.dtype == np.uint8 else array.astype(np.float32) for n, array in given.items()}
    found: npt.NDArray[Any] = opened.run(None, feeds)[0]
    return found if wide else found.astype(case.x.dtype)


def check_linear(library: Path, provider: Provider, case: LinearCase) -> None:
    """Against float64; of many rows, and behind a layer norm, with what is rounded between steps."""
    apart = len(case.x) > FEW or case.layer_norm
    case.compare(run_linear(library, provider, case), ROUNDING[case.dtype] if apart else 0.0)


def run_packed(library: Path, provider: Provider, case: PackedCase, **changed: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """y of FusedLinearInt4 or FusedLinearInt8 in the same way."""
    linear = case.linear
    operands: Operands = {"x": linear.x, "packed": case.packed, "scales": case.scales, "points": case.points}
    operands |= {"norm": linear.norm, "bias": linear.bias, "residual": linear.residual} | changed
    return run_node(library, provider, f"FusedLinearInt{case.bits}", linear, operands, block_size=case.block_size)


def check_packed(library: Path, provider: Provider, case: PackedCase) -> None:
    """Against float64, with what is rounded between steps; of many rows weights are rounded, too."""
    linear, found = case.linear, run_packed(library, provider, case)
    if len(linear.x) > FEW_PACKED:
        linear = replace(linear, weight=linear.weight.astype(linear.x.dtype))
    linear.compare(found, ROUNDING[linear.dtype])
