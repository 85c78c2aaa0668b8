"""Replaces attention by the plugin's kernels, over caches that the caller owns."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.contract.operators import ATTENDED_SIZES, ENCODED_SIZES
from ivc_export.lowering.edit import Editor, called, numbers, remove_unused


class AttendInPlacePass(ir.passes.InPlacePass):
    """Replace Attention by our kernels, and write caches in place.

    1. Needs: a portable graph whose decoder layers attend to what CausalMask allows.
    2. Leaves: no Attention whose keys and values have one size among ATTENDED_SIZES. Instead AttendInPlace(q, k, v,
       past_key, past_value, past_length) {scale, append}. In prefix it reads caches and gives only y (append 0). In
       decoder it also writes this run's rows behind the valid ones (append 1), and gives present_key and present_value.
       If TurnHeads gives q, k and v to nothing else, both become one operator, AttendJoined(rows, cos, sin, query_norm,
       key_norm, past_key, past_value, past_length) with TurnHeads' attributes and scale. CompactIntoCaches(keep_index,
       past_length, x_1 .. x_n, past_1 .. past_n) -> present_1 .. present_n {caches n} replaces the CompactGather of
       keys and values. Inputs and outputs are as contract.caches.owned_caches_info says. v is [S, kv_heads D] if only
       SplitHeads made it.
    """

    def requires(self, model: ir.Model) -> None:
        """Check the masks."""
        for node in attended(model.graph):
            if called(node.inputs[5], "CausalMask") is None:
                raise ir.passes.PreconditionError(f"{node.name} has a mask of its own, which our kernels do not take")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Call by call."""
        graph, nodes = model.graph, attended(model.graph)
        if not nodes:
            return ir.passes.PassResult(model, False)
        edit = Editor(graph)
        append = any(value.name == "keep_index" for value in graph.inputs)
        for node in nodes:
            attend(edit, node, append)
        if append:
            compact(edit)
        remove_unused(model.graph)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that no such attention is left."""
        for node in attended(model.graph):
            raise ir.passes.PostconditionError(f"{node.name} is not replaced")


class EncodeAttendPass(ir.passes.InPlacePass):
    """Replace attention of encoders by our kernels, in windows or not.

    1. Needs: a portable graph.
    2. Leaves: for heads of ENCODED_SIZES, EncodeAttend(q, k, v) {scale, heads, block_size 0} for EncoderAttention and
       EncodeAttend(q, k, v, window_of_place) {scale, heads, block_size} for WindowAttention. q, k or v are [frames
       rows, heads head_dim] if only SplitHeads made them. If TurnHeads makes v for nothing else, v is the last columns
       of its rows, and TurnHeads {values 0} gives query and key alone. Inputs and outputs stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Call by call."""
        nodes = encoded(model.graph)
        edit = Editor(model.graph)
        for node in nodes:
            block = node.attributes.get("block_size")
            attributes: dict[str, Any] = {
                "scale": node.attributes["scale"].as_float(),
                "heads": node.attributes["heads"].as_int(),
                "block_size": 0 if block is None else block.as_int(),
            }
            inputs = in_place(edit, node)
            (y,) = edit.op(node, "EncodeAttend", *inputs, domain=IVC_DOMAIN, **attributes)
            take_over(edit, node.outputs[0], y)
        if nodes:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """Check that no such attention is left."""
        for node in encoded(model.graph):
            raise ir.passes.PostconditionError(f"{node.name} is not replaced")


def attended(graph: ir.Graph) -> list[ir.Node]:
    """Calls of Attention whose keys and values AttendInPlace takes."""
    nodes = [node for node in graph if called(node.outputs[0], "Attention")]
    return [node for node in nodes if {size(cache) for cache in node.inputs[3:5]} in [{d} for d in ATTENDED_SIZES]]


def encoded(graph: ir.Graph) -> list[ir.Node]:
    """Calls of EncoderAttention and WindowAttention whose heads EncodeAttend takes."""
    nodes = [n for n in graph if n.domain == IVC_DOMAIN and n.op_type in ("EncoderAttention", "WindowAttention")]
    return [node for node in nodes if node.attributes["head_dim"].as_int() in ENCODED_SIZES]


def size(cache: ir.Value | None) -> int | str | None:
    """Size of a cache's rows."""
    axis = cache.shape[3] if cache is not None and cache.shape is not None else None
    return axis.value if isinstance(axis, ir.SymbolicDim) else axis


def whole_rows(x: ir.Value | None) -> ir.Value | None:
    """The rows from which heads [frames, heads, rows, D] were split, if nothing else was done to them."""
    split = called(x, "SplitHeads")
    return x if split is None else split.inputs[0]


def in_place(edit: Editor, node: ir.Node) -> list[ir.Value | None]:
    """Inputs of an encoder's attention, with the value where the product wrote it, if it lies there in one piece."""
    query, key, value, *windows = node.inputs
    turned = called(value, "TurnHeads")
    if turned is None or value is None:
        return [query, key, whole_rows(value), *windows]
    alone = list(turned.outputs) == list(node.inputs[:3]) and len(value.uses()) == 1
    if not alone or turned.attributes["grouped"].as_int():
        return list(node.inputs)
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in turned.attributes.items()}
    new = edit.op(turned, "TurnHeads", *turned.inputs, outputs=2, domain=IVC_DOMAIN, **(attributes | {"values": 0}))
    for old, other in zip(turned.outputs[:2], new, strict=True):
        take_over(edit, old, other)
    return [*new, turned.inputs[0], *windows]


def take_over(edit: Editor, old: ir.Value, new: ir.Value) -> None:
    """Let all readers of `old` read `new`, which has the same type and shape."""
    new.type, new.shape = ir.TensorType(edit.types[old]), old.shape
    edit.replace(old, new)


def attend(edit: Editor, node: ir.Node, append: bool) -> None:
    """Replace one decoder layer's attention."""
    q, k, v, past_key, past_value, visible = node.inputs
    causal = called(visible, "CausalMask")
    assert causal is not None and past_key is not None and past_value is not None
    if append and (turned := turned_for(node)) is not None:
        attend_to_rows(edit, node, turned, causal.inputs[2])
        return
    split = called(v, "SplitHeads")
    rows = whole_rows(v) if split is not None and numbers(split.inputs[1]) == [1] else v  # of one frame
    attributes: dict[str, Any] = {"scale": node.attributes["scale"].as_float(), "append": int(append)}
    y, *present = edit.op(
        node,
        "AttendInPlace",
        *(q, k, rows, past_key, past_value, causal.inputs[2]),
        outputs=3 if append else 1,
        domain=IVC_DOMAIN,
        **attributes,
    )
    take_over(edit, node.outputs[0], y)
    for past, new in zip((past_key, past_value), present, strict=False):
        give(edit.graph, TensorName.of(past.name).to("new"), past, new)


def turned_for(node: ir.Node) -> ir.Node | None:
    """The TurnHeads that gives query, key and value to one attention and to nothing else."""
    turned = called(node.inputs[0], "TurnHeads")
    alone = turned is not None and list(turned.outputs) == list(node.inputs[:3])
    new = [] if turned is None else [use for value in turned.outputs for use in value.uses() if use.node is not node]
    return turned if alone and not new else None


def attend_to_rows(edit: Editor, node: ir.Node, turned: ir.Node, length: ir.Value | None) -> None:
    """Replace one decoder layer's attention, from a product's rows."""
    attributes: dict[str, Any] = {name: value.value for name, value in turned.attributes.items() if name != "values"}
    attributes["scale"] = node.attributes["scale"].as_float()
    caches = node.inputs[3:5]
    y, *present = edit.op(
        node, "AttendJoined", *turned.inputs, *caches, length, outputs=3, domain=IVC_DOMAIN, **attributes
    )
    take_over(edit, node.outputs[0], y)
    for past, new in zip(caches, present, strict=True):
        assert past is not None
        give(edit.graph, TensorName.of(past.name).to("new"), past, new)


def give(graph: ir.Graph, name: str, past: ir.Value, present: ir.Value) -> None:
    """Make a cache the graph's output `name`."""
    place = [value.name for value in graph.outputs].index(name)
    present.name, present.type, present.shape = TensorName.of(past.name).to("present"), past.type, past.shape
    graph.outputs[place] = present


def compact(edit: Editor) -> None:
    """Gather keys and values of the layers below the cut into their caches, which become inputs."""
    graph = edit.graph
    outputs = [value for value in graph.outputs if TensorName.of(value.name).role == "compact"]
    gathers = [gather for value in outputs if (gather := called(value, "CompactGather")) is not None]
    assert len(gathers) == len(outputs)
    if not gathers:
        return
    known = {value.name: value for value in graph.inputs}
    caches = []
    for output, gather in zip(outputs, gathers, strict=True):
        new = gather.inputs[0]
        assert new is not None and new.shape is not None
        shape = ir.Shape([*new.shape[:2], "P", *new.shape[3:]])
        caches.append(ir.val(TensorName.of(output.name).to("past"), type=new.type, shape=shape))
        graph.inputs.insert(list(graph.inputs).index(new) + 1, caches[-1])
    sources = [known["keep_index"], known["past_length"], *(gather.inputs[0] for gather in gathers), *caches]
    last = gathers[-1]
    count = len(caches)
    present = edit.op(last, "CompactIntoCaches", *sources, outputs=count, domain=IVC_DOMAIN, caches=count)
    for output, cache, new in zip(outputs, caches, present, strict=True):
        give(graph, str(output.name), cache, new)
    for gather in gathers:
        graph.remove(gather, safe=True)
