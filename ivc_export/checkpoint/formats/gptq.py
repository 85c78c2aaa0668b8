"""GPTQ in 4 and 8 bits, as AutoGPTQ and GPTQModel write it.

A layer: `qweight` int32 [in bits / 32, out], values packed along in; `scales` [groups, out]; `qzeros` int32
[groups, out bits / 32], packed along out, one less than they mean in the first version of the format; `g_idx` int32
[in], the group of each. Source: Frantar et al. 2023, and QuantLinear in AutoGPTQ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
from ivc_export.checkpoint.formats.quantisation import Stated, in_decoder, matches, stated
from ivc_export.checkpoint.formats.weight_format import WeightFormat
from ivc_export.errors import UserError

LESS = {"gptq": 1, "gptq_v2": 0}
"""By how much stored zero points are less than their meaning, for each `checkpoint_format`."""


def detect_gptq(checkpoint: Checkpoint) -> WeightFormat | None:
    """The format, if config.json says that a checkpoint has it.

    Raises:
        UserError: this version does not support its settings.
    """
    s = stated(checkpoint, "gptq", "GPTQ")
    if s is None:
        return None
    bits, group = s.value("bits", BITS), s.group()
    symmetric, ordered = s.value("sym", (True, False), True), s.value("desc_act", (True, False), False)
    less = LESS[s.value("checkpoint_format", tuple(LESS), "gptq")]
    head, left_out = s.value("lm_head", (True, False), False), read_left_out(s)
    only = read_only(s)
    packing = Packing(bits, group, not symmetric, ordered and group is not None)

    def covers(layer: str) -> bool:
        if layer == "lm_head":
            return bool(head)
        return in_decoder(layer, left_out) and (not only or any(matches(layer, name) for name in only))

    def read_layer(tensors: Mapping[str, StoredTensor], name: str) -> PackedLayer:
        return read_gptq(tensors, name, packing, less, needs_order=ordered)

    return packed_format("gptq", "GPTQ", packing, ".qweight", covers, read_layer)


def read_left_out(s: Stated) -> list[str]:
    """Patterns of layers that are floats, from GPTQModel's `dynamic`.

    Raises:
        UserError: it gives layers settings of their own.
    """
    dynamic = s.settings.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(pattern.startswith("-:") for pattern in dynamic):
        raise s.unknown("dynamic", dynamic, "one setting for all layers, and layers left out (-:)")
    return [f"re:{pattern.removeprefix('-:')}" for pattern in dynamic]


def read_only(s: Stated) -> list[str]:
    """Names of the packed layers within a block, from `modules_in_block_to_quantize`. Empty if all layers are
    packed."""
    found: Any = s.settings.get("modules_in_block_to_quantize") or []
    parts = found if isinstance(found, list) else []
    return [name for part in parts for name in (part if isinstance(part, list) else [part]) if isinstance(name, str)]


def read_gptq(
    tensors: Mapping[str, StoredTensor], name: str, packing: Packing, less: int, needs_order: bool
) -> PackedLayer:
    """Read one layer. less: see LESS.

    Raises:
        UserError: a tensor is missing, has another dtype or shape, or has values that the format does not allow.
    """
    bits, fill = packing.bits, 32 // packing.bits
    qweight = find_shaped(tensors, f"{name}.qweight", "I32", (None, None))
    features, out = qweight.shape[0] * fill, qweight.shape[1]
    groups = packing.groups(features)
    scales = find_scales(tensors, f"{name}.scales", (groups, out))
    given = tensors.get(f"{name}.qzeros")
    qzeros = None
    if (given is not None and given.length) or packing.zero_points:
        qzeros = find_shaped(tensors, f"{name}.qzeros", "I32", (groups, -(-out // fill)))
    g_idx = None
    if needs_order or f"{name}.g_idx" in tensors:
        g_idx = find_shaped(tensors, f"{name}.g_idx", "I32", (features,))
    order = read_order(g_idx, features, packing)

    def zero_points() -> Bytes:
        assert qzeros is not None
        found = unpack_words(whole(qzeros), bits)[:, :out]
        # readers disagree on whether this is 0, or one more than the largest value
        if less and (found == (1 << bits) - 1).any():
            raise UserError(
                f"{qzeros.name} in {qzeros.file.name} has a zero point of {(1 << bits) - 1}, which means "
                f"{1 << bits} and does not fit into {bits} bits: give a checkpoint of the model in GPTQ's second "
                "version, or a symmetric one"
            )
        return np.ascontiguousarray(found.T) + np.uint8(less)

    def values() -> Iterator[Bytes]:
        if qzeros is not None and not packing.zero_points and (zero_points() != packing.middle).any():
            raise UserError(
                f"{qzeros.name} in {qzeros.file.name} has zero points other than {packing.middle}, but config.json "
                "says sym, which has none: download both again"
            )
        words = whole(qweight)
        for rows in row_pieces(out, features):
            stored = np.ascontiguousarray(words[:, rows].T).view(np.uint8)
            yield stored if order is None else pack_values(unpack_values(stored, bits)[:, order], bits)

    empty = [given] if given is not None and qzeros is None else []
    beside = [tensor for tensor in (g_idx, None if packing.zero_points else qzeros, *empty) if tensor is not None]
    return PackedLayer(
        name,
        out,
        features,
        packing,
        values,
        (qweight, *beside),
        lambda: np.ascontiguousarray(whole(scales).T),
        scales,
        zero_points if packing.zero_points else None,
        (qzeros,) if packing.zero_points and qzeros is not None else (),
        order,
    )
