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
    """A tensor of a bundle that is computed from stored ones, which the bundle does not hold.

    name: canonical. dtype: a key of STORED. pieces: its values in row-major order, in arrays of that dtype of a few MB;
    called once, when the tensor is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]
    pieces: Callable[[], Iterator[npt.NDArray[Any]]]

    @property
    def file(self) -> Path:
        """The file that holds its first source, and whose copy will hold it."""
        return self.sources[0].file

    @property
    def length(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * STORED[self.dtype].numpy().itemsize


Source = StoredTensor | DerivedTensor
Layers = Mapping[str, Mapping[str, Source]]
"""By a layer's canonical name, the tensors that it is multiplied by: by their canonical names, stored or derived."""


class Builder(Protocol):
    """What a format may ask of the graph that it adds a layer to; see graph.builder.Graph."""

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
        """Begin a float32 stretch: integers become floats by this alone."""

    def to_graph_dtype(self, x: ir.Value) -> ir.Value:
        """End a float32 stretch."""


@dataclass(frozen=True)
class WeightFormat:
    """How linear layers of one checkpoint are stored.

    name: what manifests call it.
    covers: whether a layer of this canonical name is stored so, as JSON files say; for estimates, which see no tensor.
    read: the layers among a checkpoint's tensors, by canonical names, that are stored so. Raises UserError where a
        layer lacks a tensor, or has one that the format does not know; see find_tensor.
    linear: adds `x W^T + b` to a graph: (g, x, name, out, features, bias), as Graph.linear.
    marker: the end of the name of a tensor that every such layer has, by which they are known in an index of shards.
    bundled: what manifests call what becomes of a layer, where that is not `name`.
    dtype: what floats become where an export does not say; None leaves them as they are.
    floats: the same layers as floats of the same values, for graphs that take nothing else; None where these are.
    said: what a user should know of it, in a sentence.
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
        """What manifests call a layer of it."""
        return self.bundled or self.name

    @property
    def as_floats(self) -> WeightFormat:
        """The format that gives floats of the same values."""
        return self.floats or self

    def of_index(self, names: Collection[str]) -> WeightFormat:
        """The same, with layers as an index of shards has them. names: canonical, of its tensors."""
        if not self.marker:
            return self
        return replace(self, covers=lambda layer: layer + self.marker in names)


def find_tensor(tensors: Mapping[str, StoredTensor], name: str, dtype: str | None = None) -> StoredTensor:
    """One of a checkpoint's tensors, of this dtype, a key of STORED; of any for None.

    Raises:
        UserError: it is missing, or of another dtype.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise UserError(f"the checkpoint has no tensor {name}: download it again, or check that config.json is its own")
    if dtype is not None and tensor.dtype != dtype:
        raise UserError(
            f"{tensor.name} in {tensor.file.name} is {tensor.dtype}, and its format asks for {dtype}: download the "
            "checkpoint again"
        )
    return tensor


def tensors_of_no_layer(tensors: Mapping[str, StoredTensor], layers: Layers) -> dict[str, StoredTensor]:
    """Those of a checkpoint's tensors that no layer of a format is stored in or derived from."""
    taken = set()
    for parts in layers.values():
        for part in parts.values():
            taken |= {(s.file, s.name) for s in (part.sources if isinstance(part, DerivedTensor) else (part,))}
    return {name: tensor for name, tensor in tensors.items() if (tensor.file, tensor.name) not in taken}
