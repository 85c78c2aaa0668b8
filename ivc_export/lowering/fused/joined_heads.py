"""Rows with the heads of query, key and value side by side, from one product, and attention over such rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ivc_export.lowering.edit import Editor, called, made_by, numbers

MOST_SIZE = 128
"""The largest size of a head."""


@dataclass(frozen=True)
class JoinedHeads:
    """Query, key and value of one attention as rows [frames rows, (heads + 2 kv_heads) head_dim].

    grouped: True if heads are ordered by key-value head: its queries, its key and its value. False if all queries come
        first, then all keys, then all values.
    frames: int64 [1]. cos, sin: float32 [rows, head_dim / 2], by which query and key are rotated, if they are.
    query_norm, key_norm: weights [head_dim] of RMS norms of heads before the rotation. epsilon: of these norms.
    """

    rows: ir.Value
    frames: ir.Value
    heads: int
    kv_heads: int
    head_dim: int
    grouped: bool
    cos: ir.Value | None
    sin: ir.Value | None
    query_norm: ir.Value | None
    key_norm: ir.Value | None
    epsilon: float

    @property
    def optional(self) -> list[ir.Value | None]:
        """The optional inputs: cos, sin, query_norm, key_norm. Missing ones at the end are left out."""
        found = [self.cos, self.sin, self.query_norm, self.key_norm]
        while found and found[-1] is None:
            found.pop()
        return found

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the operators over such rows."""
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {**sizes, "grouped": int(self.grouped), "epsilon": self.epsilon}


@dataclass(frozen=True)
class Head:
    """How an input of attention [frames, heads, rows, head_dim] is made: from rows that are split, normed and
    rotated."""

    split: ir.Node
    norm: ir.Node | None
    angles: tuple[ir.Value | None, ...]

    @staticmethod
    def of(x: ir.Value | None) -> Head | None:
        """Recognise an input. None if it is made in another way."""
        rotation = called(x, "Rotate")
        x = rotation.inputs[0] if rotation is not None else x
        norm = called(x, "RMSNorm")
        split = called(norm.inputs[0] if norm is not None else x, "SplitHeads")
        return None if split is None else Head(split, norm, tuple(rotation.inputs[1:]) if rotation is not None else ())

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.split.attributes["heads"].as_int()

    @property
    def size(self) -> int:
        """Size of a head."""
        return self.split.attributes["head_dim"].as_int()

    @property
    def epsilon(self) -> float | None:
        """Epsilon of the norm."""
        return None if self.norm is None else self.norm.attributes["epsilon"].as_float()


def join_heads(edit: Editor, node: ir.Node, angles: dict[ir.Value, ir.Value]) -> JoinedHeads | None:
    """Query, key and value of an attention as joined rows. None if our kernels do not take them in this form.

    If no product gives such rows yet, a Concat joins several; PackProjectionsPass makes one product of them. angles:
    cosines and sines that were cast to float32 for other layers.
    """
    found = [Head.of(value) for value in node.inputs[:3]]
    heads = [head for head in found if head is not None]
    if len(heads) < 3 or not taken(edit, *heads):
        return None
    query, key, value = heads
    rows = grouped_rows(query, key, value)
    grouped = rows is not None
    if rows is None:
        rows = rows_of_parts(edit, node, [head.split.inputs[0] for head in heads])
    frames = query.split.inputs[1]
    assert frames is not None
    cos, sin = [wide(edit, node, table, angles) for table in query.angles] or (None, None)
    query_norm, key_norm = (head.norm.inputs[1] if head.norm is not None else None for head in (query, key))
    sizes = (query.heads, key.heads, query.size)
    epsilon = query.epsilon or key.epsilon or 0.0
    return JoinedHeads(rows, frames, *sizes, grouped, cos, sin, query_norm, key_norm, epsilon)


def taken(edit: Editor, query: Head, key: Head, value: Head) -> bool:
    """Whether our kernels take such heads."""
    size, normed = query.size, query.norm is not None or key.norm is not None
    return (
        {key.size, value.size} == {size}
        and size <= MOST_SIZE
        and size % 8 == 0
        and (not normed or size & (size - 1) == 0)
        and key.heads == value.heads
        and query.heads % key.heads == 0
        and query.angles == key.angles
        and value.norm is None
        and not value.angles
        and len({head.split.inputs[1] for head in (query, key, value)}) == 1
        and len({head.epsilon for head in (query, key)} - {None}) < 2
        and len({edit.types[head.split.inputs[0]] for head in (query, key, value)}) == 1  # type: ignore[index]
    )


def grouped_rows(query: Head, key: Head, value: Head) -> ir.Value | None:
    """The rows from which a graph cuts heads that are ordered by key-value head."""
    parts = [head.split.inputs[0] for head in (query, key, value)]
    split = made_by(parts[0], "Split")
    if split is None or list(split.outputs) != parts or split.attributes["axis"].as_int() != 2:
        return None
    by_head = made_by(split.inputs[0], "Reshape")
    shape = [-1, key.heads, query.heads // key.heads + 2, query.size]
    return by_head.inputs[0] if by_head is not None and numbers(by_head.inputs[1]) == shape else None


def rows_of_parts(edit: Editor, node: ir.Node, parts: Sequence[ir.Value | None]) -> ir.Value:
    """Rows with these parts, in order."""
    split = made_by(parts[0], "Split")
    if split is not None and list(split.outputs) == [*parts] and split.attributes["axis"].as_int() in (-1, 1):
        assert split.inputs[0] is not None
        return split.inputs[0]
    return edit.op(node, "Concat", *parts, axis=-1)[0]


def wide(edit: Editor, node: ir.Node, table: ir.Value | None, angles: dict[ir.Value, ir.Value]) -> ir.Value:
    """Cosines or sines in float32."""
    assert table is not None
    if edit.types[table] == ir.DataType.FLOAT:
        return table
    if table not in angles:
        (angles[table],) = edit.op(node, "Cast", table, to=int(ir.DataType.FLOAT))
    return angles[table]
