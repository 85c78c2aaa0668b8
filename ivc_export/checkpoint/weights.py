"""Gives the checkpoint's tensors to the graphs as external data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.checkpoint.folder import StoredTensor
from ivc_export.checkpoint.formats.floats import FLOAT
from ivc_export.checkpoint.formats.weight_format import (
    DerivedTensor,
    Layers,
    WeightFormat,
    find_tensor,
    tensors_of_no_layer,
)
from ivc_export.dtypes import FLOATS, STORED, FloatName
from ivc_export.errors import UserError

FOLDER = "weights"
EMBEDDING = "model.embed_tokens.weight"
TABLE = "model.embed_tokens.table"
"""The name of token embeddings in 8 bits that are not also a product's weight: `<this>.packed` and `<this>.scales`."""


def read_values(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """Read a weight's values. External data is read from a memory map, also from a file with several links.

    onnx_ir refuses files with several links, because an attack can look like this. Our files are listed in a bundle's
    manifest.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tuple(int(size) for size in tensor.shape.numpy())
    return np.memmap(Path(tensor.path), tensor.dtype.numpy(), "r", tensor.offset or 0, shape)


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors under canonical names (`model.*`, `visual.*`, `lm_head.weight`).

    formats: of linear layers that are not plain floats, by their names. derived: tensors of such layers that exist
    nowhere until they are written, by their names. spare: names of tensors that a graph may leave out: tools that
    quantise layers add zeros as biases to layers without a bias.
    """

    tensors: Mapping[str, StoredTensor]
    dtype: FloatName
    formats: Mapping[str, WeightFormat] = field(default_factory=dict)
    derived: Mapping[str, DerivedTensor] = field(default_factory=dict)
    spare: frozenset[str] = frozenset()

    @staticmethod
    def of(tensors: Mapping[str, StoredTensor], layers: Layers, stored: WeightFormat) -> Weights:
        """The weights of a checkpoint with these tensors, in which `layers` are stored as `stored` says.

        Raises:
            UserError: see main_dtype.
        """
        parts = {name: part for own in layers.values() for name, part in own.items()}
        others = tensors_of_no_layer(tensors, layers)
        biases = [name for layer in layers if (name := f"{layer}.bias") in others]
        spare = frozenset(name for name in biases if stored.marker and is_zero(others[name]))
        kept = {name: part for name, part in parts.items() if isinstance(part, StoredTensor)}
        derived = {name: part for name, part in parts.items() if isinstance(part, DerivedTensor)}
        return Weights(others | kept, main_dtype(others), dict.fromkeys(layers, stored), derived, spare)

    def format_of(self, layer: str) -> WeightFormat:
        """How the linear layer of this canonical name is stored."""
        return self.formats.get(layer, FLOAT)

    def check_floats(self, place: str) -> None:
        """Check that every format can give floats, which PyTorch needs. place: the checkpoint's name for users.

        Raises:
            UserError: a layer's format cannot.
        """
        unknown = {
            name: stored for name, stored in self.formats.items() if stored.as_floats.manifest_name != FLOAT.name
        }
        for layer, stored in unknown.items():
            raise UserError(
                f"{place} stores {len(unknown)} layers as {stored.name} (such as {layer}), which this command does "
                "not read on PyTorch: give a checkpoint that holds the same values as floats"
            )

    def find(self, name: str, shape: Sequence[int], dtype: str | None = None) -> StoredTensor:
        """The stored tensor `name`. dtype: a key of STORED; None for the dtype of the weights.

        Raises:
            UserError: it is missing, or has another shape or dtype.
        """
        tensor = find_tensor(self.tensors, name, dtype)
        if tensor.shape != tuple(shape):
            raise UserError(
                f"{tensor.name} in {tensor.file.name} has shape {list(tensor.shape)}, but config.json says "
                f"{list(shape)}: check that both belong to the same checkpoint"
            )
        if dtype is None and tensor.dtype != self.dtype:
            known = tensor.dtype in FLOATS
            convert = "convert them all with --dtype float32, float16 or bfloat16"
            mend = convert if known else f"give one in {self.dtype}"
            raise UserError(
                f"{tensor.name} in {tensor.file.name} is {tensor.dtype}, but other tensors are {self.dtype}: {mend}"
            )
        return tensor

    def external(
        self, name: str, shape: Sequence[int], stored_shape: Sequence[int] | None = None, dtype: str | None = None
    ) -> ir.ExternalTensor:
        """The tensor `name` as external data of a graph beside the folder `weights`; see `find`."""
        stored = self.find(name, stored_shape or shape, dtype)
        return ir.ExternalTensor(
            f"{FOLDER}/{stored.file.name}",
            stored.offset,
            stored.length,
            STORED[dtype or self.dtype],
            shape=ir.Shape(shape),
            name=name,
        )


def is_zero(tensor: StoredTensor) -> bool:
    """Whether all of its bits are zero."""
    return not any(any(piece) for piece in tensor.bytes_of(1 << 20))


def main_dtype(tensors: Mapping[str, StoredTensor]) -> FloatName:
    """The dtype of the checkpoint's matrices.

    Raises:
        UserError: no graph computes in it (for example in a quantised checkpoint).
    """
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.length
    dtype = max(sizes, key=lambda name: sizes[name], default="nothing")
    for known in FLOATS:
        if known == dtype:
            return known
    raise UserError(f"the checkpoint's weights are {dtype}: give one in float32, float16 or bfloat16")


class PlannedWeights(Weights):
    """Weights of a model of which only the sizes are known. Every request is granted and remembered.

    A checkpoint of a family contains what the family's graphs request.

    stored: how linear layers are stored that it covers. formats: of other layers, by name. shapes, lengths: of the
    requested tensors, by name; lengths in bytes.
    """

    def __init__(
        self,
        dtype: FloatName = "float32",
        stored: WeightFormat = FLOAT,
        formats: Mapping[str, WeightFormat] | None = None,
    ) -> None:
        super().__init__({}, dtype, formats or {})
        self.stored = stored
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.lengths: dict[str, int] = {}

    def format_of(self, layer: str) -> WeightFormat:
        """The layer's own format, or the checkpoint's if it covers the layer."""
        return self.formats.get(layer) or (self.stored if self.stored.covers(layer) else FLOAT)

    def external(
        self, name: str, shape: Sequence[int], stored_shape: Sequence[int] | None = None, dtype: str | None = None
    ) -> ir.ExternalTensor:
        """A tensor without values."""
        onnx = STORED[dtype or self.dtype]
        self.shapes[name] = tuple(stored_shape or shape)
        self.lengths[name] = math.prod(shape) * onnx.numpy().itemsize
        return ir.ExternalTensor("none", 0, 0, onnx, shape=ir.Shape(shape), name=name)

    def find(self, name: str, shape: Sequence[int], dtype: str | None = None) -> StoredTensor:
        """Always fails: nothing is stored."""
        raise NotImplementedError
