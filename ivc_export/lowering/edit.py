"""Finds the nodes that made a value, and replaces nodes by others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.types import types_of

CONTRIB = "com.microsoft"
"""The domain of onnxruntime's own operators."""


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of the default domain that made `value`, if it is an `op_type`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def called(value: ir.Value | None, name: str) -> ir.Node | None:
    """The call of the `ivc` function `name` that made `value`, if one did."""
    node = value.producer() if value is not None else None
    return node if node is not None and (node.domain, node.op_type) == (IVC_DOMAIN, name) else None


def back(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """Go back through nodes of these types, by their first inputs. None if other nodes are in the way."""
    for op_type in op_types:
        node = made_by(value, op_type)
        if node is None:
            return None
        value = node.inputs[0]
    return value


def numbers(value: ir.Value | None) -> list[float]:
    """The numbers of a small constant, also behind a cast. Empty if it is not a constant."""
    cast = made_by(value, "Cast")
    tensor = cast.inputs[0].const_value if cast and cast.inputs[0] else value.const_value if value else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return []
    return [float(x) for x in tensor.numpy().ravel()]


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing reads. onnx_ir's pass also looks for unused optional outputs, and
    loads onnx's table of operators for that, which takes 5 MB of memory."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]


class Editor:
    """Adds nodes and constants to a graph. They are named after the nodes that they replace."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.types = types_of(graph)
        """Types of the values that the graph had at first, without added values."""
        self._numbers = count()

    def op(
        self,
        before: ir.Node,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node before another, and return its outputs."""
        name = f"{before.name}/{op_type}.{next(self._numbers)}"
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}:{i}" if outputs > 1 else name
        self.graph.insert_before(before, node)
        return node.outputs

    def ints(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant."""
        name = f"int64({','.join(map(str, values))})"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array(values, np.int64), name=name)
            self.graph.initializers[name] = ir.val(name, const_value=tensor)
        return self.graph.initializers[name]

    def scalar(self, value: float, dtype: ir.DataType = ir.DataType.INT32) -> ir.Value:
        """A constant without axes."""
        name = f"{dtype.name.lower()}({value})"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array(value, dtype.numpy()), name=name)
            self.graph.initializers[name] = ir.val(name, const_value=tensor)
        return self.graph.initializers[name]

    def extent(self, before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
        """The size of one axis, int32 [1]."""
        (shape,) = self.op(before, "Shape", value)
        (length,) = self.op(before, "Gather", shape, self.ints(axis), axis=0)
        return self.op(before, "Cast", length, to=int(ir.DataType.INT32))[0]

    def size(self, before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
        """The same without axes, int32 []."""
        (shape,) = self.op(before, "Shape", value, start=axis, end=axis + 1)
        (length,) = self.op(before, "Squeeze", shape, self.ints(0))
        return self.op(before, "Cast", length, to=int(ir.DataType.INT32))[0]

    def counting(self, before: ir.Node, length: ir.Value) -> ir.Value:
        """0 to length - 1, int32 [length]. length: int32 [1]."""
        (scalar,) = self.op(before, "Squeeze", length, self.ints(0))
        return self.op(before, "Range", self.scalar(0), scalar, self.scalar(1))[0]

    def added_bias(self, product: ir.Node) -> ir.Value:
        """The bias of a Gemm as it is added: its bias input times `beta`."""
        bias, beta = product.inputs[2], product.attributes.get("beta")
        assert bias is not None
        if beta is None or beta.as_float() == 1.0:
            return bias
        assert bias.dtype is not None
        return self.op(product, "Mul", bias, self.scalar(beta.as_float(), bias.dtype))[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let all readers of `old` read `new`. If `old` is an output of the graph, `new` takes its name."""
        if old.is_graph_output():
            name, new.type, new.shape = old.name, old.type, old.shape
            old.name, new.name = None, name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
