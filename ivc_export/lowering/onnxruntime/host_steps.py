"""Lets decode steps read a few numbers from host memory and write the best token there, by custom operators."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.contract.graphs import TensorName
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.lowering.edit import Editor, made_by, numbers, remove_unused

STEP, ROW, TABLE, BEFORE, WANTED, BEST, TOLD = "step", "row", "table", "before", "wanted", "best", "told"
"""Inputs that replace all others except caches. All are in host memory, but the device reads `table` by its address."""

NO_TOKEN = -1
"""Instead of a step's token: it takes the best of the step before."""

ANSWER = (WANTED, BEST, TOLD)
"""Those that a run's end takes."""

STEP_FREQUENCIES = "step/frequencies"


@dataclass(frozen=True)
class Table:
    """The embedding table, an initializer of a decode graph. name: its name there. tensor: its values."""

    name: str
    tensor: ir.TensorProtocol


def take_host_steps(model: ir.Model, table: Table | str | None, hidden: int) -> bool:
    """Let a decode graph of the `ort-cuda-ops` lowering read its inputs from host memory and write the best token
    there.

    All inputs except caches are replaced by these: step int32 [1 + axes + lengths] (the token, its positions, valid
    rows of the caches); wanted int32 [1] (whether all logits are wanted in host memory); best int32 [2] (written: the
    best token, and whether logits are finite); told float32 [vocab] (written if wanted: logits); with a table, before
    int32 [2], `best` of the step before, whose token is taken if step has NO_TOKEN; and, without a table, row [1, 1,
    hidden], the token's embedding. Where the row is read, it is scaled, and cosines and sines are computed. logits stay
    an output.

    table: an initializer, or the name of one more input, [vocab, hidden].

    Returns whether it was possible. It is only for graphs of the known form; others stay unchanged.
    """
    graph = model.graph
    known = {str(value.name): value for value in graph.inputs}
    lengths = [known[name] for name in known if name.startswith("seqlens_k")]
    angles = angles_of(known["position_ids"])
    (logits,) = [value for value in graph.outputs if value.name == "logits"]
    told = logits_behind(logits)
    totals = [known[name] for name in known if name.startswith("total_sequence_length")]
    if angles is None or told is None or len(lengths) > 2 or any(value.uses() for value in totals):
        return False
    edit, embedded = Editor(graph), known["inputs_embeds"]
    dtype = embedded.dtype
    assert dtype is not None
    scaled, scale = scaled_alone(embedded)
    first = graph[0]
    step = ir.val(STEP, dtype=ir.DataType.INT32, shape=[1 + len(angles.frequencies) + len(lengths)])
    row = None if table else ir.val(ROW, dtype=dtype, shape=[1, 1, hidden])
    before = ir.val(BEFORE, dtype=ir.DataType.INT32, shape=[2]) if table else None
    frequencies = ir.tensor(angles.frequencies[:, None].astype(np.float32), name=STEP_FREQUENCIES)
    add_initializer(graph, STEP_FREQUENCIES, frequencies)
    given = ir.val(table, dtype=dtype, shape=["vocab", hidden]) if isinstance(table, str) else None
    rows = given
    if isinstance(table, Table):
        if table.name not in graph.initializers:
            add_initializer(graph, table.name, table.tensor)
        rows = graph.initializers[table.name]
    inputs = [step, graph.initializers[STEP_FREQUENCIES], rows, row, before]
    outputs = 3 + len(lengths)
    embeds, cos, sin, *found = edit.op(first, "TakeStep", *inputs, outputs=outputs, domain=IVC_DOMAIN, scale=scale)
    for old, new in zip((scaled, *angles.tables, *lengths), (embeds, cos, sin, *found), strict=True):
        old.replace_all_uses_with(new)
    added = [step, *answered(edit, logits, told), *(value for value in (row, given, before) if value is not None)]
    caches = [value for value in graph.inputs if TensorName.of(value.name).role == "past"]
    remove_unused(model.graph)
    graph.inputs[:] = [*added, *caches]
    return True


def give_answer(model: ir.Model) -> bool:
    """Let the decoder of the `ort-cuda-ops` lowering write the best token to host memory, as a decode step does: to its
    new inputs wanted, best and told. logits stay an output.

    Returns whether it was possible.
    """
    (logits,) = [value for value in model.graph.outputs if value.name == "logits"]
    told = logits_behind(logits)
    if told is None:
        return False
    model.graph.inputs.extend(answered(Editor(model.graph), logits, told))
    remove_unused(model.graph)
    return True


def answered(edit: Editor, logits: ir.Value, told: ir.Value) -> list[ir.Value]:
    """Tell the best token of a graph's logits, which are `told` before. Returns the inputs that this takes."""
    wanted, best = (ir.val(name, dtype=ir.DataType.INT32, shape=[size]) for name, size in ((WANTED, 1), (BEST, 2)))
    vocab = int(list(logits.shape or ())[-1])  # type: ignore[arg-type]
    numbers = ir.val(TOLD, dtype=ir.DataType.FLOAT, shape=[vocab])
    last = logits.producer()
    assert last is not None
    (given,) = edit.op(last, "GiveAnswer", told, wanted, best, numbers, domain=IVC_DOMAIN)
    edit.replace(logits, given)
    return [wanted, best, numbers]


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> None:
    """Add a tensor under a name."""
    shape = ir.Shape([int(extent) for extent in tensor.shape.numpy()])
    graph.initializers[name] = ir.val(name, dtype=tensor.dtype, shape=shape, const_value=tensor)


@dataclass(frozen=True)
class Angles:
    """tables: cosines and sines, [1, pairs]. frequencies: [axes, pairs], by which positions are multiplied."""

    tables: tuple[ir.Value, ir.Value]
    frequencies: npt.NDArray[np.float32]


def angles_of(positions: ir.Value) -> Angles | None:
    """The values computed from a row's positions, if these are cosines and sines of their sum and nothing else."""
    value, frequencies = positions, None
    for op_type in ("Slice", "Squeeze", "Unsqueeze", "Cast", "Mul", "ReduceSum"):
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or users[0].op_type != op_type or users[0].inputs[0] is not value:
            return None
        if op_type == "Mul":
            constant = users[0].inputs[1].const_value if users[0].inputs[1] is not None else None
            frequencies = None if constant is None else constant.numpy()
        value = users[0].outputs[0]
    turns = {user.op_type: user.outputs[0] for user, _ in value.uses()}
    if frequencies is None or frequencies.ndim != 3 or set(turns) != {"Cos", "Sin"} or len(list(value.uses())) != 2:
        return None
    return Angles((turns["Cos"], turns["Sin"]), frequencies[:, 0])


def scaled_alone(embeds: ir.Value) -> tuple[ir.Value, float]:
    """What alone is computed from embeddings, if it is a product with a number, and the number; else themselves."""
    users = list(embeds.uses())
    if len(users) == 1 and users[0].node.op_type == "Mul":
        by = numbers(users[0].node.inputs[1 - users[0].idx])
        if len(by) == 1:
            return users[0].node.outputs[0], by[0]
    return embeds, 1.0


def logits_behind(logits: ir.Value) -> ir.Value | None:
    """The product [1, vocab] whose values a graph gives as logits [1, 1, vocab] in float32."""
    batch = made_by(logits, "Unsqueeze")
    value = batch.inputs[0] if batch is not None else None
    cast = made_by(value, "Cast")
    return cast.inputs[0] if cast is not None else value
