"""Rounds a checkpoint's weights to 4 or 8 bits: the layers of a model, and the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from ivc_export.checkpoint.folder import StoredTensor
from ivc_export.checkpoint.formats.floats import FLOAT, float_linear
from ivc_export.checkpoint.formats.nbits import BITS, Packing
from ivc_export.checkpoint.formats.rounded import RoundedLayer, copied, rounded_format
from ivc_export.checkpoint.formats.weight_format import Builder, DerivedTensor, WeightFormat, find_tensor
from ivc_export.checkpoint.weights import EMBEDDING, TABLE, PlannedWeights, Weights
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.graphs import build_graphs
from ivc_export.exporter.recipe import Quantisation
from ivc_export.families.family import Model

Role = Literal["decoder", "lm_head", "vision"]


@dataclass(frozen=True)
class Linear:
    """A product of a model. norm: the weight of the RMSNorm that gives its input, if there is one."""

    name: str
    out: int
    features: int
    role: Role
    norm: str | None


def linears(model: Model) -> dict[str, Linear]:
    """Every product of a model's graphs that a weight format can store, by its layer's canonical name."""
    found: dict[str, Linear] = {}
    head = "model.embed_tokens" if model.decoder.tied_embeddings else "lm_head"

    def note(g: Builder, x: ir.Value, name: str, out: int, features: int, bias: bool) -> ir.Value:
        role: Role = "lm_head" if name == head else "decoder" if name.startswith("model.layers.") else "vision"
        node = x.producer()
        norm = node.inputs[1] if node is not None and node.op_type == "RMSNorm" else None
        found[name] = Linear(name, out, features, role, None if norm is None else norm.name)
        return float_linear(g, x, name, out, features, bias)

    noting = WeightFormat("noted", lambda layer: True, lambda tensors: {}, note)
    build_graphs(model, PlannedWeights("float32", noting), model.decoder.cuts[0])
    return found


def packings(q: Quantisation) -> dict[Role, Packing]:
    """For each role of layers that is rounded, how its layers are packed."""

    def packing(name: str, zero_points: bool = False) -> Packing:
        return Packing(next(bits for bits in BITS if name == f"int{bits}"), q.group_size, zero_points)

    found: dict[Role, Packing] = {}
    if q.weights:
        found["decoder"] = packing(q.weights, q.asymmetric)
    if q.lm_head:
        found["lm_head"] = packing(q.lm_head)
    if q.vision:
        found["vision"] = packing(q.vision)
    return found


def shares_table(q: Quantisation, model: Model) -> bool:
    """Whether one tensor in 8 bits is both the table of embeddings and lm_head's weight."""
    return model.decoder.tied_embeddings and bool(q.embeddings) and q.embeddings == q.lm_head


def check_stored(q: Quantisation, stored: WeightFormat, model: Model, packed: bool) -> None:
    """Check that a checkpoint's weights can be rounded as wanted. packed: whether the graphs may have weights in 4 and
    8 bits.

    Raises:
        UserError: they are quantised already, the graphs may not have them, or a table would be stored twice for
            nothing.
    """
    if not q.rounds:
        return
    if not packed:
        raise UserError(
            "these graphs hold only floats: leave out --lowering native, or the options that quantise weights"
        )
    if q.weights and stored is not FLOAT:
        raise UserError(
            f"the checkpoint's decoder layers are already quantised ({stored.name}): leave out --weight-format, or "
            "give a checkpoint of floats"
        )
    if q.embeddings and model.decoder.tied_embeddings and not q.lm_head:
        raise UserError(
            "lm_head uses this model's embeddings and would keep a copy of them in floats: give --lm-head int8 as "
            "well, so that both use one copy in 8 bits"
        )


def planned_formats(q: Quantisation, stored: WeightFormat, model: Model) -> dict[str, WeightFormat]:
    """The formats of layers that are rounded, by their names.

    Raises:
        UserError: one of them is quantised already.
    """
    by_role = packings(q)
    found = {}
    for one in linears(model).values() if by_role else ():
        if one.role not in by_role:
            continue
        if stored is not FLOAT and stored.covers(one.name):
            raise UserError(
                f"{one.name} of the checkpoint is already quantised ({stored.name}): leave out the option that "
                "quantises it"
            )
        found[one.name] = rounded_format(by_role[one.role])
    return found


def plan_table(q: Quantisation, model: Model, weights: PlannedWeights) -> None:
    """Request the table of embeddings."""
    vocabulary, hidden = model.decoder.vocab_size, model.decoder.hidden_size
    if not q.embeddings:
        weights.external(EMBEDDING, (vocabulary, hidden))
    elif not shares_table(q, model):
        packing = Packing(8, q.group_size)
        blocks = packing.blocks(hidden)
        weights.external(f"{TABLE}.packed", (vocabulary, blocks, packing.block(hidden)), dtype="U8")
        weights.external(f"{TABLE}.scales", (vocabulary, blocks))


def round_weights(weights: Weights, q: Quantisation, model: Model, dtype: FloatName) -> Weights:
    """The weights in which layers and embeddings to round are tensors derived from the stored ones.

    dtype: of the bundle.

    Raises:
        UserError: a layer's weight is missing, has another shape, is not of floats, or is quantised already.
    """
    if not q.rounds:
        return weights
    by_role, formats = packings(q), dict(weights.formats)
    derived, tensors = dict(weights.derived), dict(weights.tensors)

    def floats(name: str, shape: tuple[int, int]) -> StoredTensor:
        tensor = weights.find(name, shape, find_tensor(weights.tensors, name).dtype)
        if tensor.dtype not in FLOATS:
            raise UserError(f"{tensor.name} in {tensor.file.name} is {tensor.dtype}: give a checkpoint of floats")
        return tensor

    def add(stem: str, weight: StoredTensor, packing: Packing, norm: StoredTensor | None) -> None:
        derived.update(RoundedLayer(stem, weight, packing, dtype, norm, q.search).tensors())

    for one in linears(model).values():
        if one.role not in by_role:
            continue
        if one.name in weights.formats:
            stored = weights.formats[one.name].name
            raise UserError(
                f"{one.name} of the checkpoint is already quantised ({stored}): leave out the option that quantises it"
            )
        weight = floats(f"{one.name}.weight", (one.out, one.features))
        add(f"{one.name}.weight", weight, by_role[one.role], weights.tensors.get(one.norm or ""))
        formats[one.name] = rounded_format(by_role[one.role])
        tensors.pop(f"{one.name}.weight")
    table = floats(EMBEDDING, (model.decoder.vocab_size, model.decoder.hidden_size))
    if not q.embeddings:
        if EMBEDDING not in tensors:  # lm_head's weight is rounded, and the table stays as it is
            derived[EMBEDDING] = copied(table, EMBEDDING)
    else:
        tensors.pop(EMBEDDING, None)
        if not shares_table(q, model):
            add(TABLE, table, Packing(8, q.group_size), None)
    return replace(weights, tensors=tensors, formats=formats, derived=derived)


def table_stem(tensors: Mapping[str, StoredTensor | DerivedTensor]) -> str | None:
    """The beginning of the names of a bundle's 8-bit embedding tensors. None if the table is of floats."""
    if EMBEDDING in tensors:
        return None
    return TABLE if f"{TABLE}.packed" in tensors else EMBEDDING
