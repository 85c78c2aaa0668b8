"""Keeps residual sums in float32, for graphs in float16."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.contract.graphs import WIDE_RESIDUALS
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.types import types_of

FLOAT = ir.DataType.FLOAT
CARRIERS = frozenset(("CompactGather", "Gather", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
"""Operators that hand values on unchanged."""


class WidenResidualsPass(ir.passes.InPlacePass):
    """Keep the residual stream of a float16 graph in float32: the sums of some models leave the range of float16,
    65504.

    1. Needs: a portable graph of pre-norm layers. A residual value is one that both a norm (RMSNorm or
       LayerNormalization) and an Add read. A graph in another dtype than `narrow` stays unchanged.
    2. Leaves: residual values, their sums, the norms on them, and `hidden_states` between the graphs in float32. All
       other values stay. Weights of LayerNormalization are cast where it reads them.
    """

    def __init__(self, narrow: ir.DataType = ir.DataType.FLOAT16) -> None:
        super().__init__()
        self.narrow = narrow

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen where a stream starts, and follow it."""
        self.graph, types = model.graph, types_of(model.graph)
        wide: set[ir.Value] = set()
        for value in model.graph.inputs:
            if value.name in WIDE_RESIDUALS and value.dtype == self.narrow:
                value.type = ir.TensorType(FLOAT)
                wide.add(value)
        for node in list(model.graph):
            if any(value in wide for value in node.inputs):
                self._follow(node, wide)
            for value in node.outputs:
                if value not in wide and types.get(value) == self.narrow and starts(value):
                    wide.add(self._cast_uses(value, FLOAT, node))
        for value in model.graph.outputs:
            if value in wide:
                value.type = ir.TensorType(FLOAT)
        return ir.passes.PassResult(model, bool(wide))

    def ensures(self, model: ir.Model) -> None:
        """Check that no residual value is narrow."""
        types = types_of(model.graph)
        left = [v.name for n in model.graph for v in n.outputs if types[v] == self.narrow and starts(v)]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is a residual value in {self.narrow.name.lower()}")

    def _follow(self, node: ir.Node, wide: set[ir.Value]) -> None:
        if node.op_type == "RMSNorm":
            return  # it computes in float32, and its result has its weight's type
        if node.op_type == "Add":
            self._widen_inputs(node, wide)
            wide.add(node.outputs[0])
        elif node.op_type == "LayerNormalization":
            self._widen_inputs(node, wide)
            self._cast_uses(node.outputs[0], self.narrow, node)
        elif node.op_type in CARRIERS and node.domain in ("", IVC_DOMAIN) and node.inputs[0] in wide:
            wide.add(node.outputs[0])
        else:
            for index, value in enumerate(node.inputs):
                if value in wide:
                    node.replace_input_with(index, self._cast(value, self.narrow, node))

    def _widen_inputs(self, node: ir.Node, wide: set[ir.Value]) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value not in wide:
                node.replace_input_with(index, self._cast(value, FLOAT, node))

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{before.name}/{value.name}/{dtype.name.lower()}")
        node.outputs[0].name = node.name
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _cast_uses(self, value: ir.Value, dtype: ir.DataType, producer: ir.Node) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}/{dtype.name.lower()}")
        node.outputs[0].name = node.name
        users = [(user, index) for user, index in value.uses() if user is not node]
        for user, index in users:
            user.replace_input_with(index, node.outputs[0])
        self.graph.insert_after(producer, node)
        return node.outputs[0]


def starts(value: ir.Value) -> bool:
    """Whether a residual stream starts at `value`."""
    readers = {user.op_type for user in value.consumers()}
    return "Add" in readers and bool(readers & {"LayerNormalization", "RMSNorm"})
