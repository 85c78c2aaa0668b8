"""The inputs and outputs of graphs whose caches are written in place, by onnxruntime or by our plugin."""

from __future__ import annotations

from ivc_export.contract.graphs import CacheRole, TensorName
from ivc_export.contract.manifest import GraphInfo, TensorInfo
from ivc_export.contract.names import graph_file
from ivc_export.contract.operators import ATTENDED_SIZES


def in_place_lengths(past_length: str) -> dict[str, tuple[int, ...]]:
    """Inputs that replace `past_length`, or `past_length.i`, if caches are written in place, and their shapes."""
    _, dot, layer = past_length.partition(".")
    return {f"seqlens_k{dot}{layer}": (1,), f"total_sequence_length{dot}{layer}": ()}


def in_place_info(info: GraphInfo) -> GraphInfo:
    """Inputs and outputs of a graph that writes its caches in place, in buffers of one capacity P.

    - past_length becomes seqlens_k int32 [1], which is past_length + S - 1 (in decoder with M for S), and
      total_sequence_length int32 [], in host memory: past_length + S, or P in a decode step that a CUDA graph replays.
    - present_key.i and present_value.i replace new_key.i and new_value.i. They must be bound to the buffers of
      past_key.i and past_value.i.
    - new_key.i and new_value.i of the layers below the cut are rows of the caches already. The caches go from prefix to
      decoder instead. cache_index int32 [P] gives for each row of a compacted cache the row that it comes from.
      compact_key.i and compact_value.i are such caches, and must be bound to other buffers.
    - position_ids of `decode` contains the row's position P times, once for each row of a cache, because attention
      rotates.
    - hidden_states are a sixteenth of their size: see lowering.precision.scale_residuals.

    The vision graph's stay unchanged.
    """

    def changed(tensor: TensorInfo) -> list[TensorInfo]:
        name = TensorName.of(tensor.name)
        if name.stem == "past_length":
            return [TensorInfo(name=n, dtype="int32", shape=s) for n, s in in_place_lengths(tensor.name).items()]
        if name.stem == "keep_index":
            return [tensor, TensorInfo(name="cache_index", dtype="int32", shape=("P",))]
        if name.role in ("new", "compact"):
            renamed = name.to("past") if name.role == "new" else tensor.name
            return [TensorInfo(name=renamed, dtype=tensor.dtype, shape=(*tensor.shape[:2], "P", *tensor.shape[3:]))]
        if name.stem == "position_ids" and info.file == graph_file("decode"):
            return [tensor.model_copy(update={"shape": (*tensor.shape[:-1], "P")})]
        return [tensor]

    caches = [t for t in info.inputs if TensorName.of(t.name).role == "past"]
    present = [t.model_copy(update={"name": TensorName.of(t.name).to("present")}) for t in caches]
    outputs = [t for t in info.outputs if TensorName.of(t.name).role != "new"]
    return info.model_copy(
        update={
            "inputs": tuple(new for t in info.inputs for new in changed(t)),
            "outputs": (*(new for t in outputs for new in changed(t)), *present),
        }
    )


def placed_rows_info(info: GraphInfo) -> GraphInfo:
    """The same, where a graph that chooses rows gets the rows of the caches from its caller, instead of computing them.

    cache_rows int32 [P] has the numbers 0 to P - 1, cache_place int32 [M] those from past_length on, and cache_start
    int32 [1] is past_length. All three can be views of one array that never changes.
    """
    found = in_place_info(info)
    if all(t.name != "keep_index" for t in found.outputs):
        return found
    rows = [TensorInfo(name=name, dtype="int32", shape=shape) for name, shape in PLACED_ROWS.items()]
    return found.model_copy(update={"inputs": (*found.inputs, *rows)})


PLACED_ROWS: dict[str, tuple[int | str, ...]] = {"cache_rows": ("P",), "cache_place": ("M",), "cache_start": (1,)}
"""Inputs that number the rows of the caches, and their shapes."""


def owned_caches_info(info: GraphInfo) -> GraphInfo:
    """Inputs and outputs of a graph whose decoder layers write to the caller's caches, by our plugin's operators.

    This applies only if keys and values are of one size that AttendInPlace takes. Other graphs stay unchanged.

    - prefix reads the caches and gives new_key.i and new_value.i as before. Rows of pruned tokens never get into a
      cache.
    - In decoder, caches of layers below the cut are inputs too. present_key.i and present_value.i replace compact_key.i
      and compact_value.i, and above the cut new_key.i and new_value.i. They are bound to the buffers of past_key.i and
      past_value.i, and are written in place, from row past_length on.
    - Layers that keep every row have no such output. The caller must append their new_key.i and new_value.i of prefix.
    """
    sizes = {t.shape[3] for t in info.inputs if TensorName.of(t.name).role == "past"}
    if all(t.name != "keep_index" for t in info.inputs) or len(sizes) != 1 or not sizes <= {*ATTENDED_SIZES}:
        return info
    compacted = {TensorName.of(t.name).to("new") for t in info.outputs if TensorName.of(t.name).role == "compact"}

    def cache(tensor: TensorInfo, role: CacheRole) -> TensorInfo:
        shape = (*tensor.shape[:2], "P", *tensor.shape[3:])
        return tensor.model_copy(update={"name": TensorName.of(tensor.name).to(role), "shape": shape})

    inputs = [(t, cache(t, "past")) if t.name in compacted else (t,) for t in info.inputs]
    outputs = [cache(t, "present") if TensorName.of(t.name).role in ("new", "compact") else t for t in info.outputs]
    return info.model_copy(update={"inputs": tuple(t for some in inputs for t in some), "outputs": tuple(outputs)})
