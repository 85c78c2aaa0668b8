"""Raises opset 17 to 21 or 23, for TensorRT's newer parsers."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.lowering.edit import Editor

BLOCKS = 21
"""The first opset whose DequantizeLinear takes a scale for each block."""
NEWEST = 23
"""The first opset with Attention, RotaryEmbedding and RMSNormalization."""


class RaiseOpsetPass(ir.passes.InPlacePass):
    """Write a graph of opset 17 in a later opset, from 18 to 23.

    Two of the contract's operators change: ReduceMean takes its axes as an input, and Split into equal parts has a
    number of parts.

    1. Needs: a graph of the contract's operators in opset 17, except operators that bodies of the later opset have
       brought.
    2. Leaves: that opset, and the same values.
    """

    def __init__(self, opset: int = NEWEST) -> None:
        super().__init__()
        self.opset = opset

    def requires(self, model: ir.Model) -> None:
        """Check that it is not of a later opset."""
        if (model.opset_imports.get("") or 0) > self.opset:
            raise ir.passes.PreconditionError(f"the graph is of opset {model.opset_imports.get('')}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the two operators."""
        if model.opset_imports.get("") == self.opset:
            return ir.passes.PassResult(model, False)
        edit = Editor(model.graph)
        for node in model.graph:
            if node.domain == "" and node.op_type == "ReduceMean" and "axes" in node.attributes:
                axes = edit.ints(*node.attributes.pop("axes").as_ints())
                node.resize_inputs(2)
                node.replace_input_with(1, axes)
            elif node.domain == "" and node.op_type == "Split" and len(node.inputs) < 2:
                node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        model.graph.opset_imports[""] = self.opset
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check the opset, and that no operator has its old form."""
        left = [n.name for n in model.graph if n.domain == "" and n.op_type == "ReduceMean" and "axes" in n.attributes]
        if left or model.opset_imports.get("") != self.opset:
            raise ir.passes.PostconditionError(f"opset {model.opset_imports.get('')}, and old operators: {left[:3]}")
