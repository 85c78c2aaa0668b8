"""Rounds rotary angles to the type of what they rotate, for graphs in float16."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import Editor
from ivc_export.lowering.types import types_of


class NarrowAnglesPass(ir.passes.InPlacePass):
    """Let rotations compute in the type of their input.

    Rotate computes in the type of cosines and sines, float32. PyTorch's models round both to their own dtype, and
    rotate in it.

    1. Needs: a portable graph, or one that is retyped, scaled or widened.
    2. Leaves: the tables of every Rotate in the type of what it rotates, by one Cast each.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cast every table once for each type."""
        edit = Editor(model.graph)
        narrow: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node, dtype, tables in wide_rotations(model.graph):
            for index, table in tables:
                if (table, dtype) not in narrow:
                    (narrow[table, dtype],) = edit.op(node, "Cast", table, to=int(dtype))
                node.replace_input_with(index, narrow[table, dtype])
        return ir.passes.PassResult(model, bool(narrow))

    def ensures(self, model: ir.Model) -> None:
        """Check the types of all tables."""
        for node, dtype, _ in wide_rotations(model.graph):
            raise ir.passes.PostconditionError(f"{node.name} has angles of another type than {dtype.name.lower()}")


def wide_rotations(graph: ir.Graph) -> list[tuple[ir.Node, ir.DataType, list[tuple[int, ir.Value]]]]:
    """Every Rotate, the type of what it rotates, and by their numbers the tables that have another type."""
    types, found = types_of(graph), []
    for node in graph:
        if (node.domain, node.op_type) != (IVC_DOMAIN, "Rotate"):
            continue
        x, *tables = node.inputs
        assert x is not None
        others = [(i, table) for i, table in enumerate(tables, 1) if table is not None and types[table] != types[x]]
        if others:
            found.append((node, types[x], others))
    return found
