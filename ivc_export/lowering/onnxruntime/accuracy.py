"""Sets the precision in which onnxruntime's CPU provider multiplies packed weights."""

from __future__ import annotations

import onnx_ir as ir

LEVELS = (0, 4)
"""Values of `accuracy_level`: 0 is float32, 4 rounds activations to int8, by block. Source: MatMulNBits in
onnxruntime's ContribOperators.md."""


class SetAccuracyPass(ir.passes.InPlacePass):
    """Set the accuracy level of packed products.

    1. Needs: nothing; a graph without packed products stays as it is.
    2. Leaves: every MatMulNBits, also within bodies, at that level.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        assert level in LEVELS, level
        self.level = level

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Set the attribute."""
        found = [node for node in packed_nodes(model) if level_of(node) != self.level]
        for node in found:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", self.level)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check the levels."""
        left = [node.name for node in packed_nodes(model) if level_of(node) != self.level]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is at another level")


def packed_nodes(model: ir.Model) -> list[ir.Node]:
    """Every MatMulNBits."""
    nodes = [*model.graph.all_nodes(), *(node for body in model.functions.values() for node in body.all_nodes())]
    return [node for node in nodes if node.op_type == "MatMulNBits"]


def level_of(node: ir.Node) -> int:
    """The level of a MatMulNBits."""
    level = node.attributes.get("accuracy_level")
    return 0 if level is None else level.as_int()
