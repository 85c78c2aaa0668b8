"""Turns packed weights into DequantizeLinear in blocks (opset 21), which TensorRT from 10 on fuses into products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.checkpoint.formats.nbits import unpack_values
from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.dtypes import cast
from ivc_export.graph.functions import PACKED_LINEARS
from ivc_export.lowering.edit import Editor
from ivc_export.lowering.packed import constants_of, drop_weights, packed_products

BITS = 4
"""TensorRT takes no INT8 in blocks."""
Arrays = list[npt.NDArray[Any]]


class BlockDequantisePass(ir.passes.InPlacePass):
    """Replace each LinearNBits of 4 bits by a product with a DequantizeLinear. The weights stay in 4 bits.

    The operator's weights are signed, and TensorRT takes no zero points. So weights are the stored values less 8. If a
    block's zero point is not 8, a second product adds the difference. The sum over a block of (q - z) s x is the sum of
    (q - 8) s x, plus (8 - z) s times the block's sum of x. This is exact in real numbers, and nothing is clamped. Block
    sums are in float32, the second product is in x's type.

    1. Needs: weights that are constants. Those of 8 bits, and rows that blocks do not fill, stay for
       DequantiseWeightsPass.
    2. Leaves: no other packed product. Weights [K, N] in blocks along K, as modelopt writes them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Product by product."""
        edit, found = Editor(model.graph), [node for node in packed_products(model) if is_taken(node)]
        for node in found:
            edit.replace(node.outputs[0], in_blocks(edit, node))
            drop_weights(model, node)
        for name in PACKED_LINEARS if found else ():
            if not any(node.op_type == name for node in packed_products(model)):
                model.functions.pop((IVC_DOMAIN, name, ""), None)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that none of the products that it takes is left."""
        left = [node.name for node in packed_products(model) if is_taken(node)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is packed still")


def is_taken(product: ir.Node) -> bool:
    """Whether a packed product has 4 bits and full blocks."""
    bits, block, features = (product.attributes[name].as_int() for name in ("bits", "block_size", "K"))
    return bits == BITS and features % block == 0


def in_blocks(edit: Editor, node: ir.Node) -> ir.Value:
    """The product, with its weights in blocks."""
    x, tensors = node.inputs[0], constants_of(node)
    out, features, block = (node.attributes[name].as_int() for name in ("N", "K", "block_size"))
    blocks, dtype = features // block, tensors[1].dtype
    stem = str(tensors[0].name).removesuffix(".packed")

    def lazy(name: str, kind: ir.DataType, shape: tuple[int, ...], make: Callable[[Arrays], Any]) -> ir.Value:
        """A constant that is made of the stored ones when it is read."""

        def read() -> ir.TensorProtocol:
            return ir.Tensor(make([read_values(tensor) for tensor in tensors]), dtype=kind, name=f"{stem}.{name}")

        known = edit.graph.initializers.get(f"{stem}.{name}")
        if known is not None:
            return known
        tensor = ir.LazyTensor(read, dtype=kind, shape=ir.Shape(shape), name=f"{stem}.{name}")
        value = ir.val(f"{stem}.{name}", type=ir.TensorType(kind), shape=ir.Shape(shape), const_value=tensor)
        edit.graph.initializers[f"{stem}.{name}"] = value
        return value

    def signed(stored: Arrays) -> npt.NDArray[Any]:
        values = unpack_values(stored[0].reshape(out, -1), BITS).astype(np.int8) - np.int8(8)
        return np.ascontiguousarray(values.T).astype(ml_dtypes.int4)

    def missing(stored: Arrays) -> npt.NDArray[Any]:
        points = unpack_values(stored[2], BITS, blocks).astype(np.float32)
        values = (np.float32(8) - points) * stored[1].astype(np.float32)
        return np.ascontiguousarray(cast(values.T, dtype.numpy(), stem, "compute in another dtype"))

    weight = lazy("int4", ir.DataType.INT4, (features, out), signed)
    scales = lazy("by_block", dtype, (blocks, out), lambda stored: np.ascontiguousarray(stored[1].T))
    (dense,) = edit.op(node, "DequantizeLinear", weight, scales, axis=0, block_size=block)
    (y,) = edit.op(node, "MatMul", x, dense)
    if len(tensors) < 3:
        return y
    (wide,) = edit.op(node, "Cast", x, to=int(ir.DataType.FLOAT))
    (cut,) = edit.op(node, "Reshape", wide, edit.ints(-1, blocks, block))
    (sums,) = edit.op(node, "ReduceSum", cut, edit.ints(2), keepdims=0)
    (narrow,) = edit.op(node, "Cast", sums, to=int(dtype))
    (more,) = edit.op(node, "MatMul", narrow, lazy("missing", dtype, (blocks, out), missing))
    return edit.op(node, "Add", y, more)[0]
