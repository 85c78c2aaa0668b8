"""The passes that only the `ort-cuda-ops` lowering has."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.contract.operators import CACHES, HOST_STEPS, JOINED, LINEAR_OPERATORS, PLUGIN_OPERATORS
from ivc_export.lowering.edit import back, remove_unused
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.tensorrt.plugin import axes, fuse_gathers

LIBRARY = PLUGIN_OPERATORS | CACHES | HOST_STEPS | JOINED | LINEAR_OPERATORS | {"EncodeAttend"}
"""Operators that the library has."""


class UseCustomOpsPass(ir.passes.InPlacePass):
    """Use the kernels of our library of custom operators (graphs/plugin/onnxruntime).

    1. Needs: a graph after the other passes of `ort-cuda`; each `ivc` node has a body.
    2. Leaves: SelectTokens without its body. One CompactGatherN(cache_index, x_1 .. x_n) -> y_1 .. y_n with `axes`
       replaces the Gather of all caches. A product that adds a residual takes attention's rows as attention gives them,
       [frames, rows, width], since y has the residual's shape. Other `ivc` operators are inlined. Inputs and outputs
       stay.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that each node to inline has a body."""
        InlinePass(kept=LIBRARY).requires(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline operators that the library lacks, fuse the gathers of caches, remove the bodies."""
        changed = InlinePass(kept=LIBRARY)(model).modified or bool(model.functions)
        model.functions.clear()
        gathers = [
            n for n in model.graph if n.op_type == "Gather" and n.inputs[1] and n.inputs[1].name == "cache_index"
        ]
        if gathers:
            fuse_gathers(model.graph, gathers, {"axes": axes(gathers)})
        products = [node for node in model.graph if rows_of_attention(node) is not None]
        for node in products:
            node.replace_input_with(0, rows_of_attention(node))
        if products:
            remove_unused(model.graph)  # the reshapes
        return ir.passes.PassResult(model, changed or bool(gathers or products))

    def ensures(self, model: ir.Model) -> None:
        """Check that every `ivc` node is one of the library's."""
        for node in model.graph.all_nodes():
            if node.domain == IVC_DOMAIN and node.op_type not in LIBRARY:
                raise ir.passes.PostconditionError(f"{node.name}: the library has no {node.op_type}")


def rows_of_attention(node: ir.Node) -> ir.Value | None:
    """onnxruntime's attention whose rows a product with a residual reads through a Reshape."""
    whole = {"FusedLinear": 5}.get(node.op_type, 7)  # inputs with the residual, which is the last
    if node.op_type not in LINEAR_OPERATORS or len(node.inputs) < whole:
        return None
    rows = back(node.inputs[0], "Reshape")
    attention = rows.producer() if rows is not None else None
    known = attention is not None and attention.op_type in ("GroupQueryAttention", "MultiHeadAttention")
    return rows if known else None
