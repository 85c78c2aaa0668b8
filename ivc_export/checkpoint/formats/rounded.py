"""Writes linear layers of floats that an export rounds to 4 or 8 bits as the tensors of a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.checkpoint.folder import StoredTensor
from ivc_export.checkpoint.formats.nbits import Bytes, Packing, pack_blocks, pack_values, packed_linear, row_pieces
from ivc_export.checkpoint.formats.packed_layers import whole
from ivc_export.checkpoint.formats.rounding import (
    PIECE,
    Rounding,
    Wide,
    find_grid,
    importance_of,
    round_values,
    side_by_side,
)
from ivc_export.checkpoint.formats.weight_format import DerivedTensor, WeightFormat
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.errors import UserError

ROUNDED = "rounded"


class RoundedLayer:
    """One layer. It keeps its grid from the time its first tensor is written until its values, the last, are written.

    stem: the beginning of its tensors' names. weight: [out, in]. dtype: of scales. norm: the weight of an RMSNorm
    before it, or None.
    """

    def __init__(
        self,
        stem: str,
        weight: StoredTensor,
        packing: Packing,
        dtype: FloatName,
        norm: StoredTensor | None = None,
        search: bool = True,
    ) -> None:
        self.stem, self.weight, self.packing, self.dtype, self.search = stem, weight, packing, dtype, search
        self.norm = norm
        self._grid: Rounding | None = None

    def tensors(self) -> dict[str, DerivedTensor]:
        """The tensors of a bundle for it, by name."""
        p, (out, features) = self.packing, self.weight.shape
        blocks, block, sources = p.blocks(features), p.block(features), (self.weight,)
        found = [DerivedTensor(f"{self.stem}.scales", self.dtype, (out, blocks), sources, self._scales)]
        if p.zero_points:
            shape = (out, -(-blocks * p.bits // 8))
            found.append(DerivedTensor(f"{self.stem}.zero_points", "U8", shape, sources, self._points))
        size = block * p.bits // 8
        found.append(DerivedTensor(f"{self.stem}.packed", "U8", (out, blocks, size), sources, self._packed))
        return {one.name: one for one in found}

    def grid(self) -> Rounding:
        """Its scales, [out, blocks], in their dtype, and zero points less the packing's middle, int8, or 0 for all.

        Raises:
            UserError: a weight is infinite or NaN.
        """
        if self._grid is None:
            norm = None if self.norm is None else whole(self.norm).astype(np.float32)
            importance = importance_of(norm, self.weight.shape[1])
            numpy = FLOATS[self.dtype].numpy

            def find(values: Wide) -> Rounding:
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{self.weight.name} in {self.weight.file.name} has values that are infinite or NaN: "
                        "download the checkpoint again, or give another"
                    )
                scales, points = find_grid(values, self.packing, importance, numpy, self.search)
                kept = points.astype(np.int8) if self.packing.zero_points else np.zeros((len(points), 1), np.int8)
                return Rounding(scales.astype(numpy), kept)

            parts = list(side_by_side(find, self._rows()))
            self._grid = Rounding(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            if not np.isfinite(self._grid.scales.astype(np.float32)).all():
                raise UserError(
                    f"{self.weight.name} in {self.weight.file.name} has values whose scales do not fit {self.dtype}: "
                    "use --dtype bfloat16 or float32"
                )
        return self._grid

    def _rows(self) -> Iterator[Wide]:
        """Its weight in float32, some rows at a time."""
        for rows in self.weight.rows():
            for part in row_pieces(len(rows), rows.shape[1], PIECE):
                yield rows[part].astype(np.float32)

    def _scales(self) -> Iterator[npt.NDArray[Any]]:
        yield self.grid().scales

    def _points(self) -> Iterator[npt.NDArray[Any]]:
        yield pack_values(
            (self.grid().points.astype(np.int16) + self.packing.middle).astype(np.uint8), self.packing.bits
        )

    def _packed(self) -> Iterator[npt.NDArray[Any]]:
        grid = self.grid()

        def parts() -> Iterator[tuple[Wide, Rounding]]:
            start = 0
            for values in self._rows():
                rows = slice(start, start + len(values))
                yield values, Rounding(grid.scales[rows].astype(np.float32), grid.points[rows].astype(np.float32))
                start = rows.stop

        def pack(part: tuple[Wide, Rounding]) -> Bytes:
            return pack_blocks(round_values(part[0], self.packing, part[1]), self.packing)

        yield from side_by_side(pack, parts())
        self._grid = None


def rounded_format(packing: Packing) -> WeightFormat:
    """The format by which such layers are multiplied."""
    linear = partial(packed_linear, packing=packing)
    return WeightFormat(ROUNDED, lambda layer: True, lambda tensors: {}, linear, bundled=packing.name)


def copied(tensor: StoredTensor, name: str) -> DerivedTensor:
    """A stored tensor that stays in addition to those derived from it. name: canonical."""
    return DerivedTensor(name, tensor.dtype, tensor.shape, (tensor,), tensor.rows)
