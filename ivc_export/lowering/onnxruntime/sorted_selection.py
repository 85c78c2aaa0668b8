"""Lets onnxruntime select in fewer nodes."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir

from ivc_export.contract.graphs import TensorName
from ivc_export.graph.functions import function
from ivc_export.lowering.edit import called, remove_unused
from ivc_export.lowering.spell import SpellPass

NAME = "SelectTokens"


class SortSelectionPass(ir.passes.InPlacePass):
    """Give SelectTokens the body that sorts, for a runtime that runs node by node.

    1. Needs: the body of SelectTokens, if it is called.
    2. Leaves: every call unchanged. SelectTokens has its body `sorted`, unless other rows share votes with the visual
       tokens. If the size of the values is known, the body has its root as a constant. onnxruntime multiplies by it
       within the products, where it would else compute it on the host and copy it to the device.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that calls have a body. SpellPass checks that they mean the same with the other one."""
        for node in selections(model):
            if node.op_identifier() not in model.functions:
                raise ir.passes.PreconditionError(f"{node.name}: ivc::{NAME} has no body")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the body."""
        calls = selections(model)
        if not calls or any(node.attributes["softmax_all"].as_int() for node in calls):
            return ir.passes.PassResult(model, False)
        return SpellPass({}, [sorting(value_size(model))])(model)

    def ensures(self, model: ir.Model) -> None:
        """Nothing more to check: SpellPass has."""


def selections(model: ir.Model) -> list[ir.Node]:
    """Calls of SelectTokens."""
    return [node for node in model.graph if called(node.outputs[0], NAME)]


def value_size(model: ir.Model) -> int | None:
    """The size of one head's values, as the caches of a graph have it."""
    for value in model.graph.inputs:
        name, shape = TensorName.of(value.name), value.shape
        if (name.role, name.kind) == ("past", "value") and shape is not None and isinstance(shape[3], int):
            return shape[3]
    return None


@cache
def sorting(size: int | None) -> ir.Function:
    """The body `sorted`, for values of a size."""
    body = function(NAME, "sorted").clone()
    (least,) = [node for node in body if node.outputs[0].name == "least"]
    number = ir.tensor(np.finfo(np.float32).smallest_subnormal)  # not in the text, which older versions of onnx read
    least.attributes["value"] = ir.AttrTensor("value", number)
    if size is not None:
        (root,) = [node for node in body if node.outputs[0].name == "root"]
        constant = ir.node("Constant", [], {"value": ir.tensor(np.sqrt(np.float32(size)))}, name=root.name)
        body.insert_before(root, constant)
        root.outputs[0].replace_all_uses_with(constant.outputs[0])
        remove_unused(body.graph)
        constant.outputs[0].name = "root"
    return body
