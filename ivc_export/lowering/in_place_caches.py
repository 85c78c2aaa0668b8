"""Compacts caches that are written in place, instead of this run's rows."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ivc_export.contract.caches import PLACED_ROWS, in_place_lengths
from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import Editor, called, remove_unused

INT32 = ir.DataType.INT32


class CompactCachesPass(ir.passes.InPlacePass):
    """Compact the caches of the layers below the cut, to which prefix has written this run's rows.

    1. Needs: graphs whose attention writes its caches in place (UseFusedAttentionPass, WriteCachesPass).
    2. Leaves: inputs and outputs as contract.caches.placed_rows_info says. A graph that chooses rows gives cache_index:
       for each row of a cache the row that it has after compaction. A graph that drops rows takes cache_index and the
       caches below the cut, and gives compact_key.i and compact_value.i as whole caches. No new_key.i and new_value.i.

    own: whether a library of ours computes cache_index, by its operator CacheIndex. Inputs and outputs are then as
        contract.caches.in_place_info says.
    """

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.own = own

    def requires(self, model: ir.Model) -> None:
        """Check that no attention is left that takes caches and gives rows."""
        left = reading_caches(model.graph)
        if left:
            raise ir.passes.PreconditionError(f"{left[0].name} does not write its caches in place")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at the graph's inputs and outputs."""
        graph = model.graph
        done = any(value.name == "cache_index" for value in (*graph.inputs, *graph.outputs))
        chooses = not done and any(value.name == "keep_index" for value in graph.outputs)
        drops = not done and any(value.name == "keep_index" for value in graph.inputs)
        if chooses:
            add_cache_index(graph, self.own)
        if drops:
            gather_caches(graph)
        kept = [value for value in graph.outputs if TensorName.of(value.name).role != "new"]
        changed = chooses or drops or len(kept) < len(graph.outputs)
        if changed:
            graph.outputs[:] = kept
            remove_unused(model.graph)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no rows of this run are given, and that cache_index goes with keep_index."""
        for values in (model.graph.inputs, model.graph.outputs):
            names = {value.name for value in values}
            if ("keep_index" in names) != ("cache_index" in names):
                raise ir.passes.PostconditionError("keep_index and cache_index do not go together")
        left = [value.name for value in model.graph.outputs if TensorName.of(value.name).role == "new"]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is still given beside its cache")


def reading_caches(graph: ir.Graph) -> list[ir.Node]:
    """Calls of Attention that read caches in the state before the run."""
    found = [node for node in graph if called(node.outputs[0], "Attention")]
    return [node for node in found if any(value in graph.inputs for value in node.inputs)]


def add_cache_index(graph: ir.Graph, own: bool) -> None:
    """cache_index int32 [P]: row p comes from itself, but row past + m comes from keep_index[m] of this run's rows.

    Our library's operator computes the rows from sizes. Otherwise they are inputs, views of an array that the caller
    has: onnxruntime would need fourteen nodes for them.
    """
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    select = values["keep_index"].producer()
    assert select is not None
    end = ir.node("Identity", [values["keep_index"]], name="cache_index")  # new nodes are put at this one's place
    graph.insert_after(select, end)
    edit = Editor(graph)
    if own:
        _, total = in_place_lengths("past_length")
        given = (values["keep_index"], values[total], values["position_ids"], compacted_cache(values))
        (index,) = edit.op(end, "CacheIndex", *given, domain=IVC_DOMAIN)
    else:
        rows, place, start = (ir.val(name, dtype=INT32, shape=shape) for name, shape in PLACED_ROWS.items())
        graph.inputs.extend((rows, place, start))
        (source,) = edit.op(end, "Add", values["keep_index"], start)
        (index,) = edit.op(end, "ScatterElements", rows, place, source, axis=0)
    graph.remove(end, safe=True)
    index.name, index.type, index.shape = "cache_index", ir.TensorType(INT32), ir.Shape(["P"])
    graph.outputs.insert(list(graph.outputs).index(values["keep_index"]) + 1, index)


def compacted_cache(values: Mapping[str | None, ir.Value]) -> ir.Value:
    """A cache among a graph's inputs that is compacted. values: inputs by name."""
    length, _ = in_place_lengths("past_length")
    whole = {TensorName.of(name).layer for name in values if TensorName.of(name).stem == length}  # and None
    named = ((TensorName.of(name), value) for name, value in values.items())
    return next(value for name, value in named if name.role == "past" and name.layer not in whole)


def gather_caches(graph: ir.Graph) -> None:
    """Gather compact_key.i and compact_value.i from whole caches."""
    edit = Editor(graph)
    keep = next(i for i, value in enumerate(graph.inputs) if value.name == "keep_index")
    index = ir.val("cache_index", dtype=INT32, shape=["P"])
    graph.inputs.insert(keep + 1, index)
    shape = next(value.shape for value in graph.inputs if TensorName.of(value.name).role == "past")
    for node in list(graph):
        name = TensorName.of(node.outputs[0].name)
        if node.domain != IVC_DOMAIN or name.role != "compact":
            continue
        new = node.inputs[0]
        assert new is not None
        cache = ir.val(name.to("past"), type=new.type, shape=ir.Shape([*(shape or ())[:3], *(new.shape or ())[3:]]))
        graph.inputs[list(graph.inputs).index(new)] = cache
        (compact,) = edit.op(node, "Gather", cache, index, axis=2)
        edit.replace(node.outputs[0], compact)
        compact.shape = cache.shape
        graph.remove(node, safe=True)
