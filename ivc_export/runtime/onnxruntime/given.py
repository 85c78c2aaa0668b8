"""Gives weights in memory to onnxruntime."""

from __future__ import annotations

import math

import onnx_ir as ir

from ivc_export.bundle.bundle import Bundle


def stand_in(bundle: Bundle, name: str, tensor: ir.LazyTensor) -> ir.ExternalTensor:
    """A placeholder in a graph for a weight that is passed in memory. It cannot be read from a file."""
    shape, file = [int(extent) for extent in tensor.shape.numpy()], bundle.manifest.embedding.file
    length = int(math.prod(shape) * tensor.dtype.itemsize)
    end = (bundle.folder / file).stat().st_size
    return ir.ExternalTensor(file, end, length, tensor.dtype, shape=ir.Shape(shape), name=name)
