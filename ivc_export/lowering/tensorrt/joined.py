"""Lets one kernel of the plugin split, norm and rotate the heads of query, key and value."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import Editor, remove_unused
from ivc_export.lowering.fused.joined_heads import join_heads
from ivc_export.lowering.tensorrt.attention import attended, encoded, take_over


class TurnHeadsPass(ir.passes.InPlacePass):
    """Split rows into heads, norm and rotate them in one kernel. TensorRT would run one kernel for each operator.

    1. Needs: a portable graph after FuseLinearsPass.
    2. Leaves: TurnHeads(rows [R, (heads + 2 kv_heads) head_dim], cos [A, head_dim / 2], sin, query_norm [head_dim],
       key_norm) -> query [R / A, heads, A, head_dim], key and value [R / A, kv_heads, A, head_dim] {heads, kv_heads,
       head_dim, grouped, normed, epsilon, values 1}. It is put before attention of sizes that our kernels take, if
       query and key are rotated and fused.joined_heads takes the heads. Both norms are left out if `normed` is 0. Other
       layers stay unchanged.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Layer by layer."""
        edit, angles = Editor(model.graph), dict[ir.Value, ir.Value]()
        found = [turn(edit, node, angles) for node in (*attended(model.graph), *encoded(model.graph))]
        if any(found):
            remove_unused(model.graph)
        return ir.passes.PassResult(model, any(found))


def turn(edit: Editor, node: ir.Node, angles: dict[ir.Value, ir.Value]) -> bool:
    """Replace the heads before one attention. Returns whether it was possible."""
    joined = join_heads(edit, node, angles)
    if joined is None or joined.cos is None or (joined.query_norm is None) != (joined.key_norm is None):
        return False
    attributes: dict[str, Any] = {**joined.attributes, "normed": int(joined.key_norm is not None), "values": 1}
    new = edit.op(node, "TurnHeads", joined.rows, *joined.optional, outputs=3, domain=IVC_DOMAIN, **attributes)
    for old, value in zip(node.inputs[:3], new, strict=True):
        assert old is not None
        take_over(edit, old, value)
    return True
