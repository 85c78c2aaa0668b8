"""Writes layers of packed integers, from any checkpoint format, as the tensors of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.folder import StoredTensor
from ivc_export.checkpoint.formats.floats import float_linear
from ivc_export.checkpoint.formats.nbits import (
    Bytes,
    Floats,
    Packing,
    dequantise,
    pack_blocks,
    pack_values,
    packed_linear,
    unpack_values,
)
from ivc_export.checkpoint.formats.weight_format import DerivedTensor, Layers, WeightFormat, find_tensor
from ivc_export.dtypes import FLOATS
from ivc_export.errors import UserError

Order = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PackedLayer:
    """One linear layer, as a checkpoint stores it.

    name: canonical. values: stored ones, rows of packed bytes [rows, in bits / 8], lowest bits first, in pieces and in
    `order`; from `values_of`. scales: [out, groups], from `scales_of`. zero_points: [out, groups], from
    `zero_points_of`; None without. order: the columns of x; None where they ascend.
    """

    name: str
    out: int
    features: int
    packing: Packing
    values: Callable[[], Iterator[Bytes]]
    values_of: tuple[StoredTensor, ...]
    scales: Callable[[], Floats]
    scales_of: StoredTensor
    zero_points: Callable[[], Bytes] | None = None
    zero_points_of: tuple[StoredTensor, ...] = ()
    order: Order | None = None

    def tensors(self) -> dict[str, DerivedTensor]:
        """The tensors of a bundle for it, by name."""
        p, width = self.packing, self.packing.blocks(self.features)
        block = p.block(self.features)

        def packed() -> Iterator[npt.NDArray[Any]]:
            for rows in self.values():
                yield pack_blocks(unpack_values(rows, p.bits, self.features), p)

        def scales() -> Iterator[npt.NDArray[Any]]:
            yield p.spread(self.checked_scales(), self.features)

        def zero_points() -> Iterator[npt.NDArray[Any]]:
            assert self.zero_points is not None
            yield pack_values(p.spread(self.zero_points(), self.features), p.bits)

        def order() -> Iterator[npt.NDArray[Any]]:
            yield np.arange(self.features, dtype=np.int32) if self.order is None else self.order

        stem, sources = f"{self.name}.weight", self.values_of
        found = [
            DerivedTensor(f"{stem}.packed", "U8", (self.out, width, block * p.bits // 8), sources, packed),
            DerivedTensor(f"{stem}.scales", self.scales_of.dtype, (self.out, width), (self.scales_of,), scales),
        ]
        if p.zero_points:
            shape = (self.out, -(-width * p.bits // 8))
            found.append(DerivedTensor(f"{stem}.zero_points", "U8", shape, self.zero_points_of, zero_points))
        if p.ordered:
            found.append(DerivedTensor(f"{stem}.order", "I32", (self.features,), sources[:1], order))
        return {one.name: one for one in found}

    def floats(self) -> dict[str, DerivedTensor]:
        """Its weight in float32 [out, in], by name."""

        def pieces() -> Iterator[npt.NDArray[Any]]:
            p, scales = self.packing, self.checked_scales()
            zeros = self.zero_points() if self.zero_points is not None else None
            start = 0
            for rows in self.values():
                part = slice(start, start + len(rows))
                points = None if zeros is None else pack_values(p.spread(zeros[part], self.features), p.bits)
                blocks = pack_blocks(unpack_values(rows, p.bits, self.features), p)
                values = dequantise(blocks, p.spread(scales[part], self.features), points, p.bits, self.features)
                if self.order is not None:
                    ordered, values = values, np.empty_like(values)
                    values[:, self.order] = ordered
                yield values
                start = part.stop

        name, sources = f"{self.name}.weight", (*self.values_of, self.scales_of, *self.zero_points_of)
        return {name: DerivedTensor(name, "float32", (self.out, self.features), sources, pieces)}

    def checked_scales(self) -> Floats:
        """Its scales.

        Raises:
            UserError: one is zero, infinite or NaN.
        """
        scales, wide = self.scales(), self.scales().astype(np.float32)
        if not np.isfinite(wide).all() or not wide.all():
            found = "zero" if np.isfinite(wide).all() else "infinite or NaN"
            raise UserError(
                f"{self.scales_of.name} in {self.scales_of.file.name} has scales that are {found}: download the "
                "checkpoint again, or give another"
            )
        return scales


ReadLayer = Callable[[Mapping[str, StoredTensor], str], PackedLayer]
"""Reads the layer of this canonical name from a checkpoint's tensors."""


def packed_format(
    name: str, title: str, packing: Packing, marker: str, covers: Callable[[str], bool], read_layer: ReadLayer
) -> WeightFormat:
    """The format of a checkpoint that packs all its layers in one way.

    title: the format's name for users. marker: the end of the name of a tensor that every such layer has.
    """

    def layers(tensors: Mapping[str, StoredTensor]) -> list[PackedLayer]:
        names = [found.removesuffix(marker) for found in tensors if found.endswith(marker)]
        if not names:
            raise UserError(
                f"the checkpoint holds no tensor *{marker}, but its config.json says that it is quantised ({title}): "
                "download it again, or check that config.json is its own"
            )
        return [read_layer(tensors, one) for one in names]

    def read(tensors: Mapping[str, StoredTensor]) -> Layers:
        return {layer.name: layer.tensors() for layer in layers(tensors)}

    def read_floats(tensors: Mapping[str, StoredTensor]) -> Layers:
        return {layer.name: layer.floats() for layer in layers(tensors)}

    group = "one group per row" if packing.group is None else f"groups of {packing.group}"
    what = f"{title}, {packing.bits} bits, {group}{', zero points' if packing.zero_points else ''}"
    if packing.ordered:
        what += ", reordered by activations"
    before = " before 10" if packing.bits == 4 else ""
    return WeightFormat(
        name,
        covers,
        read,
        partial(packed_linear, packing=packing),
        marker,
        packing.name,
        floats=WeightFormat(
            name,
            covers,
            read_floats,
            float_linear,
            marker,
            "float",
            said=f"weights are quantised ({what}); they become floats, because these graphs hold only floats",
        ),
        said=f"weights are quantised ({what}), and stay so; TensorRT{before} dequantises them",
    )


def whole(tensor: StoredTensor) -> npt.NDArray[Any]:
    """The whole content of a tensor of floats, int32 or int64."""
    kinds: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
    kinds |= {name: one.numpy for name, one in FLOATS.items()}
    stored = bytearray()
    for piece in tensor.bytes_of(1 << 24):
        stored += piece
    found: npt.NDArray[Any] = np.frombuffer(stored, kinds[tensor.dtype]).reshape(tensor.shape)
    return found


def find_shaped(
    tensors: Mapping[str, StoredTensor], name: str, dtype: str | None, shape: tuple[int | None, ...]
) -> StoredTensor:
    """Find a tensor of this dtype and shape, in which None is any size; see find_tensor.

    Raises:
        UserError: it is missing, or has another dtype or shape.
    """
    tensor = find_tensor(tensors, name, dtype)
    fits = len(tensor.shape) == len(shape) and all(w in (None, s) for s, w in zip(tensor.shape, shape, strict=True))
    if not fits or 0 in tensor.shape:
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise UserError(
            f"{tensor.name} in {tensor.file.name} has shape {list(tensor.shape)}, but its layer needs [{wanted}]: "
            "download the checkpoint again, or check that config.json is its own"
        )
    return tensor


def find_scales(tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Find a tensor of scales, which are floats; see find_shaped.

    Raises:
        UserError: see find_shaped; or they are not floats.
    """
    tensor = find_shaped(tensors, name, None, shape)
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{tensor.name} in {tensor.file.name} is {tensor.dtype}, but scales are floats: download the checkpoint "
            "again"
        )
    return tensor


def read_order(tensor: StoredTensor | None, features: int, packing: Packing) -> Order | None:
    """From the group of each value of a row, compute the order that brings them into groups. None if they are in groups
    already.

    Raises:
        UserError: the packing needs an order and there is none, or the groups are not possible.
    """
    if tensor is None:
        return None
    groups, wanted = whole(tensor), np.arange(features) // (packing.group or features)
    if groups.min() < 0 or groups.max() >= packing.groups(features):
        found = groups.min() if groups.min() < 0 else groups.max()
        raise UserError(
            f"{tensor.name} in {tensor.file.name} names group {found}, but "
            f"the layer has groups 0 to {packing.groups(features) - 1}: download the checkpoint again"
        )
    if np.array_equal(groups, wanted):
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], wanted):
        raise UserError(
            f"{tensor.name} in {tensor.file.name} has groups of sizes other than {packing.group}: give another "
            "checkpoint of the model"
        )
    if not packing.ordered:
        raise UserError(
            f"{tensor.name} in {tensor.file.name} orders values by activations, but config.json says that no layer "
            "does: download both again"
        )
    return order


def unpack_words(words: npt.NDArray[np.int32], bits: int) -> Bytes:
    """Unpack int32 words along the last axis, lowest bits first: [..., n] to [..., 32 n / bits]."""
    return unpack_values(np.ascontiguousarray(words).view(np.uint8), bits)
