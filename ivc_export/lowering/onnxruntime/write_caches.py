"""Computes attention over caches that are written in place by standard operators, where onnxruntime's own cannot."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import Editor, called, remove_unused
from ivc_export.lowering.in_place_caches import reading_caches
from ivc_export.lowering.onnxruntime.attention import mask_of, start_of

Run = tuple[ir.Value, ir.Value]
"""This run's rows in a cache, int32 [S], and to what each of them attends, bool [S, P]."""


class WriteCachesPass(ir.passes.InPlacePass):
    """Let the Attention that UseFusedAttentionPass leaves read whole caches, which include this run's rows.

    1. Needs: calls of Attention that attend to what CausalMask allows, over caches that are inputs.
    2. Leaves: Attention over present_key.i and present_value.i, and over no other rows. These are outputs: the caches
       with this run's rows behind the valid ones. Lengths are as contract.caches.in_place_info says. The outputs are
       bound to the buffers of past_key.i and past_value.i and written in place: nothing else reads these.
    """

    def requires(self, model: ir.Model) -> None:
        """Check the masks."""
        for node in reading_caches(model.graph):
            if called(node.inputs[5], "CausalMask") is None:
                raise ir.passes.PreconditionError(f"{node.name} has a mask of its own, by which no cache is written")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Call by call."""
        edit, runs = Editor(model.graph), dict[ir.Value, Run]()
        found = reading_caches(model.graph)
        for node in found:
            write(edit, node, runs)
        if found:
            remove_unused(model.graph)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no attention reads a cache's old rows."""
        for node in reading_caches(model.graph):
            raise ir.passes.PostconditionError(f"{node.name} reads a cache that is not written in place")


def write(edit: Editor, node: ir.Node, runs: dict[ir.Value, Run]) -> None:
    """Write one layer's rows, and attend. runs: by what CausalMask gives, which layers share."""
    q, *new, past_key, past_value, visible = node.inputs
    assert visible is not None and past_key is not None
    if visible not in runs:
        position_ids, _, past_length = mask_of(node)
        runs[visible] = run_of(edit, node, position_ids, past_length, past_key)
    rows, sees = runs[visible]
    (place,) = edit.op(node, "Reshape", rows, edit.ints(1, 1, -1, 1))
    whole, none = list[ir.Value](), list[ir.Value]()
    for fresh, past in zip(new, (past_key, past_value), strict=True):
        assert past is not None
        (shape,) = edit.op(node, "Shape", fresh)
        (places,) = edit.op(node, "Expand", place, shape)
        (present,) = edit.op(node, "ScatterElements", past, places, fresh, axis=2)
        present.name, present.type, present.shape = TensorName.of(past.name).to("present"), past.type, past.shape
        edit.graph.outputs.append(present)
        whole.append(present)
        none += edit.op(node, "Slice", present, edit.ints(0), edit.ints(0), edit.ints(2))
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    (y,) = edit.op(node, "Attention", q, *whole, *none, sees, domain=IVC_DOMAIN, **attributes)
    edit.replace(node.outputs[0], y)
    edit.graph.remove(node, safe=True)


def run_of(edit: Editor, node: ir.Node, position_ids: ir.Value, past_length: ir.Value, cache: ir.Value) -> Run:
    """Where this run's rows go, and what they attend to: rows up to themselves."""
    start = start_of(edit, node, position_ids, past_length)
    (rows,) = edit.op(node, "Add", edit.counting(node, edit.extent(node, position_ids, 2)), start)
    (row,) = edit.op(node, "Unsqueeze", rows, edit.ints(1))
    (later,) = edit.op(node, "Less", row, edit.counting(node, edit.extent(node, cache, 2)))
    return rows, edit.op(node, "Not", later)[0]
