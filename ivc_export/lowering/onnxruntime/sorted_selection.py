"""Lets onnxruntime select in fewer nodes."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.lowering.edit import called
from ivc_export.lowering.spell import SpellPass

SPELL = {"SelectTokens": "sorted"}


class SortSelectionPass(ir.passes.InPlacePass):
    """Give SelectTokens the body that sorts, for a runtime that runs node by node.

    1. Needs: the body of SelectTokens, if it is called.
    2. Leaves: every call unchanged. SelectTokens has its body `sorted`, unless other rows share votes with the visual
       tokens.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that calls mean the same with the other body."""
        SpellPass(SPELL).requires(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the body."""
        calls = [node for node in model.graph if called(node.outputs[0], "SelectTokens")]
        if not calls or any(node.attributes["softmax_all"].as_int() for node in calls):
            return ir.passes.PassResult(model, False)
        return SpellPass(SPELL)(model)

    def ensures(self, model: ir.Model) -> None:
        """Nothing more to check: SpellPass has."""
