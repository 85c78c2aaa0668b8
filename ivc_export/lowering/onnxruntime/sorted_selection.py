"""Lets onnxruntime select in fewer nodes."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir

from ivc_export.contract.graphs import TensorName
from ivc_export.graph.functions import function
from ivc_export.lowering.edit import called
from ivc_export.lowering.spell import differ, signature

NAME = "SelectTokens"


class SortSelectionPass(ir.passes.InPlacePass):
    """Give SelectTokens the body that sorts, for a runtime that runs node by node.

    1. Needs: the body of SelectTokens, if it is called.
    2. Leaves: every call unchanged. SelectTokens has its body `sorted`, unless other rows share votes with the visual
       tokens. If the size of the values is known, the body has its root as a constant. onnxruntime multiplies by it
       within the products, where it would else compute it on the host and copy it to the device.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that calls mean the same with the other body."""
        for node in selections(model):
            body = model.functions.get(node.op_identifier())
            if body is None or signature(body) != signature(sorting(None)):
                raise ir.passes.PreconditionError(f"{node.name}: ivc::{NAME} has no body or another signature")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the body."""
        calls = selections(model)
        if not calls or any(node.attributes["softmax_all"].as_int() for node in calls):
            return ir.passes.PassResult(model, False)
        body = sorting(value_size(model))
        changed = differ(model.functions[body.identifier()], body)
        if changed:
            model.functions[body.identifier()] = body.clone()
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check the body."""
        calls = selections(model)
        shared = any(node.attributes["softmax_all"].as_int() for node in calls)
        if calls and not shared and differ(model.functions[calls[0].op_identifier()], sorting(value_size(model))):
            raise ir.passes.PostconditionError(f"{calls[0].name}: ivc::{NAME} has kept another body")


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
        unused: ir.Value | None = root.outputs[0]
        while unused is not None and (node := unused.producer()) is not None:
            unused = node.inputs[0]
            body.remove(node, safe=True)
        constant.outputs[0].name = "root"
    return body
