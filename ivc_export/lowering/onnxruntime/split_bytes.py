"""Splits packed products of 8 bits into two of 4, for onnxruntime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.checkpoint.formats.nbits import pack_values
from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.dtypes import cast
from ivc_export.graph.functions import function
from ivc_export.lowering.edit import Editor
from ivc_export.lowering.packed import constants_of, drop_weights, packed_products

Arrays = list[npt.NDArray[Any]]


class SplitBytesPass(ir.passes.InPlacePass):
    """Replace each packed product of 8 bits by the sum of two of 4 bits.

    The CPU provider's float32 kernels take only 4 bits. For 8 bits it dequantises in every run, which takes 30 times as
    long as a product of floats. A byte less its zero point is 16 times (its high half less the zero point's high half),
    plus (its low half less the zero point's low half). So both products have exact weights; the first has scales 16
    times as large.

    1. Needs: weights that are constants.
    2. Leaves: no packed product of 8 bits.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Product by product."""
        edit, found = Editor(model.graph), of_bytes(model)
        for node in found:
            edit.replace(node.outputs[0], halves(edit, node))
            drop_weights(model, node)
        for name in {node.op_type for node in packed_products(model)} if found else ():
            model.functions.setdefault((IVC_DOMAIN, name, ""), function(name).clone())
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that none is left."""
        left = [node.name for node in of_bytes(model)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is of 8 bits still")


def of_bytes(model: ir.Model) -> list[ir.Node]:
    """Packed products of 8 bits."""
    return [node for node in packed_products(model) if node.attributes["bits"].as_int() == 8]


def halves(edit: Editor, node: ir.Node) -> ir.Value:
    """The sum of the products of both halves."""
    tensors = constants_of(node)
    stem, dtype = str(tensors[0].name).removesuffix(".packed"), tensors[1].dtype
    sizes = {name: node.attributes[name].as_int() for name in ("block_size", "K", "N")}
    out, blocks, block = (int(extent) for extent in tensors[0].shape.numpy())
    shapes = {"packed": (out, blocks, block // 2), "scales": (out, blocks), "zero_points": (out, -(-blocks // 2))}

    def lazy(part: str, kind: ir.DataType, make: Callable[[Arrays], npt.NDArray[Any]]) -> ir.Value:
        """A constant that is made of the stored ones when it is read."""
        name, shape = f"{stem}.{part}", ir.Shape(shapes[part.rpartition(".")[2]])

        def read() -> ir.TensorProtocol:
            return ir.Tensor(make([read_values(tensor) for tensor in tensors]), dtype=kind, name=name)

        if name not in edit.graph.initializers:
            tensor = ir.LazyTensor(read, dtype=kind, shape=shape, name=name)
            edit.graph.initializers[name] = ir.val(name, type=ir.TensorType(kind), shape=shape, const_value=tensor)
        return edit.graph.initializers[name]

    def larger(stored: Arrays) -> npt.NDArray[Any]:
        return cast(stored[1].astype(np.float32) * 16, dtype.numpy(), stem, "compute in another dtype")

    def zero_points(stored: Arrays, shift: int) -> npt.NDArray[Any]:
        points = stored[2] if len(stored) > 2 else np.full((out, blocks), 128, np.uint8)
        return pack_values((points >> np.uint8(shift)) & np.uint8(15), 4)

    def half(name: str, shift: int, scales: ir.Value) -> ir.Value:
        def nibbles(stored: Arrays) -> npt.NDArray[Any]:
            return pack_values((stored[0] >> np.uint8(shift)) & np.uint8(15), 4)

        packed = lazy(f"{name}.packed", ir.DataType.UINT8, nibbles)
        points = lazy(f"{name}.zero_points", ir.DataType.UINT8, lambda stored: zero_points(stored, shift))
        inputs = (node.inputs[0], packed, scales, points)
        return edit.op(node, "LinearNBitsZeroPoints", *inputs, domain=IVC_DOMAIN, bits=4, **sizes)[0]

    scales = node.inputs[2]
    assert scales is not None
    high = half("high", 4, lazy("high.scales", dtype, larger))
    return edit.op(node, "Add", high, half("low", 0, scales))[0]
