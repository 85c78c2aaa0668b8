"""compressed-tensors' `pack-quantized`, in 4 and 8 bits, as llm-compressor writes it.

A layer: `weight_packed` int32 [out, in bits / 32], packed along in, each value 2^(bits - 1) more than what it means;
`weight_scale` [out, groups]; `weight_zero_point` int32 [out bits / 32, groups], packed along out, likewise;
`weight_shape` int64 [2]; `weight_g_idx` int32 [in], the group of each where activations were ordered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ivc_export.checkpoint.folder import Checkpoint, StoredTensor
from ivc_export.checkpoint.formats.nbits import BITS, Bytes, Packing, pack_values, row_pieces, unpack_values
from ivc_export.checkpoint.formats.packed_layers import (
    PackedLayer,
    find_scales,
    find_shaped,
    packed_format,
    read_order,
    unpack_words,
    whole,
)
from ivc_export.checkpoint.formats.quantisation import Stated, in_decoder, stated
from ivc_export.checkpoint.formats.weight_format import WeightFormat
from ivc_export.errors import UserError

TITLE = "compressed-tensors"
NONE = (None,)


def detect_pack_quantized(checkpoint: Checkpoint) -> WeightFormat | None:
    """The format, if config.json says that a checkpoint has it.

    Raises:
        UserError: this version does not support its settings.
    """
    s = stated(checkpoint, "compressed-tensors", TITLE)
    if s is None or s.settings.get("format") != "pack-quantized":
        return None
    packing, ordered = read_packing(s)
    left_out = s.texts("ignore")

    def covers(layer: str) -> bool:
        return in_decoder(layer, left_out)

    def read_layer(tensors: Mapping[str, StoredTensor], name: str) -> PackedLayer:
        return read_packed(tensors, name, packing, ordered)

    return packed_format("compressed-tensors", TITLE, packing, ".weight_packed", covers, read_layer)


def weight_settings(s: Stated) -> Stated:
    """The settings of weights in `config_groups`, which must be the same in all groups.

    Raises:
        UserError: they differ, there are none, or activations are quantised.
    """
    groups = s.part("config_groups")
    found = [groups.part(name) for name in groups.settings]
    if not found:
        raise s.unknown("config_groups", groups.settings, "weights of one kind")
    weights = [group.part("weights") for group in found]
    if any(one.settings != weights[0].settings for one in weights):
        raise s.unknown("config_groups", f"of {len(found)} kinds", "weights of one kind")
    return weights[0]


def read_packing(s: Stated) -> tuple[Packing, bool]:
    """How layers are packed, and whether each stores the group of its values.

    Raises:
        UserError: this version does not support the settings.
    """
    weights = weight_settings(s)
    groups = s.part("config_groups")
    for name in groups.settings:
        for key in ("input_activations", "output_activations"):
            groups.part(name).value(key, NONE)
    weights.value("type", ("int",), "int")
    bits, symmetric = weights.value("num_bits", BITS), weights.value("symmetric", (True, False), True)
    strategy = weights.value("strategy", ("group", "channel"), "group")
    ordered = weights.value("actorder", (None, False, "group", "weight", "static", "dynamic")) in ("group", "dynamic")
    group = weights.group() if strategy == "group" else None
    return Packing(bits, group, not symmetric, ordered and group is not None), ordered


def read_packed(tensors: Mapping[str, StoredTensor], name: str, packing: Packing, ordered: bool) -> PackedLayer:
    """Read one layer.

    Raises:
        UserError: a tensor is missing, has another dtype or shape, or has values that the format does not allow.
    """
    bits, fill = packing.bits, 32 // packing.bits
    packed = find_shaped(tensors, f"{name}.weight_packed", "I32", (None, None))
    size = find_shaped(tensors, f"{name}.weight_shape", "I64", (2,))
    out, features = (int(extent) for extent in whole(size))
    if (out, -(-features // fill)) != packed.shape or features * bits % 8:
        raise UserError(
            f"{packed.name} in {packed.file.name} has shape {list(packed.shape)}, but {size.name} says "
            f"{[out, features]}: download the checkpoint again"
        )
    groups = packing.groups(features)
    scales = find_scales(tensors, f"{name}.weight_scale", (out, groups))
    points = None
    if packing.zero_points or f"{name}.weight_zero_point" in tensors:
        points = find_shaped(tensors, f"{name}.weight_zero_point", "I32", (-(-out // fill), groups))
    g_idx = None
    if ordered or f"{name}.weight_g_idx" in tensors:
        g_idx = find_shaped(tensors, f"{name}.weight_g_idx", "I32", (features,))
    order = read_order(g_idx, features, packing)

    def zero_points() -> Bytes:
        assert points is not None
        return np.ascontiguousarray(unpack_words(whole(points).T, bits)[:, :out].T)

    def values() -> Iterator[Bytes]:
        if points is not None and not packing.zero_points and (zero_points() != packing.middle).any():
            raise UserError(
                f"{points.name} in {points.file.name} has zero points, but config.json says symmetric: download both "
                "again"
            )
        words = whole(packed)
        for rows in row_pieces(out, features):
            stored = np.ascontiguousarray(words[rows]).view(np.uint8)[:, : features * bits // 8]
            yield stored if order is None else pack_values(unpack_values(stored, bits)[:, order], bits)

    beside = [tensor for tensor in (g_idx, None if packing.zero_points else points) if tensor is not None]
    return PackedLayer(
        name,
        out,
        features,
        packing,
        values,
        (packed, size, *beside),
        lambda: whole(scales),
        scales,
        zero_points if packing.zero_points else None,
        (points,) if packing.zero_points and points is not None else (),
        order,
    )
