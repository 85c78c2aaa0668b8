"""Turns packed weights into floats, for runtimes without packed products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ivc_export.checkpoint.formats.nbits import dequantise, row_pieces
from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.dtypes import cast
from ivc_export.lowering.edit import Editor
from ivc_export.lowering.packed import constants_of, drop_weights, packed_products


class DequantiseWeightsPass(ir.passes.InPlacePass):
    """Replace each LinearNBits by a Gemm with floats.

    1. Needs: weights that are constants.
    2. Leaves: no call of PACKED_LINEARS; weights of the scales' dtype, computed when they are read.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Product by product."""
        edit, found = Editor(model.graph), packed_products(model)
        for node in found:
            (y,) = edit.op(node, "Gemm", node.inputs[0], float_weight(model.graph, node), transB=1)
            edit.replace(node.outputs[0], y)
            drop_weights(model, node)
            model.functions.pop((IVC_DOMAIN, node.op_type, ""), None)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no packed product is left."""
        left = [node.name for node in packed_products(model)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is packed still")


def float_weight(graph: ir.Graph, product: ir.Node) -> ir.Value:
    """The weight of a packed product as floats, [N, K], added to the graph once."""
    tensors = constants_of(product)
    sizes = {name: product.attributes[name].as_int() for name in ("N", "K", "bits")}
    dtype, name = tensors[1].dtype, f"{str(tensors[0].name).removesuffix('.packed')}.dequantised"

    def read() -> ir.TensorProtocol:
        stored = [read_values(tensor) for tensor in tensors]
        found = np.empty((sizes["N"], sizes["K"]), dtype.numpy())
        for rows in row_pieces(*found.shape):
            packed, scales, *zero_points = (array[rows] for array in stored)
            values = dequantise(packed, scales, zero_points[0] if zero_points else None, sizes["bits"], sizes["K"])
            found[rows] = cast(values, found.dtype, name, "compute in another dtype")
        return ir.Tensor(found, dtype=dtype, name=name)

    if name not in graph.initializers:
        shape = ir.Shape([sizes["N"], sizes["K"]])
        tensor = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
        graph.initializers[name] = ir.val(name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    return graph.initializers[name]
