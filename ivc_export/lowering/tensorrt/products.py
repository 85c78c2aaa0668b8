"""Matrix products without factors, for TensorRT."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.lowering.edit import Editor

FACTORS = ("alpha", "beta")


class ScaleBeforeProductsPass(ir.passes.InPlacePass):
    """Scale what a product is given, and not what it gives.

    TensorRT 8.6 holds a Gemm's factors in float32 whatever the graph is in. Where it runs such a product by itself, as
    beside our plugin's nodes, it then has no format for it.

    1. Needs: products as linear layers of floats are.
    2. Leaves: no Gemm with an `alpha` or `beta` other than 1; the factor on its rows and on its bias, in their dtype.
       Factors that are powers of two round nothing but what they make subnormal.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Product by product."""
        edit, nodes = Editor(model.graph), [node for node in model.graph if has_factors(node)]
        for node in nodes:
            rows = node.inputs[0]
            assert rows is not None
            if len(node.inputs) == 3 and node.inputs[2] is not None:
                node.replace_input_with(2, edit.added_bias(node))
            alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
            if alpha != 1.0:
                (scaled,) = edit.op(node, "Mul", rows, edit.scalar(alpha, edit.types[rows]))
                scaled.type = ir.TensorType(edit.types[rows])
                node.replace_input_with(0, scaled)
            for name in FACTORS:
                node.attributes.pop(name, None)
        return ir.passes.PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """Check that no factor is left."""
        for node in model.graph:
            if has_factors(node):
                raise ir.passes.PostconditionError(f"{node.name} has its factors still")


def has_factors(node: ir.Node) -> bool:
    """Whether a node is a product with a factor other than 1."""
    given = [node.attributes[name].as_float() for name in FACTORS if name in node.attributes]
    return node.domain == "" and node.op_type == "Gemm" and any(factor != 1.0 for factor in given)
