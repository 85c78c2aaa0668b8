"""The passes of the `plugin` lowering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.contract.operators import PLUGIN_OPERATORS
from ivc_export.lowering.edit import called
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.tensorrt.linears import COMPUTING

INT64 = ir.DataType.INT64
PLUGIN = {"plugin_namespace": IVC_DOMAIN, "plugin_version": "1"}
"""Attributes by which TensorRT's parsers find a plugin."""

KINDS = {"graph": 0, "int32": 1, "float32": 2}
"""Element types of CompactGatherN's tensors: `graph` is the floating-point type that all such tensors share."""

FLOAT_TYPE = "float_type"
"""The attribute that keeps an operator's floating-point tensors in the graph's type, whatever the builder prefers."""

KERNELS = PLUGIN_OPERATORS | COMPUTING
"""Operators that the plugin has."""

KEPT = ("SelectTokens", "CompactGather", *KERNELS)
"""Calls that are not inlined."""


class UsePluginPass(ir.passes.InPlacePass):
    """Use our TensorRT plugin (graphs/plugin) instead of the bodies of the `ivc` operators.

    1. Needs: each `ivc` node has a body or is one of KERNELS, and a graph's CompactGather nodes share one keep_index.
    2. Leaves: SelectTokens with keep_slots, a tensor of keep_count elements, instead of keep_count, because TensorRT
       8.6 computes a plugin's output shapes from input shapes alone. One CompactGatherN(keep_index, x_1 .. x_n) -> y_1
       .. y_n with `axes`, and `kinds` by KINDS, instead of all CompactGather. No bodies: parsers up to 10.14 would
       prefer them. Operators that the plugin lacks are inlined. Each node has FLOAT_TYPE. Inputs and outputs stay.
    """

    def requires(self, model: ir.Model) -> None:
        """Check that each node to inline has a body, and that gathers can be fused."""
        InlinePass(kept=KEPT).requires(model)
        one_index([node for node in model.graph if called(node.outputs[0], "CompactGather")])

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the nodes, drop the bodies."""
        inlined = InlinePass(kept=KEPT)(model).modified
        gathers = [node for node in model.graph if called(node.outputs[0], "CompactGather")]
        if gathers:
            sources = [node.inputs[0] for node in gathers]
            kinds = [kind(x, sources) for x in sources]
            fuse_gathers(model.graph, gathers, {"axes": axes(gathers), "kinds": kinds, **PLUGIN})
        named = [n for n in model.graph if n.domain == IVC_DOMAIN and not PLUGIN.keys() <= n.attributes.keys()]
        for node in named:
            if node.op_type == "SelectTokens":
                node.replace_input_with(5, keep_slots(model.graph, node))
            for name, value in PLUGIN.items():
                node.attributes[name] = ir.AttrString(name, value)
        told = float_type(model.graph)
        for node in model.graph:
            if node.domain == IVC_DOMAIN:
                node.attributes[FLOAT_TYPE] = ir.AttrInt64(FLOAT_TYPE, told)
        changed = inlined or bool(gathers or named or model.functions)
        model.functions.clear()
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that every `ivc` node is one of the plugin's."""
        for node in model.graph.all_nodes():
            if node.domain == IVC_DOMAIN and node.op_type not in KERNELS:
                raise ir.passes.PostconditionError(f"{node.name}: the plugin has no {node.op_type}")


def keep_slots(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """An int32 tensor of keep_count elements, made before `node`."""
    slot = ir.val(f"{node.name}/slot", const_value=ir.tensor(np.array(0, np.int32), name=f"{node.name}/slot"))
    graph.initializers[slot.name] = slot  # type: ignore[index]
    count = ir.node("Cast", [node.inputs[5]], {"to": int(INT64)}, name=f"{node.name}/keep_count")
    slots = ir.node("Expand", [slot, count.outputs[0]], name=f"{node.name}/keep_slots")
    for new in (count, slots):
        new.outputs[0].name = new.name
    graph.insert_before(node, [count, slots])
    return slots.outputs[0]


def float_type(graph: ir.Graph) -> int:
    """The narrowest of the floating-point types of a graph's inputs, which is what its layers compute in."""
    floats = [value.dtype for value in graph.inputs if value.dtype is not None and value.dtype.is_floating_point()]
    return int(min(floats, key=lambda dtype: dtype.bitwidth))


def axes(gathers: Sequence[ir.Node]) -> list[int]:
    """The axis of each node."""
    return [node.attributes["axis"].as_int() for node in gathers]


def fuse_gathers(graph: ir.Graph, gathers: Sequence[ir.Node], attributes: Mapping[str, str | list[int]]) -> None:
    """Replace CompactGather or Gather nodes of one index by one CompactGatherN, at the place of the first."""
    index = one_index(gathers)
    fused = ir.node(
        "CompactGatherN",
        [index, *(node.inputs[0] for node in gathers)],
        dict(attributes),
        domain=IVC_DOMAIN,
        num_outputs=len(gathers),
        name="compact/CompactGatherN",
    )
    graph.insert_before(gathers[0], fused)
    for node, new in zip(gathers, fused.outputs, strict=True):
        old = node.outputs[0]
        name = old.name
        new.type, new.shape = old.type, old.shape
        source, axis = node.inputs[0], node.attributes["axis"].as_int()
        if new.shape is None and source is not None and source.shape is not None and index is not None:
            kept = index.shape  # written out, because nothing can infer it without the operator's body
            new.type = source.type
            new.shape = ir.Shape([*source.shape[:axis], *(kept or ()), *source.shape[axis + 1 :]])
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        new.name = name


def one_index(gathers: Sequence[ir.Node]) -> ir.Value | None:
    """The index by which all of these gather.

    Raises:
        PreconditionError: there is more than one index.
    """
    indices = {node.inputs[1] for node in gathers}
    if len(indices) > 1:
        raise ir.passes.PreconditionError("CompactGather nodes with another keep_index cannot be fused into one")
    return next(iter(indices), None)


def kind(value: ir.Value | None, among: Sequence[ir.Value | None]) -> int:
    """The entry of KINDS for a tensor. float32 is `graph` too, unless there are narrower floats."""
    assert value is not None
    if value.dtype == ir.DataType.INT32:
        return KINDS["int32"]
    dtypes = {x.dtype for x in among if x is not None} - {ir.DataType.INT32}
    return KINDS["float32" if value.dtype == ir.DataType.FLOAT and len(dtypes) > 1 else "graph"]
