"""Reads graph files and checks them. A runtime opens the files that a graph names, so names are checked first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from ivc_export.contract.manifest import Manifest
from ivc_export.contract.names import GraphName
from ivc_export.errors import UserError
from ivc_export.files import confined, read_bytes
from ivc_export.lowering import LOWERINGS

MOST_BYTES = 64 << 20
"""The most bytes of a graph without its weights: a hundred times those of the deepest models."""
ADVICE = "export the model again"


def read_graph(folder: Path, name: GraphName, manifest: Manifest) -> ir.Model:
    """Read graph `name` of the bundle in `folder`. Its weights stay in their files.

    Raises:
        UserError: the file is damaged, too large or not the exported one, breaks the contract, or takes weights from a
            file that the manifest does not list, or from beyond its end.
    """
    info = manifest.graphs[name]
    path = confined(folder, info.file, ADVICE)
    content, proto = read_bytes(path, ADVICE, MOST_BYTES), onnx.ModelProto()
    if info.sha256 != hashlib.sha256(content).hexdigest():
        raise UserError(f"{path} is not the graph that was exported: copy the bundle again, or {ADVICE}")
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's exceptions differ by its implementation
        raise UserError(f"{path} is damaged ({error}): {ADVICE}") from error
    weights = {file.file: file.size for file in manifest.weights}
    for tensor, may_be_external in tensors_of(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            problem = find_problem(tensor, weights) if may_be_external else "it has weights where none belong"
            if problem:
                raise UserError(f"{path} cannot be opened ({problem}): {ADVICE}")
    try:
        model = ir.from_proto(proto)
        LOWERINGS[manifest.lowering].verify(name, model, info)
    except Exception as error:  # onnx_ir raises almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged ({reason:.200}): {ADVICE}") from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = folder
    return model


def tensors_of(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Every tensor of a model, with whether it is an initializer of its graph. Only those may be weights."""
    for tensor in model.graph.initializer:
        yield tensor, True
    for sparse in model.graph.sparse_initializer:
        yield from ((sparse.values, False), (sparse.indices, False))
    yield from node_tensors(model.graph.node)
    for function in model.functions:
        yield from node_tensors(function.node)
        yield from attribute_tensors(function.attribute_proto)


def node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """The tensors of nodes' attributes."""
    for node in nodes:
        yield from attribute_tensors(node.attribute)


def attribute_tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """The tensors of attributes, also of the graphs in them."""
    for attribute in attributes:
        for tensor in (attribute.t, *attribute.tensors):
            yield tensor, False
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from ((sparse.values, False), (sparse.indices, False))
        for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            for tensor, _ in tensors_of(onnx.ModelProto(graph=graph)):
                yield tensor, False


def find_problem(tensor: onnx.TensorProto, weights: Mapping[str, int]) -> str | None:
    """What is wrong with the place of a weight, or None.

    weights: size in bytes of each weight file, by its name in the manifest.
    """
    where = {entry.key: entry.value for entry in tensor.external_data}
    file = where.get("location", "")
    if file not in weights:
        return f"{tensor.name} is in {file!r}, which is not a weight file of the manifest"
    try:
        offset, length = int(where.get("offset", 0)), int(where.get("length", -1))
        needed = math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize
    except (ValueError, TypeError) as error:
        return f"{tensor.name}: {error}"
    if min(offset, *tensor.dims) < 0 or length not in (-1, needed) or offset + needed > weights[file]:
        return f"{tensor.name} is not within {file}"
    return None
