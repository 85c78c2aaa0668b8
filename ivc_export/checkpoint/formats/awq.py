"""AWQ in 4 bits, in the layout that AutoAWQ calls GEMM.

A layer: `qweight` int32 [in, out / 8], values packed along out, in an order of their own; `qzeros` int32
[groups, out / 8], the same; `scales` [groups, out]. Source: Lin et al. 2024, and WQLinear_GEMM in AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.folder import Checkpoint, StoredTensor
from ivc_export.checkpoint.formats.nbits import Bytes, Packing, pack_values, row_pieces
from ivc_export.checkpoint.formats.packed_layers import (
    PackedLayer,
    find_scales,
    find_shaped,
    packed_format,
    unpack_words,
    whole,
)
from ivc_export.checkpoint.formats.quantisation import in_decoder, stated
from ivc_export.checkpoint.formats.weight_format import WeightFormat

BITS = 4
FILL = 32 // BITS
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of a word for each of its nibbles, lowest first."""


def detect_awq(checkpoint: Checkpoint) -> WeightFormat | None:
    """The format, if config.json says that a checkpoint has it.

    Raises:
        UserError: this version does not support its settings.
    """
    s = stated(checkpoint, "awq", "AWQ")
    if s is None:
        return None
    s.value("bits", (BITS,))
    s.value("zero_point", (True,), True)
    s.value("version", ("gemm", "GEMM"), "gemm")
    packing, left_out = Packing(BITS, s.group(), zero_points=True), s.texts("modules_to_not_convert")

    def covers(layer: str) -> bool:
        return in_decoder(layer, left_out)

    def read_layer(tensors: Mapping[str, StoredTensor], name: str) -> PackedLayer:
        return read_awq(tensors, name, packing)

    return packed_format("awq", "AWQ", packing, ".qweight", covers, read_layer)


def read_awq(tensors: Mapping[str, StoredTensor], name: str, packing: Packing) -> PackedLayer:
    """One layer.

    Raises:
        UserError: a tensor is missing, or of another dtype or shape.
    """
    qweight = find_shaped(tensors, f"{name}.qweight", "I32", (None, None))
    features, out = qweight.shape[0], qweight.shape[1] * FILL
    groups = packing.groups(features)
    scales = find_scales(tensors, f"{name}.scales", (groups, out))
    qzeros = find_shaped(tensors, f"{name}.qzeros", "I32", (groups, out // FILL))

    def values() -> Iterator[Bytes]:
        words = whole(qweight)
        for columns in row_pieces(out // FILL, features * FILL):
            yield pack_values(np.ascontiguousarray(unpack_columns(words[:, columns]).T), BITS)

    return PackedLayer(
        name,
        out,
        features,
        packing,
        values,
        (qweight,),
        lambda: np.ascontiguousarray(whole(scales).T),
        scales,
        lambda: np.ascontiguousarray(unpack_columns(whole(qzeros)).T),
        (qzeros,),
    )


def unpack_columns(words: npt.NDArray[np.int32]) -> Bytes:
    """[rows, n] words as [rows, 8 n] values, columns in their order."""
    nibbles = unpack_words(words, BITS).reshape(len(words), -1, FILL)
    return nibbles[:, :, np.argsort(COLUMN_OF_NIBBLE)].reshape(len(words), -1)
