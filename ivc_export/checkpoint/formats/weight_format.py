"""Defines a weight format: which tensors store a linear layer, how they are converted, and how the graph multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import onnx_ir as ir

from ivc_export.checkpoint.folder import StoredTensor
from ivc_export.dtypes import STORED, FloatName
from ivc_export.errors import UserError


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor of a bundle that is computed from stored tensors, which the bundle does not contain.

    name: canonical. dtype: a key of STORED. pieces: gives its values in row-major order, in arrays of that dtype of a
    few MB; called once, when the tensor is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    pieces: Callable[[], Iterator[npt.NDArray[Any]]]

    @property
    def file(self) -> Path:
        """The file of its first source. The copy of this file will contain the tensor."""
        return self.sources[0].file

    @property
    def length(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * STORED[self.dtype].numpy().itemsize


Source = StoredTensor | DerivedTensor
Layers = Mapping[str, Mapping[str, Source]]
"""For each layer, by its canonical name, the tensors by which it multiplies: by canonical names, stored or derived."""


class Builder(Protocol):
    """What a format may use of the graph to which it adds a layer; see graph.builder.Graph."""

    def op(self, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output."""

    def call(self, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Call an `ivc` function with one output."""

    def weight(
        self, name: str, shape: Sequence[int], stored_shape: Sequence[int] | None = None, dtype: str | None = None
    ) -> ir.Value:
        """A tensor of the layer; dtype: a key of STORED, or None for the graph's."""

    def ints(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant."""

    def to_float32(self, x: ir.Value) -> ir.Value:
        """Begin a stretch in float32. It also turns integers into floats."""

    def to_graph_dtype(self, x: ir.Value) -> ir.Value:
        """End a float32 stretch."""


@dataclass(frozen=True)
class WeightFormat:
    """How the linear layers of one checkpoint are stored.

    name: the name in manifests.
    covers: whether the layer of a canonical name is stored in this format, by JSON files; for estimates, which have no
        tensors.
    read: finds the layers of this format among a checkpoint's tensors, by canonical names. Raises UserError if a layer
        lacks a tensor, or has one that the format does not allow; see find_tensor.
    linear: adds `x W^T + b` to a graph: (g, x, name, out, features, bias), as Graph.linear.
    marker: the end of the name of a tensor that every such layer has, to find layers in an index of shards.
    bundled: the name in manifests of the converted layer, if it is not `name`.
    dtype: the dtype of floats, if an export names none; None leaves them as they are.
    floats: a format that stores the same values as floats, for graphs that take only floats; None if this one does.
    said: a sentence on the format for users.
    """

    name: str
    covers: Callable[[str], bool]
    read: Callable[[Mapping[str, StoredTensor]], Layers]
    linear: Callable[[Builder, ir.Value, str, int, int, bool], ir.Value]
    marker: str = ""
    bundled: str = ""
    dtype: FloatName | None = None
    floats: WeightFormat | None = None
    said: str = ""

    @property
    def manifest_name(self) -> str:
        """The name of its layers in manifests."""
        return self.bundled or self.name

    @property
    def as_floats(self) -> WeightFormat:
        """The format that stores the same values as floats."""
        return self.floats or self

    def of_index(self, names: Collection[str]) -> WeightFormat:
        """The same format, with the layers of an index of shards. names: canonical names of its tensors."""
        if not self.marker:
            return self
        return replace(self, covers=lambda layer: layer + self.marker in names)


def find_tensor(tensors: Mapping[str, StoredTensor], name: str, dtype: str | None = None) -> StoredTensor:
    """Find one of a checkpoint's tensors. dtype: a key of STORED; None allows any.

    Raises:
        UserError: it is missing, or has another dtype.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise UserError(f"the checkpoint has no tensor {name}: download it again, or check that config.json is its own")
    if dtype is not None and tensor.dtype != dtype:
        raise UserError(
            f"{tensor.name} in {tensor.file.name} is {tensor.dtype}, but its format needs {dtype}: download the "
            "checkpoint again"
        )
    return tensor


def tensors_of_no_layer(tensors: Mapping[str, StoredTensor], layers: Layers) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint that no layer of a format is stored in or derived from."""
    taken = set()
    for parts in layers.values():
        for part in parts.values():
            taken |= {(s.file, s.name) for s in (part.sources if isinstance(part, DerivedTensor) else (part,))}
    return {name: tensor for name, tensor in tensors.items() if (tensor.file, tensor.name) not in taken}
