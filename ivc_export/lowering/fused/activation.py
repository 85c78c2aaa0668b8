"""Recognises activations of portable graphs, as graph.activations writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from ivc_export.lowering.edit import made_by, numbers


@dataclass(frozen=True)
class Activation:
    """What the last node of an activation of `x` computes.

    name: "swish", which is x sigmoid(slope x); "gelu", by the error function; "gelu_tanh", its approximation. nodes:
        all nodes that read x or results computed from it, with the last one.
    """

    x: ir.Value
    name: str
    slope: float
    nodes: frozenset[ir.Node]

    @property
    def result(self) -> ir.Value:
        """The output of its last node."""
        return next(y for one in self.nodes for y in one.outputs if not self.nodes & set(y.consumers()))

    @property
    def alone(self) -> bool:
        """Whether no other nodes read x."""
        return not self.x.is_graph_output() and self.nodes >= set(self.x.consumers())


def activation(node: ir.Node | None) -> Activation | None:
    """The activation that ends with this node. None if it is not one, or if other nodes read values within it."""
    found = None
    if node is not None and node.domain == "" and node.op_type == "Mul":
        found = swish(node) or tanh_gelu(node) or erf_gelu(node)
    inner = found.nodes - {node} if found is not None else ()
    kept = [y for one in inner for y in one.outputs if y.is_graph_output() or not found.nodes >= set(y.consumers())]  # type: ignore[union-attr]
    return None if kept else found


def swish(node: ir.Node) -> Activation | None:
    """x sigmoid(slope x)."""
    x, sigmoid = node.inputs[0], made_by(node.inputs[1], "Sigmoid")
    if x is None or sigmoid is None:
        return None
    if sigmoid.inputs[0] is x:
        return Activation(x, "swish", 1.0, frozenset((sigmoid, node)))
    scaled = made_by(sigmoid.inputs[0], "Mul")
    factor = numbers(scaled.inputs[1]) if scaled is not None and scaled.inputs[0] is x else []
    if scaled is None or len(factor) != 1:
        return None
    return Activation(x, "swish", factor[0], frozenset((scaled, sigmoid, node)))


def tanh_gelu(node: ir.Node) -> Activation | None:
    """x sigmoid(x (a x^2 + b)), which is GELU by tanh for its a and b."""
    x, sigmoid = node.inputs[0], made_by(node.inputs[1], "Sigmoid")
    inner = made_by(sigmoid.inputs[0], "Mul") if sigmoid is not None else None
    factor = made_by(inner.inputs[1], "Add") if inner is not None else None
    term = made_by(factor.inputs[0], "Mul") if factor is not None else None
    square = made_by(term.inputs[0], "Mul") if term is not None else None
    if x is None or sigmoid is None or inner is None or factor is None or term is None or square is None:
        return None
    scale = 2 * math.sqrt(2 / math.pi)
    if not (inner.inputs[0] is square.inputs[0] is square.inputs[1] is x):
        return None
    if not (is_number(term.inputs[1], 0.044715 * scale) and is_number(factor.inputs[1], scale)):
        return None
    return Activation(x, "gelu_tanh", 1.0, frozenset((square, term, factor, inner, sigmoid, node)))


def erf_gelu(node: ir.Node) -> Activation | None:
    """(x / 2) (erf(x / sqrt 2) + 1)."""
    half, more = made_by(node.inputs[0], "Mul"), made_by(node.inputs[1], "Add")
    erf = made_by(more.inputs[0], "Erf") if more is not None else None
    scaled = made_by(erf.inputs[0], "Mul") if erf is not None else None
    if half is None or more is None or erf is None or scaled is None or half.inputs[0] is not scaled.inputs[0]:
        return None
    x = half.inputs[0]
    if x is None or not (
        is_number(half.inputs[1], 0.5)
        and is_number(more.inputs[1], 1.0)
        and is_number(scaled.inputs[1], math.sqrt(0.5))
    ):
        return None
    return Activation(x, "gelu", 1.0, frozenset((half, scaled, erf, more, node)))


def is_number(value: ir.Value | None, wanted: float) -> bool:
    """Whether a value is this constant, within the precision of its dtype."""
    found = numbers(value)
    return len(found) == 1 and math.isclose(found[0], wanted, rel_tol=1e-2)
