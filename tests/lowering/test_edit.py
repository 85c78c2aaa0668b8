"""Editing graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.lowering.edit import remove_unused


def graph() -> ir.Graph:
    """y = x + a; nothing reads the chain exp(neg(b)), nor the initializers b and c; d is an output."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[2])
    constants = {name: ir.val(name, const_value=ir.tensor(np.ones(2, np.float32), name=name)) for name in "abcd"}
    y = ir.node("Add", [x, constants["a"]], name="y")
    neg = ir.node("Neg", [constants["b"]], name="neg")
    exp = ir.node("Exp", [neg.outputs[0]], name="exp")
    return ir.Graph(
        [x],
        [y.outputs[0], constants["d"]],
        nodes=[neg, y, exp],
        initializers=list(constants.values()),
        opset_imports={"": 21},
        name="graph",
    )


def test_only_what_nothing_reads_is_removed() -> None:
    """As by onnx_ir's pass."""
    ours, theirs = graph(), graph()
    remove_unused(ours)
    RemoveUnusedNodesPass()(ir.Model(theirs, ir_version=10))
    for left in (ours, theirs):
        assert [node.name for node in left] == ["y"] and set(left.initializers) == {"a", "d"}
