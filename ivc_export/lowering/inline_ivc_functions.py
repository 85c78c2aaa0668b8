"""The `native` lowering."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from ivc_export.contract import IVC_DOMAIN


class InlineIvcFunctionsPass(ir.passes.InPlacePass):
    """Replace every `ivc` call by its body, so that a runtime without our plugin can read the graph.

    1. Needs: each `ivc` node has a function body in the model.
    2. Leaves: no node, function or import of domain `ivc`, and the bodies' constants as initializers; everything else
       untouched.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that every `ivc` node has a body."""
        bodies = {(function.domain, function.name) for function in model.functions.values()}
        for node in model.graph.all_nodes():
            if node.domain == IVC_DOMAIN and (node.domain, node.op_type) not in bodies:
                raise ir.passes.PreconditionError(
                    f"{node.name}: ivc::{node.op_type} has no body to inline; start from the portable graph"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline the functions of domain `ivc`."""
        result = InlinePass(lambda function: function.domain == IVC_DOMAIN)(model)
        model.graph.opset_imports.pop(IVC_DOMAIN, None)
        lift_constants(model.graph)
        return ir.passes.PassResult(model, result.modified)

    def ensures(self, model: ir.Model) -> None:
        """Check that nothing of domain `ivc` is left."""
        left = [node.name for node in model.graph.all_nodes() if node.domain == IVC_DOMAIN]
        if left:
            raise ir.passes.PostconditionError(f"ivc nodes are left: {left[:3]}")


def lift_constants(graph: ir.Graph) -> None:
    """Turn Constant nodes into initializers: TensorRT 8.6 reads those alone whose attribute is a tensor."""
    for node in [node for node in graph if node.op_type == "Constant"]:
        old, ((kind, attribute),) = node.outputs[0], node.attributes.items()
        if kind == "value":
            tensor = attribute.as_tensor()
        else:
            dtype = np.float32 if kind.startswith("value_float") else np.int64
            tensor = ir.tensor(np.array(attribute.value, dtype))
        name = f"constant/{old.name}"
        new = ir.val(name, const_value=ir.tensor(tensor.numpy(), name=name))
        graph.initializers[name] = new
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)
