"""Compaction of caches in place of compaction of this run's rows."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ivc_export.contract import IVC_DOMAIN
from ivc_export.lowering.match import Editor

INT32 = ir.DataType.INT32


class CompactCachesPass(ir.passes.InPlacePass):
    """Compact the caches of the layers below the cut, which prefix has written this run's rows to.

    1. Needs: graphs whose attention writes its caches (FuseAttentionPass).
    2. Leaves: inputs and outputs as contract.ort_cuda_info says. In prefix, cache_index, for each row of a cache the
       row that it holds after compaction, instead of new_key.i and new_value.i; in decoder, cache_index and these
       caches as inputs instead, and compact_key.i and compact_value.i as whole caches.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph, by its name."""
        graph = model.graph
        if graph.name == "prefix":
            add_cache_index(graph)
            graph.outputs[:] = [v for v in graph.outputs if not str(v.name).startswith(("new_key.", "new_value."))]
        elif graph.name == "decoder":
            gather_caches(graph)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, graph.name != "vision")


def add_cache_index(graph: ir.Graph) -> None:
    """cache_index int32 [P]: row p for itself, but keep_index[m] of this run's rows for row past + m."""
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    select = values["keep_index"].producer()
    assert select is not None
    end = ir.node("Identity", [values["keep_index"]], name="cache_index")  # new nodes stand where this one does
    graph.insert_after(select, end)
    edit = Editor(graph)

    def extent(name: str, axis: int) -> ir.Value:
        (shape,) = edit.op(end, "Shape", values[name])
        (length,) = edit.op(end, "Gather", shape, edit.ints(axis), axis=0)
        return edit.op(end, "Cast", length, to=int(INT32))[0]

    def counting(length: ir.Value) -> ir.Value:
        (scalar,) = edit.op(end, "Squeeze", length, edit.ints(0))
        return edit.op(end, "Range", edit.scalar(0), scalar, edit.scalar(1))[0]

    own = {str(name).rpartition(".")[2] for name in values if str(name).startswith("seqlens_k.")}  # kept whole
    caches = [str(name) for name in values if str(name).startswith("past_key.")]
    cache = next(name for name in caches if name.rpartition(".")[2] not in own)
    (last,) = edit.op(end, "Sub", values["seqlens_k"], extent("position_ids", 2))
    (past,) = edit.op(end, "Add", last, edit.scalar(1))
    (target,) = edit.op(end, "Add", counting(extent("keep_index", 0)), past)
    (source,) = edit.op(end, "Add", values["keep_index"], past)
    (index,) = edit.op(end, "ScatterElements", counting(extent(cache, 2)), target, source, axis=0)
    graph.remove(end, safe=True)
    index.name, index.type, index.shape = "cache_index", ir.TensorType(INT32), ir.Shape(["P"])
    graph.outputs.insert(list(graph.outputs).index(values["keep_index"]) + 1, index)


def gather_caches(graph: ir.Graph) -> None:
    """Let compact_key.i and compact_value.i be gathered from whole caches."""
    edit = Editor(graph)
    keep = next(i for i, value in enumerate(graph.inputs) if value.name == "keep_index")
    index = ir.val("cache_index", dtype=INT32, shape=["P"])
    graph.inputs.insert(keep + 1, index)
    for node in list(graph):
        name = str(node.outputs[0].name)
        if node.domain != IVC_DOMAIN or not name.startswith("compact_"):
            continue
        new = node.inputs[0]
        assert new is not None
        cache = ir.val(name.replace("compact_", "past_"), type=new.type, shape=past_shape(graph))
        graph.inputs[list(graph.inputs).index(new)] = cache
        (compact,) = edit.op(node, "Gather", cache, index, axis=2)
        old = node.outputs[0]
        edit.replace(old, compact)
        compact.shape = cache.shape
        graph.remove(node, safe=True)


def past_shape(graph: ir.Graph) -> ir.Shape:
    """The shape of the graph's caches."""
    cache = next(value for value in graph.inputs if str(value.name).startswith("past_key."))
    return ir.Shape(cache.shape or ())
