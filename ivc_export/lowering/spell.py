"""Gives `ivc` functions other bodies for one runtime. The mathematics stays the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from ivc_export.graph.functions import function

Spellings = Mapping[str, str]
"""Names of functions, and the names of their bodies: graphs/ops/`function`.`spelling`.onnxtxt."""


class SpellPass(ir.passes.InPlacePass):
    """Give functions other bodies, for a pass that inlines them.

    1. Needs: the called functions have bodies. The other body of each has the same inputs, outputs and attributes.
    2. Leaves: every call unchanged. Functions in `spellings` have the bodies named there, which may be of another
       opset. Those of `bodies` have these.
    """

    def __init__(self, spellings: Spellings, bodies: Iterable[ir.Function] = ()) -> None:
        super().__init__()
        named = (function(name, spelling) for name, spelling in spellings.items())
        self.bodies = {body.identifier(): body for body in (*named, *bodies)}

    def requires(self, model: ir.Model) -> None:
        """Check that calls mean the same with the other bodies."""
        for identifier, body in self.bodies.items():
            own = model.functions.get(identifier)
            if own is not None and signature(own) != signature(body):
                raise ir.passes.PreconditionError(f"ivc::{body.name} takes and gives {signature(own)} in this graph")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange the bodies."""
        changed = [i for i, body in self.bodies.items() if i in model.functions and differ(model.functions[i], body)]
        for identifier in changed:
            model.functions[identifier] = self.bodies[identifier].clone()
        return ir.passes.PassResult(model, bool(changed))

    def ensures(self, model: ir.Model) -> None:
        """Check the bodies."""
        for identifier, body in self.bodies.items():
            if identifier in model.functions and differ(model.functions[identifier], body):
                raise ir.passes.PostconditionError(f"ivc::{body.name} has kept another body")


def signature(body: ir.Function) -> tuple[int, int, frozenset[str]]:
    """How many inputs and outputs a function has, and the names of its attributes."""
    return len(body.inputs), len(body.outputs), frozenset(body.attributes)


def differ(one: ir.Function, other: ir.Function) -> bool:
    """Whether two bodies differ in any way."""
    return len({ir.serde.serialize_function(body).SerializeToString(deterministic=True) for body in (one, other)}) > 1
