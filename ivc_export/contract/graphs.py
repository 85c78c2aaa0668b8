"""The inputs and outputs of the graphs, and their shapes for the sizes of a model."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from ivc_export.contract.manifest import DecoderSizes, GraphInfo, RotarySizes, Selection, SelectionRule, TensorInfo
from ivc_export.contract.names import AnyGraphName, graph_file
from ivc_export.contract.preprocessing import FixedPreprocessing, PatchPreprocessing, Preprocessing
from ivc_export.dtypes import FloatName

Kind = Literal["key", "value"]
Only = Literal["", "patches", "tiles", "views", "frames", "thumbnails", "ivc rule", "view rule", "unnormed-values"]
CacheRole = Literal["past", "new", "compact", "present"]


class Layers(enum.Enum):
    """The layers for which a tensor exists, once each. `{i}` in its name is the layer's number."""

    NONE = enum.auto()
    BELOW = enum.auto()  # layers 0..k-1, which run over every token
    COMPACTED = enum.auto()  # those of them whose cache is compacted: all, for most families
    WHOLE = enum.auto()  # those of them whose cache keeps every row
    ABOVE = enum.auto()  # layers k..N-1, which run over kept tokens
    ALL = enum.auto()
    DEEPSTACK = enum.auto()  # the first `deepstack` layers, all below the cut: none, for most families


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a graph. dtype "graph" is the dtype in which the graph computes. `only` says which models have the
    tensor."""

    name: str
    dtype: Literal["graph", "float32", "int32"]
    axes: tuple[str | int, ...]
    about: str
    layers: Layers = Layers.NONE
    only: Only = ""


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of a graph, in order."""

    about: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


_KEYS = {rows: (1, "kv_heads", rows, "head_dim") for rows in ("P", "S", "M", 1)}

_VALUES = {rows: (1, "kv_heads", rows, "value_dim") for rows in ("P", "S", "M", 1)}

SCORED_VALUES = "scored_values"

_PAST_LENGTH = TensorSpec(
    "past_length", "int32", (1,), "valid rows of the caches; the others are masked, and must be finite"
)

_WHOLE_LENGTH = TensorSpec(
    "past_length.{i}", "int32", (1,), "the same for a layer whose cache keeps every row", Layers.WHOLE
)

_POSITION_IDS = TensorSpec(
    "position_ids", "int32", ("axes", 1, "S"), "rotary positions of this run's rows, before pruning"
)

GRAPHS: dict[AnyGraphName, GraphSpec] = {
    "vision": GraphSpec(
        "Turns one picture, or B frames of one size, into visual tokens. Frames do not attend to each other.",
        inputs=(
            TensorSpec(
                "pixel_values",
                "graph",
                ("B", "patches", "patch_dim"),
                "normalised pixels, one row for each patch",
                only="patches",
            ),
            TensorSpec(
                "patch_position",
                "int32",
                ("patches", 2),
                "row and column of each patch, in merge-block order",
                only="patches",
            ),
            TensorSpec(
                "pixel_values", "graph", ("B", 3, "height", "height"), "normalised pixels, B tiles", only="tiles"
            ),
            TensorSpec(
                "pixel_values",
                "graph",
                ("B", 3, "height", "height"),
                "normalised pixels, a picture's B tiles, the first view before the second",
                only="views",
            ),
            TensorSpec(
                "token_source",
                "int32",
                ("visual",),
                "for each visual token: 0 (end of a row), 1 (end of a view), or 2 + its index among the tiles' tokens",
                only="views",
            ),
        ),
        outputs=(
            TensorSpec(
                "image_embeds", "graph", ("B", "visual", "hidden"), "one row for each visual token", only="frames"
            ),
            TensorSpec("image_embeds", "graph", (1, "visual", "hidden"), "one row for each visual token", only="views"),
            TensorSpec(
                "deepstack.{i}",
                "graph",
                ("B", "visual", "hidden"),
                "features that are added to the visual rows after layer i",
                Layers.DEEPSTACK,
            ),
        ),
    ),
    "prefix": GraphSpec(
        "Runs layers 0..k-1 over every row. Then selects visual tokens by values (FastV: attention) of layer k-1.",
        inputs=(
            TensorSpec(
                "inputs_embeds",
                "graph",
                (1, "S", "hidden"),
                "token embeddings, with the visual tokens' embeddings at their rows",
            ),
            TensorSpec(
                "deepstack.{i}",
                "graph",
                (1, "L", "hidden"),
                "from vision, one row for each of visual_index; zeros in runs without pictures",
                Layers.DEEPSTACK,
            ),
            _POSITION_IDS,
            TensorSpec("visual_index", "int32", ("L",), "rows of visual tokens, ascending"),
            TensorSpec("text_index", "int32", ("T",), "all other rows, ascending"),
            TensorSpec("query_index", "int32", ("Q",), "text rows that vote", only="ivc rule"),
            TensorSpec(
                "ivc_priority", "float32", ("L",), "0, or at least 2; a larger number ranks better", only="ivc rule"
            ),
            TensorSpec("keep_count", "int32", (1,), "number of visual tokens to keep, 1..L; a shape input in TensorRT"),
            TensorSpec(
                "thumbnail_index",
                "int32",
                ("H",),
                "tokens of thumbnails, as positions within visual_index",
                only="thumbnails",
            ),
            TensorSpec(
                "tile_map",
                "int32",
                ("L",),
                "for each visual token, the position within thumbnail_index of the token that shows the same place",
                only="thumbnails",
            ),
            TensorSpec(
                "candidate_index",
                "int32",
                ("V",),
                "tokens of thumbnails that show a picture, as positions within thumbnail_index, ascending",
                only="view rule",
            ),
            _PAST_LENGTH,
            _WHOLE_LENGTH,
            TensorSpec("past_key.{i}", "graph", _KEYS["P"], "cached keys, after rotation", Layers.BELOW),
            TensorSpec("past_value.{i}", "graph", _VALUES["P"], "cached values", Layers.BELOW),
        ),
        outputs=(
            TensorSpec("hidden_states", "graph", (1, "S", "hidden"), "after layer k-1"),
            TensorSpec("new_key.{i}", "graph", _KEYS["S"], "keys of this run's rows", Layers.BELOW),
            TensorSpec("new_value.{i}", "graph", _VALUES["S"], "values of this run's rows", Layers.BELOW),
            TensorSpec("keep_index", "int32", ("M",), "rows to keep, ascending: all text and the chosen visual tokens"),
            TensorSpec("token_score", "float32", ("L",), "score of each visual token, without seeds and priorities"),
            TensorSpec(
                "seed_index",
                "int32",
                ("seeds",),
                "seeds, best first, as positions within visual_index",
                only="ivc rule",
            ),
            TensorSpec(
                SCORED_VALUES,
                "graph",
                _VALUES["S"],
                "values by which tokens are scored, instead of the values of layer k-1",
                only="unnormed-values",
            ),
        ),
    ),
    "decoder": GraphSpec(
        "Drops the rows that were not kept, also from keys and values of layers below k. Then runs layers k..N-1.",
        inputs=(
            TensorSpec("hidden_states", "graph", (1, "S", "hidden"), "from prefix"),
            TensorSpec("keep_index", "int32", ("M",), "from prefix"),
            TensorSpec("logit_index", "int32", ("R",), "rows of the kept sequence for which logits are computed"),
            _POSITION_IDS,
            _PAST_LENGTH,
            TensorSpec("new_key.{i}", "graph", _KEYS["S"], "from prefix", Layers.COMPACTED),
            TensorSpec("new_value.{i}", "graph", _VALUES["S"], "from prefix", Layers.COMPACTED),
            TensorSpec("past_key.{i}", "graph", _KEYS["P"], "cached keys, after rotation", Layers.ABOVE),
            TensorSpec("past_value.{i}", "graph", _VALUES["P"], "cached values", Layers.ABOVE),
        ),
        outputs=(
            TensorSpec("logits", "float32", (1, "R", "vocab"), "next-token logits"),
            TensorSpec("compact_key.{i}", "graph", _KEYS["M"], "kept keys, to append to the cache", Layers.COMPACTED),
            TensorSpec(
                "compact_value.{i}", "graph", _VALUES["M"], "kept values, to append to the cache", Layers.COMPACTED
            ),
            TensorSpec("new_key.{i}", "graph", _KEYS["M"], "keys, to append to the cache", Layers.ABOVE),
            TensorSpec("new_value.{i}", "graph", _VALUES["M"], "values, to append to the cache", Layers.ABOVE),
        ),
    ),
    "decode": GraphSpec(
        "Runs all layers over one row of text, without a selection. It is prefix and decoder, joined when a bundle is "
        "opened; a bundle has no file for it.",
        inputs=(
            TensorSpec("inputs_embeds", "graph", (1, 1, "hidden"), "the row's embedding"),
            TensorSpec("position_ids", "int32", ("axes", 1, 1), "the row's rotary position"),
            _PAST_LENGTH,
            _WHOLE_LENGTH,
            TensorSpec("past_key.{i}", "graph", _KEYS["P"], "cached keys, after rotation", Layers.ALL),
            TensorSpec("past_value.{i}", "graph", _VALUES["P"], "cached values", Layers.ALL),
        ),
        outputs=(
            TensorSpec("logits", "float32", (1, 1, "vocab"), "next-token logits"),
            TensorSpec("new_key.{i}", "graph", _KEYS[1], "the row's keys, to append to the cache", Layers.ALL),
            TensorSpec("new_value.{i}", "graph", _VALUES[1], "the row's values, to append to the cache", Layers.ALL),
        ),
    ),
}

FLOAT32_TENSORS = frozenset(
    spec.name for graph in GRAPHS.values() for spec in (*graph.inputs, *graph.outputs) if spec.dtype == "float32"
)
"""Inputs and outputs that are float32 in graphs of every dtype."""

RESIDUALS = ("inputs_embeds", "hidden_states")
"""Tensors of the residual stream: its beginning, and its hand-over between graphs."""

WIDE_RESIDUALS = frozenset(("hidden_states",))
"""Tensors between float16 graphs that are float32 after the lowering that keeps residual sums in float32."""


def expand_layers(
    specs: tuple[TensorSpec, ...],
    layers: int,
    selection_layer: int,
    whole_layers: Collection[int] = (),
    deepstack: int = 0,
) -> list[tuple[str, TensorSpec]]:
    """Replace `{i}` by the layers' numbers. If neighbouring tensors exist for the same layers, all of one layer come
    before the next layer."""
    below = range(selection_layer)
    numbers = {
        Layers.NONE: range(1),
        Layers.BELOW: below,
        Layers.COMPACTED: [i for i in below if i not in whole_layers],
        Layers.WHOLE: [i for i in below if i in whole_layers],
        Layers.ABOVE: range(selection_layer, layers),
        Layers.ALL: range(layers),
        Layers.DEEPSTACK: range(deepstack),
    }
    expanded = []
    for which, group in itertools.groupby(specs, key=lambda spec: spec.layers):
        members = tuple(group)
        for i in numbers[which]:
            for spec in members:
                if which in (Layers.BELOW, Layers.ALL) and i in whole_layers:
                    spec = replace(spec, axes=tuple("W" if axis == "P" else axis for axis in spec.axes))
                expanded.append((spec.name.format(i=i), spec))
    return expanded


def deepstack_names(decoder: DecoderSizes) -> list[str]:
    """Names of the outputs of `vision` and inputs of `prefix` with features that are added to pictures' rows, by
    layer."""
    return [f"deepstack.{i}" for i in range(decoder.deepstack)]


def graph_info(
    name: AnyGraphName,
    dtype: FloatName,
    decoder: DecoderSizes,
    rotary: RotarySizes,
    selection: Selection,
    preprocessing: Preprocessing,
    selection_layer: int,
) -> GraphInfo:
    """The inputs and outputs of graph `name` for a model of these sizes, cut at `selection_layer`."""
    sizes: dict[str | int, int] = {
        "hidden": decoder.hidden_size,
        "kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "value_dim": decoder.value_dim,
        "vocab": decoder.vocab_size,
        "axes": len(rotary.sections),
    }
    has = {"", preprocessing.kind, "views" if preprocessing.kind == "views" else "frames"}
    if isinstance(preprocessing, PatchPreprocessing):
        sizes["patch_dim"] = preprocessing.patch_dim
    else:
        sizes["height"] = preprocessing.tile_pixels
    if isinstance(preprocessing, FixedPreprocessing):
        sizes["visual"] = preprocessing.tile_side**2
    has.add(selection.scored)
    if isinstance(selection, SelectionRule):
        has.add("ivc rule")
    if selection.tiles or selection.views:
        has.add("thumbnails")
    if selection.views:
        has.add("view rule")
    layers = (decoder.layers, selection_layer, selection.whole_layers, decoder.deepstack)

    def infos(specs: tuple[TensorSpec, ...]) -> tuple[TensorInfo, ...]:
        own = tuple(spec for spec in specs if spec.only in has)
        return tuple(
            TensorInfo(
                name=tensor_name,
                dtype=dtype if spec.dtype == "graph" else spec.dtype,
                shape=tuple(sizes.get(axis, axis) for axis in spec.axes),
            )
            for tensor_name, spec in expand_layers(own, *layers)
        )

    spec = GRAPHS[name]
    return GraphInfo(file=graph_file(name), inputs=infos(spec.inputs), outputs=infos(spec.outputs))


def scored_name(rule: Selection, selection_layer: int) -> str:
    """The output of `prefix` with the values by which visual tokens are scored."""
    return f"new_value.{selection_layer - 1}" if rule.scored == "values" else SCORED_VALUES


class TensorName(NamedTuple):
    """A tensor's name by its parts: `past_key.3` is ("past_key", 3), and `logits` is ("logits", None)."""

    stem: str
    layer: int | None

    @staticmethod
    @cache
    def of(name: str | None) -> TensorName:
        """Take the name of a graph's input or output apart, or its name in a run."""
        stem, dot, number = (name or "").partition(".")
        return TensorName(stem, int(number) if dot and number.isdecimal() else None)

    @property
    def kind(self) -> Kind | None:
        """Whether it contains keys or values of one layer; None for other tensors."""
        found = self.stem.rpartition("_")[2] if self.layer is not None else ""
        return "key" if found == "key" else "value" if found == "value" else None

    @property
    def role(self) -> str:
        """The role of its layer's keys or values: past, new, compact, or present if caches are written in place. "" for
        other tensors."""
        return self.stem.partition("_")[0] if self.kind else ""

    def to(self, role: CacheRole) -> str:
        """The name of the same layer's keys or values in another role."""
        return f"{role}_{self.kind}.{self.layer}"


def cache_shape(sizes: DecoderSizes, name: str, rows: int) -> tuple[int, int, int, int]:
    """The shape of `rows` rows of one layer's keys or values, in a tensor of this name."""
    size = sizes.value_dim if TensorName.of(name).kind == "value" else sizes.head_dim
    return (1, sizes.kv_heads, rows, size)
