"""Replaces calls of `ivc` functions by the standard operators of their bodies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import remove_unused
from ivc_export.lowering.types import Types, add_types, types_of

Array = npt.NDArray[Any]


def counted_up(first: Array, end: Array, step: Array) -> Array:
    """Computes Range."""
    return np.array(range(int(first), int(end), int(step)), first.dtype)


FOLDED: Mapping[str, Callable[..., npt.NDArray[Any]]] = {
    "Add": np.add,
    "Concat": lambda *parts: np.concatenate(parts),
    "Div": np.floor_divide,
    "Mul": np.multiply,
    "Range": counted_up,
    "Sub": np.subtract,
    "Unsqueeze": lambda x, axes: np.expand_dims(x, tuple(axes.tolist())),
}
"""Operators by which bodies compute shapes and indices from their attributes, in NumPy. Joined arrays have one axis,
and dividends are not negative."""


class InlinePass(ir.passes.InPlacePass):
    """Replace calls of `ivc` functions by their bodies, for runtimes without these functions.

    kept: functions whose calls stay.

    1. Needs: each `ivc` node that is not of `kept` has a body in the model.
    2. Leaves: only nodes of `kept` in domain `ivc`, and only their bodies. Nodes of a body are named `<call>/<name>`.
       Constants of a body, and results of constants and attributes alone, become initializers. A CastLike becomes a
       Cast to the known type. Casts to the type that a value already has are left out. A computation that several calls
       share is there once.
    """

    def __init__(self, kept: Collection[str] = ()) -> None:
        super().__init__()
        self.kept = frozenset(kept)

    def requires(self, model: ir.Model) -> None:
        """Check that every node to inline has a body."""
        for node in model.graph.all_nodes():
            if self._inlined(node) and (node.domain, node.op_type, "") not in model.functions:
                raise ir.passes.PreconditionError(
                    f"{node.name}: ivc::{node.op_type} has no body to inline; start from the portable graph"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline call by call, in order, so that types are known where bodies need them."""
        graph, calls = model.graph, [node for node in model.graph if self._inlined(node)]
        if not calls:
            return ir.passes.PassResult(model, False)
        types, constants = types_of(graph), Constants(graph)
        for node in calls:
            inline(graph, node, model.functions[node.domain, node.op_type, ""], types, constants)
        for identifier in [i for i in model.functions if i[1] not in self.kept]:
            del model.functions[identifier]
        if not model.functions and all(node.domain != IVC_DOMAIN for node in graph):
            graph.opset_imports.pop(IVC_DOMAIN, None)
        CommonSubexpressionEliminationPass()(model)
        fold(graph, constants)
        remove_unused(model.graph)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that nothing is left to inline."""
        left = [node.name for node in model.graph.all_nodes() if self._inlined(node)]
        if left:
            raise ir.passes.PostconditionError(f"ivc nodes are left: {left[:3]}")

    def _inlined(self, node: ir.Node) -> bool:
        return node.domain == IVC_DOMAIN and node.op_type not in self.kept


class Constants:
    """Small constants of a graph. Each is there once and is named by its values."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._known: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.Tensor):
                array = tensor.numpy()
                self._known[tensor.dtype, array.shape, array.tobytes()] = value

    def value(self, array: npt.NDArray[Any], name: str | None) -> ir.Value:
        """The constant of these numbers. name: used if there is none yet."""
        tensor = ir.tensor(array, name=f"constant/{name}")
        key = (tensor.dtype, array.shape, array.tobytes())
        if key not in self._known:
            found = ir.val(f"constant/{name}", const_value=tensor)
            self._known[key] = self.graph.initializers[f"constant/{name}"] = found
        return self._known[key]


def inline(graph: ir.Graph, call: ir.Node, body: ir.Function, types: Types, constants: Constants) -> None:
    """Replace `call` by the nodes of `body`."""
    values: dict[ir.Value, ir.Value | None] = dict(zip(body.inputs, call.inputs, strict=True))
    for domain, version in body.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    for node in body:
        name = f"{call.name}/{node.outputs[0].name}"
        inputs = [None if value is None else values[value] for value in node.inputs]
        attributes = bound(node, call)
        if node.op_type == "Constant":
            array = numbers_of(attributes)
            values[node.outputs[0]] = constant = constants.value(array, name)
            types[constant] = ir.DataType.from_numpy(array.dtype)
            continue
        op_type = node.op_type
        if op_type in ("Cast", "CastLike"):
            given, *like = inputs
            assert given is not None
            to = ir.DataType(attributes["to"].as_int()) if op_type == "Cast" else types[like[0]]  # type: ignore[index]
            if types[given] == to:
                values[node.outputs[0]] = given
                continue
            op_type, inputs, attributes = "Cast", [given], {"to": ir.AttrInt64("to", int(to))}
        copied = ir.Node(node.domain, op_type, inputs, attributes.values(), num_outputs=len(node.outputs), name=name)
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            new.name = f"{call.name}/{old.name}"
            values[old] = new
        graph.insert_before(call, copied)
        add_types([copied], types)
    for old, formal in zip(call.outputs, body.outputs, strict=True):
        replacement = values[formal]
        assert replacement is not None
        take_place(graph, call, old, replacement)
        types[replacement] = types[old]
    graph.remove(call, safe=True)


def take_place(graph: ir.Graph, call: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let all readers of `old` read `new`. As an output of the graph it keeps its name, type and shape."""
    if old.is_graph_output():
        if new.producer() is None or new.is_graph_output():  # an input, handed through
            copy = ir.node("Identity", [new], name=f"{call.name}/Identity")
            graph.insert_before(call, copy)
            new = copy.outputs[0]
        name, new.type, new.shape = old.name, old.type, old.shape
        old.name, new.name = None, name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def bound(node: ir.Node, call: ir.Node) -> dict[str, ir.Attr]:
    """A body node's attributes, with references replaced by the call's attributes."""
    return {
        name: ir.Attr(name, attribute.type, call.attributes[str(attribute.ref_attr_name)].value)
        if attribute.is_ref()
        else attribute
        for name, attribute in node.attributes.items()
    }


def numbers_of(attributes: Mapping[str, ir.Attr]) -> npt.NDArray[Any]:
    """The value of a Constant node. TensorRT 8.6 reads only those whose attribute is a tensor."""
    ((kind, attribute),) = attributes.items()
    if kind == "value":
        return attribute.as_tensor().numpy()
    return np.array(attribute.value, np.float32 if kind.startswith("value_float") else np.int64)


def fold(graph: ir.Graph, constants: Constants) -> None:
    """Replace results of integer constants by constants."""
    for node in list(graph):
        if node.domain or node.op_type not in (*FOLDED, "Cast"):
            continue
        arrays = [numbers for numbers in map(small, node.inputs) if numbers is not None]
        if not arrays or len(arrays) < len(node.inputs):
            continue
        if node.op_type == "Cast":
            found = arrays[0].astype(ir.DataType(node.attributes["to"].as_int()).numpy())
        else:
            found = FOLDED[node.op_type](*arrays)
        node.outputs[0].replace_all_uses_with(constants.value(np.asarray(found), str(node.outputs[0].name)))
        graph.remove(node, safe=True)


def small(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of an integer constant in the graph. None for other values."""
    tensor = value.const_value if value is not None and value.producer() is None else None
    return tensor.numpy() if isinstance(tensor, ir.Tensor) and tensor.dtype.is_integer() else None
