"""Converts graphs to another dtype than the bundle's."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.graphs import FLOAT32_TENSORS
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.dtypes import FLOATS, ONNX_FLOATS, FloatName, cast
from ivc_export.graph.functions import RESULTS
from ivc_export.lowering.types import BOOLEANS

FLOAT = ir.DataType.FLOAT
NOT_FLOAT = BOOLEANS | {"Shape"}
"""Operators of the contract whose results are never floats."""


class RetypeFloatsPass(ir.passes.InPlacePass):
    """Make a graph compute in another dtype, as if it had been built in that dtype.

    1. Needs: a portable graph of one dtype. Its weights are external data, or converted when they are read. Its
       constants are float32. Casts are around its float32 stretches, even if its dtype is float32. To which stretch a
       value belongs follows from the inputs, the weights and the casts before it.
    2. Leaves: the same nodes; inputs, outputs, weights and the casts that end float32 stretches in `dtype`. A weight is
       converted when it is read, and is refused then if it is too large for `dtype`.
    """

    def __init__(self, dtype: FloatName) -> None:
        super().__init__()
        self.dtype = FLOATS[dtype].onnx

    def requires(self, model: ir.Model) -> None:
        """Check that float32 stretches begin and end by casts."""
        self._stretches(model.graph)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype all floats outside float32 stretches, and the casts that end these."""
        graph = model.graph
        wide = self._stretches(graph)
        casts = [node for node in graph if node.op_type == "Cast" and wide.get(node.outputs[0]) is not None]
        ends = [node for node in casts if not wide[node.outputs[0]] and node.attributes["to"].as_int() != self.dtype]
        for node in ends:
            node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))
        begins = [node for node in casts if wide[node.outputs[0]] and node.attributes["to"].as_int() != FLOAT]
        for node in begins:
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        values = (*graph.inputs, *graph.outputs, *graph.initializers.values())
        others = [value for value in values if not wide.get(value, True) and value.dtype != self.dtype]
        for value in others:
            if value.const_value is not None:
                value.const_value = converted(value.const_value, self.dtype)
            value.type = ir.TensorType(self.dtype)
        return ir.passes.PassResult(model, bool(ends or begins or others))

    def ensures(self, model: ir.Model) -> None:
        """Check that there are floats of two dtypes at most."""
        graph = model.graph
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            if value.dtype in ONNX_FLOATS and value.dtype not in (self.dtype, FLOAT):
                raise ir.passes.PostconditionError(f"{value.name} is {value.dtype} still")

    def _stretches(self, graph: ir.Graph) -> dict[ir.Value, bool]:
        """For each float, whether it belongs to a float32 stretch, by following both kinds through the graph.

        Raises:
            PreconditionError: the kinds mix.
        """
        wide: dict[ir.Value, bool] = {}
        for value in graph.inputs:
            if value.dtype in ONNX_FLOATS:
                wide[value] = value.name in FLOAT32_TENSORS
        for value in graph.initializers.values():
            if value.dtype in ONNX_FLOATS:
                wide[value] = not isinstance(value.const_value, ir.ExternalTensor | ir.LazyTensor)
        for node in graph:
            self._follow(node, wide)
        return wide

    def _kinds(self, node: ir.Node, wide: dict[ir.Value, bool]) -> set[bool]:
        """The kinds of the floats that an `ivc` function gives: that of one of its inputs, or float32."""
        found = RESULTS[node.op_type]
        if isinstance(found, tuple):
            return {True} if FLOAT in found else set()
        value = node.inputs[found]
        return {wide[value]} if value is not None and value in wide else set()

    def _follow(self, node: ir.Node, wide: dict[ir.Value, bool]) -> None:
        kinds = {wide[value] for value in node.inputs if value is not None and value in wide}
        if node.domain == IVC_DOMAIN:
            kinds = self._kinds(node, wide)
        elif node.op_type == "Cast" and node.attributes["to"].as_int() in ONNX_FLOATS:
            kinds = {kinds != {True}}  # a cast of floats outside a float32 stretch, or of integers, begins one
        elif node.op_type == "Cast" or node.op_type in NOT_FLOAT:
            kinds = set()
        if len(kinds) > 1:
            raise ir.passes.PreconditionError(f"{node.name} mixes float32 with the graph's dtype; a cast is missing")
        for kind in kinds:
            wide |= dict.fromkeys(node.outputs, kind)


def converted(tensor: ir.TensorProtocol | None, dtype: ir.DataType) -> ir.LazyTensor:
    """`tensor` in `dtype`, read and converted when it is needed.

    Raises, then:
        UserError: finite values become infinite.
    """
    assert tensor is not None

    def convert() -> ir.TensorProtocol:
        values = cast(read_values(tensor), dtype.numpy(), str(tensor.name), "compute in another dtype")
        return ir.Tensor(values, dtype=dtype, name=tensor.name)

    return ir.LazyTensor(convert, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
