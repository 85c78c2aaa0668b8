"""The checkpoint's tensors as external data of the graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.checkpoint.folder import StoredTensor
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.errors import UserError

FOLDER = "weights"
EMBEDDING = "model.embed_tokens.weight"


def read_values(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """A weight's values, out of a memory map if it is external data, also of a hard-linked file.

    onnx_ir reads no file that has several links, which it cannot tell from an attack; ours are in a bundle's manifest.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tuple(int(size) for size in tensor.shape.numpy())
    return np.memmap(Path(tensor.path), tensor.dtype.numpy(), "r", tensor.offset or 0, shape)


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors under canonical names (`model.*`, `visual.*`, `lm_head.weight`)."""

    tensors: Mapping[str, StoredTensor]
    dtype: FloatName

    def find(self, name: str, shape: Sequence[int]) -> StoredTensor:
        """The stored tensor `name`.

        Raises:
            UserError: it is missing, misshapen, or of another dtype than the rest.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise UserError(
                f"the checkpoint has no tensor {name}: download it again, or check that config.json is its own"
            )
        if tensor.shape != tuple(shape):
            raise UserError(
                f"{tensor.name} in {tensor.file.name} has shape {list(tensor.shape)}, and config.json asks for "
                f"{list(shape)}: check that both belong to the same checkpoint"
            )
        if tensor.dtype != self.dtype:
            known = tensor.dtype in FLOATS
            convert = "convert them all with --dtype float32, float16 or bfloat16"
            mend = convert if known else f"give one in {self.dtype}"
            raise UserError(
                f"{tensor.name} in {tensor.file.name} is {tensor.dtype} and other tensors are {self.dtype}: {mend}"
            )
        return tensor

    def external(self, name: str, shape: Sequence[int], stored_shape: Sequence[int] | None = None) -> ir.ExternalTensor:
        """The tensor `name` as external data of a graph that lies beside the folder `weights`."""
        stored = self.find(name, stored_shape or shape)
        return ir.ExternalTensor(
            f"{FOLDER}/{stored.file.name}",
            stored.offset,
            stored.length,
            FLOATS[self.dtype].onnx,
            shape=ir.Shape(shape),
            name=name,
        )


def main_dtype(tensors: Mapping[str, StoredTensor]) -> FloatName:
    """The dtype of the checkpoint's matrices.

    Raises:
        UserError: it is none that a graph computes in (a quantised checkpoint, say).
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
    """Weights of a model of which only the sizes are known: every request is granted and remembered.

    What a family's graphs ask for is what a checkpoint of it holds.
    """

    def __init__(self, dtype: FloatName = "float32") -> None:
        super().__init__({}, dtype)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def external(self, name: str, shape: Sequence[int], stored_shape: Sequence[int] | None = None) -> ir.ExternalTensor:
        """A tensor that lies nowhere."""
        self.shapes[name] = tuple(stored_shape or shape)
        return ir.ExternalTensor("none", 0, 0, FLOATS[self.dtype].onnx, shape=ir.Shape(shape), name=name)

    def find(self, name: str, shape: Sequence[int]) -> StoredTensor:
        """Nothing is stored."""
        raise NotImplementedError
