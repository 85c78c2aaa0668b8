"""Finds the packed products of a graph, and their weights."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.graph.functions import PACKED_LINEARS


def drop_weights(model: ir.Model, product: ir.Node) -> None:
    """Remove a packed product that nothing reads any more, and its weights."""
    weights = product.inputs[1:]
    model.graph.remove(product, safe=True)
    for value in weights:
        if value is not None and not value.uses():
            model.graph.initializers.pop(str(value.name), None)


def packed_products(model: ir.Model) -> list[ir.Node]:
    """Calls of PACKED_LINEARS."""
    return [node for node in model.graph if node.domain == IVC_DOMAIN and node.op_type in PACKED_LINEARS]


def constants_of(product: ir.Node) -> list[ir.TensorProtocol]:
    """The packed values, scales, and zero points if there are any, of a packed product.

    Raises:
        PreconditionError: they are not constants.
    """
    found = [value.const_value for value in product.inputs[1:] if value is not None]
    tensors = [tensor for tensor in found if tensor is not None]
    if len(tensors) < len(product.inputs) - 1:
        raise ir.passes.PreconditionError(f"{product.name} has weights that are no constants")
    return tensors
