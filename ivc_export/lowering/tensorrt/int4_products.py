"""Packed weights as they are, for our plugin's kernel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import Editor
from ivc_export.lowering.packed import constants_of, drop_weights, packed_products

BITS = 4
"""Of the weights that the kernel takes."""
TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Of what it multiplies them by."""


class MatMulInt4Pass(ir.passes.InPlacePass):
    """Replace each LinearNBits of 4 bits in float16 or bfloat16 by MatMulInt4 of our plugin.

    1. Needs: weights that are constants. Those of 8 bits, and products in float32, stay for DequantiseWeightsPass.
    2. Leaves: no other packed product, but MatMulInt4(x, packed, scales) or MatMulInt4(x, packed, scales, zero_points)
       {block_size, zero_points 0 or 1}. The bytes of packed and zero_points are int32, four at a time: packed [N,
       blocks, block_size / 8], zero_points with zeros behind them where they fill none, [ceil(bytes / 4)].
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Product by product."""
        edit, found = Editor(model.graph), [node for node in packed_products(model) if has_kernel(node)]
        for node in found:
            x, packed, scales, *points = node.inputs
            assert packed is not None
            constants_of(node)
            words = [as_words(model.graph, value) for value in points if value is not None]
            attributes = {"block_size": node.attributes["block_size"].as_int(), "zero_points": len(words)}
            inputs = [x, as_words(model.graph, packed), scales, *words]
            (y,) = edit.op(node, "MatMulInt4", *inputs, domain=IVC_DOMAIN, **attributes)
            y.type, y.shape = ir.TensorType(edit.types[node.outputs[0]]), node.outputs[0].shape
            edit.replace(node.outputs[0], y)
            drop_weights(model, node)
        for name in {node.op_type for node in found} - {node.op_type for node in packed_products(model)}:
            model.functions.pop((IVC_DOMAIN, name, ""), None)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that none is left that it takes."""
        left = [node.name for node in packed_products(model) if has_kernel(node)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is packed still")


def has_kernel(product: ir.Node) -> bool:
    """Whether the kernel has what a packed product needs."""
    scales = product.inputs[2]
    return product.attributes["bits"].as_int() == BITS and scales is not None and scales.dtype in TYPES


def as_words(graph: ir.Graph, stored: ir.Value) -> ir.Value:
    """A constant of bytes as int32, added to the graph once: packed values [N, blocks, words], zero points flat."""
    tensor = stored.const_value
    assert tensor is not None
    name, sizes = f"{stored.name}.words", tensor.shape.numpy()
    shape = (*sizes[:-1], sizes[-1] // 4) if len(sizes) == 3 else (-(-tensor.size // 4),)

    def read() -> ir.TensorProtocol:
        data = read_values(tensor).ravel()
        words = np.pad(data, (0, -len(data) % 4)).view("<i4").reshape(shape)
        return ir.Tensor(words, dtype=ir.DataType.INT32, name=name)

    if name not in graph.initializers:
        lazy = ir.LazyTensor(read, dtype=ir.DataType.INT32, shape=ir.Shape(shape), name=name)
        kind = ir.TensorType(ir.DataType.INT32)
        graph.initializers[name] = ir.val(name, type=kind, shape=ir.Shape(shape), const_value=lazy)
    return graph.initializers[name]
