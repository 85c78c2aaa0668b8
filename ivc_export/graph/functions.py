"""The functions of domain `ivc`. Their bodies consist of standard operators and are in graphs/ops/."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import onnx.parser
import onnx_ir as ir

ResultTypes = int | tuple[ir.DataType, ...]

RESULTS: Mapping[str, ResultTypes] = {
    "Attention": 0,
    "CausalMask": (ir.DataType.BOOL,),
    "CompactGather": 0,
    "EncoderAttention": 0,
    "LinearNBits": 0,
    "LinearNBitsZeroPoints": 0,
    "MixtureOfExperts": 0,
    "RMSNorm": 1,
    "Rotate": 0,
    "RouteExperts": (ir.DataType.FLOAT,),
    "SelectAttended": (ir.DataType.INT32, ir.DataType.FLOAT),
    "SelectTileTokens": (ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.INT32),
    "SelectTokens": (ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.INT32),
    "SelectViewTokens": (ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.INT32),
    "SplitHeads": 0,
    "SpreadRows": 0,
    "WindowAttention": 0,
}
"""Types of each function's outputs: a type, or the number of the input whose type it has."""


PACKED_LINEARS = frozenset(("LinearNBits", "LinearNBitsZeroPoints"))
"""Linear layers whose weights are packed integers."""


@cache
def function(name: str, spelling: str | None = None) -> ir.Function:
    """The `ivc` operator `name` as a function of standard operators, from graphs/ops/`name`.onnxtxt.

    spelling: names another body with the same meaning, from graphs/ops/`name`.`spelling`.onnxtxt. `narrow` has its
    softmax in the type of its inputs; `repeated` repeats keys and values for every head of queries; `sorted` sorts
    where the other counts; `standard` is the operator of opset 23.
    """
    package = Path(__file__).parents[1]
    folders = (package / "ops", package.parent / "graphs" / "ops")  # installed, or in the repository
    file = f"{name}.onnxtxt" if spelling is None else f"{name}.{spelling}.onnxtxt"
    text = next(folder for folder in folders if folder.is_dir()).joinpath(file).read_text(encoding="utf-8")
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
