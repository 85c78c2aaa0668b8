"""Weights in FP8 (E4M3). They become float16: devices below compute capability 8.9 have no FP8 products.

A layer: `weight` float8 [out, in]; `weight_scale`, one number, or [out, 1], or `weight_scale_inv`, one for each block,
of `weight_block_size`; both multiply. `input_scale` is of activations, which stay floats here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.folder import Checkpoint, StoredTensor
from ivc_export.checkpoint.formats.compressed_tensors import TITLE, weight_settings
from ivc_export.checkpoint.formats.floats import float_linear
from ivc_export.checkpoint.formats.nbits import row_pieces
from ivc_export.checkpoint.formats.packed_layers import whole
from ivc_export.checkpoint.formats.quantisation import Stated, in_decoder, stated
from ivc_export.checkpoint.formats.weight_format import DerivedTensor, Layers, WeightFormat, find_tensor
from ivc_export.dtypes import FLOATS
from ivc_export.errors import UserError

STORED = "F8_E4M3"
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def detect_fp8(checkpoint: Checkpoint) -> WeightFormat | None:
    """The format, if JSON files say that a checkpoint has it.

    Raises:
        UserError: this version does not support its settings.
    """
    if (s := stated(checkpoint, "fp8", "FP8")) is not None:
        return fp8_format(read_block(s))
    if (s := stated(checkpoint, "modelopt", "ModelOpt")) is not None and s.settings.get("quant_algo") == "FP8":
        return fp8_format(None)
    if (s := stated(checkpoint, "compressed-tensors", TITLE)) is not None:
        if s.settings.get("format") != "float-quantized":
            return None
        weights = weight_settings(s)
        weights.value("num_bits", (8,))
        weights.value("type", ("float",))
        weights.value("strategy", ("channel", "tensor"))
        return fp8_format(None)
    if "hf_quant_config.json" in checkpoint.names:
        content = (checkpoint.json("hf_quant_config.json") or {}).get("quantization")
        if isinstance(content, Mapping) and content.get("quant_algo") == "FP8":
            return fp8_format(None)
    return None


def read_block(s: Stated) -> tuple[int, int]:
    """How many rows and columns share a scale.

    Raises:
        UserError: these are not two sizes.
    """
    found = s.settings.get("weight_block_size")
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        raise s.unknown("weight_block_size", found, "two sizes as weight_block_size")
    return found[0], found[1]


def fp8_format(block: tuple[int, int] | None) -> WeightFormat:
    """The format. block: see read_block; None for one scale for each row, or one for all."""
    marker = ".weight_scale" if block is None else ".weight_scale_inv"

    def read(tensors: Mapping[str, StoredTensor]) -> Layers:
        names = [name.removesuffix(marker) for name in tensors if name.endswith(marker)]
        if not names:
            raise UserError(
                f"the checkpoint holds no tensor *{marker}, but its JSON files say that it is quantised (FP8): "
                "download it again, or check that they are its own"
            )
        return {name: read_fp8(tensors, name, marker, block) for name in names}

    said = "weights are FP8 and become float16, or the precision of --dtype; activations stay floats"
    return WeightFormat("fp8", in_decoder, read, float_linear, marker, "float", "float16", said=said)


def read_fp8(
    tensors: Mapping[str, StoredTensor], name: str, marker: str, block: tuple[int, int] | None
) -> dict[str, DerivedTensor]:
    """One layer's weight, in float32.

    Raises:
        UserError: a tensor is missing, or of another dtype or shape.
    """
    weight, scale = find_tensor(tensors, f"{name}.weight", STORED), find_tensor(tensors, name + marker)
    out, features = weight.shape if len(weight.shape) == 2 else (0, 0)
    high, wide = block or (1, features)
    shapes = [(-(-out // high), -(-features // wide))] if block else [(), (1,), (out,), (out, 1)]
    if not out or scale.dtype not in FLOATS or scale.shape not in shapes:
        raise UserError(
            f"{scale.name} in {scale.file.name} is {scale.dtype} of shape {list(scale.shape)}, which does not fit "
            f"{weight.name} of shape {list(weight.shape)}: download the checkpoint again"
        )

    def pieces() -> Iterator[npt.NDArray[Any]]:
        scales = whole(scale).astype(np.float32)
        scales = scales if block else np.broadcast_to(scales.reshape(-1, 1), (out, 1))
        if not np.isfinite(scales).all() or not scales.all():
            raise UserError(
                f"{scale.name} in {scale.file.name} has scales that are zero, infinite or NaN: download the "
                "checkpoint again, or give another"
            )
        stored = np.frombuffer(b"".join(weight.bytes_of(1 << 24)), FP8).reshape(out, features)
        for rows in row_pieces(out, features):
            number = np.arange(rows.start, rows.stop) // high
            of_row = np.repeat(scales[number], wide, axis=1)[:, :features]
            values = stored[rows].astype(np.float32) * of_row
            if not np.isfinite(values).all():
                raise UserError(
                    f"{weight.name} in {weight.file.name} holds values that are infinite or NaN: download it again"
                )
            yield values

    beside = [tensors[key] for key in (f"{name}.input_scale",) if key in tensors]
    derived = DerivedTensor(f"{name}.weight", "float32", (out, features), (weight, scale, *beside), pieces)
    return {derived.name: derived}
