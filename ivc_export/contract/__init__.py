"""The contract between the graphs and whatever runs them: tensors, axes, operators and the manifest's schema.

Everything else (graph builders, runtimes, the manifest, graphs/README.md) takes names, dtypes and shapes from here.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ivc_export.errors import UserError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SCHEMA_VERSION = 1
OPSET = 17
IVC_DOMAIN = "ivc"
IVC_VERSION = 1
IR_VERSION = 8  # the lowest that knows functions: TensorRT 8.6's parser is of its time
MOST_VISUAL = 16384
"""Visual tokens of a picture, and of an engine's prompt, at most: those of the largest picture that a published
processor lets through (12,845,056 pixels, 28 x 28 a token). Attention in the vision encoder is quadratic in them."""

GraphName = Literal["vision", "prefix", "decoder"]
AnyGraphName = Literal["vision", "prefix", "decoder", "decode"]
FloatName = Literal["float32", "float16", "bfloat16"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
GRAPH_NAMES: tuple[GraphName, ...] = ("vision", "prefix", "decoder")

Kind = Literal["key", "value"]
CacheRole = Literal["past", "new", "compact", "present"]

FLOATS: dict[FloatName, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}

OPERATORS = frozenset(
    (
        *("Add", "And", "Cast", "Concat", "Constant", "Cos", "Div", "Equal", "Erf", "Expand", "Gather", "Gemm"),
        *(
            "Greater",
            "GreaterOrEqual",
            "LayerNormalization",
            "Less",
            "MatMul",
            "Max",
            "Min",
            "Mul",
            "Not",
            "Or",
            "Range",
        ),
        *("ReduceMean", "ReduceSum", "Reshape", "ScatterElements", "Shape", "Sigmoid", "Sin", "Slice", "Softmax"),
        *("Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
    )
)
"""Operators of the default domain that a portable or native graph may use: opset 17, read by TensorRT 8.6 and later."""

BODY_OPERATORS = OPERATORS | {"CastLike"}
"""Operators of the default domain that the bodies of the `ivc` functions may use; inlining leaves no CastLike."""

PLUGIN_OPERATORS = frozenset(("SelectTokens", "CompactGatherN"))
"""Operators of domain `ivc` without a body that `plugin` leaves to our TensorRT plugin, and `ort-cuda-ops` to our
library of custom operators for onnxruntime."""

AXES = {
    "B": "frames of one size in `vision`; the literal 1 in `prefix` and `decoder`",
    "S": "rows of this run: text and visual tokens",
    "L": "visual tokens of this run",
    "T": "the other tokens of this run; S = L + T",
    "Q": "text rows that vote for visual tokens, at least 1",
    "M": "rows kept: M = T + keep_count",
    "P": "rows of a cache: its exact length, or a buffer's capacity",
    "W": "the same of a layer whose cache keeps every row",
    "H": "thumbnail tokens of this run: the last tile of each picture",
    "R": "rows whose logits are wanted",
    "seeds": "visual tokens chosen as seeds: max(1, round(0.01 L)), half to even; of H where there are tiles",
    "patches": "patches of one frame",
    "visual": "visual tokens of one frame: patches / merge_size^2, or tile_side^2",
    "height": "pixels along a side of the fixed-size vision encoder's input",
    "axes": "axes of a position: 3 for M-RoPE (time, row, column), else 1",
    "patch_dim": "values of one patch: channels x frames x height x width",
    "hidden": "hidden size",
    "kv_heads": "heads of keys and values",
    "head_dim": "values of one head",
    "vocab": "vocabulary size",
}


INT32_MOST = 2**31 - 1
Depth = Annotated[int, Field(gt=0, le=1000)]
"""Layers."""
Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Channels of a layer: any real model's many times over, and little enough that products of two fit 64 bits."""
Heads = Annotated[int, Field(gt=0, le=4096)]
Count = Annotated[int, Field(gt=0, le=INT32_MOST)]
"""Of tokens, positions or pixels, which graphs and runtimes hold in int32."""
Side = Annotated[int, Field(gt=0, le=16384)]
"""Pixels along a side."""
Tiles = Annotated[int, Field(gt=0, le=256)]
"""Tiles of a picture; all shapes of so many are tried for each picture."""
TokenId = Annotated[int, Field(ge=0, le=INT32_MOST)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(ge=1e-9, le=1e9)]
"""What pixels are multiplied or divided by: neither zero nor infinite in float32."""
Level = Annotated[float, Field(ge=-1e9, le=1e9)]
"""What is taken from pixels."""


class Frozen(BaseModel):
    """Base of every record: immutable, and no field that the schema does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DecoderSizes(Frozen):
    """Sizes of the language decoder."""

    layers: int = Field(gt=1, le=1000)
    hidden_size: Width
    intermediate_size: Width
    heads: Heads
    kv_heads: Heads
    head_dim: int = Field(gt=0, le=4096, multiple_of=2)
    vocab_size: int = Field(gt=0, le=1 << 24)
    rms_norm_epsilon: Epsilon
    qkv_bias: bool
    fused_qkv: bool = False
    """One weight for queries, keys and values: by key-value head, its queries, its key, its value."""
    tied_embeddings: bool
    max_positions: Count


class RotarySizes(Frozen):
    """Rotary embedding: frequency j is `theta ** (-2 j / head_dim)`, and `sections[a]` of them turn with axis a."""

    theta: float = Field(gt=0, le=1e12)
    sections: tuple[Heads, ...] = Field(min_length=1, max_length=3)


class SelectionRule(Frozen):
    """IVC-Prune's constants for a family; `round` is half to even throughout."""

    ivc_fraction: float = Field(ge=0, le=1)
    """Of each picture's tokens, or of each tile's: as many by mean cosine, and as many by mean sine."""
    seed_divisor: int = Field(gt=0, le=1 << 20, multiple_of=2)
    query_offset: int = Field(ge=0, le=1 << 20)
    """Text votes from row `end + query_offset` on, where `end` is the row behind the last picture."""
    softmax: Literal["visual", "all"] = "visual"
    """What a vote is shared among: the visual tokens, or every row of the run."""
    tiles: bool = False
    """Whether pictures are tiles with a thumbnail, by which tokens are chosen (SelectTileTokens)."""
    whole_layers: tuple[int, ...] = ()
    """Layers whose cache keeps every row, also of pruned tokens: it has a length of its own."""


class Scaling(Frozen):
    """How pixels are scaled: times rescale_factor, minus mean, by std, the latter two per RGB channel.

    A processor that leaves one of these steps out has a factor of 1, or means of 0 and deviations of 1.
    """

    rescale_factor: Factor
    mean: tuple[Level, Level, Level]
    std: tuple[Factor, Factor, Factor]
    resample: Resample = "bicubic"
    """Pillow's filter."""


class PatchPreprocessing(Scaling):
    """How a picture becomes patches, at its own size. Pixel counts are of the resized picture."""

    kind: Literal["patches"] = "patches"
    patch_size: int = Field(gt=0, le=256)
    merge_size: int = Field(gt=0, le=64)
    temporal_patch_size: int = Field(gt=0, le=64)
    min_pixels: Count
    max_pixels: Count

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x frames x height x width."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def token_side(self) -> int:
        """Pixels along one side of a visual token."""
        return self.patch_size * self.merge_size

    @property
    def least_visual(self) -> int:
        """Visual tokens of the smallest picture."""
        return max(1, -(-self.min_pixels // self.token_side**2))

    def capped(self, max_visual: int) -> PatchPreprocessing:
        """With max_pixels such that a picture gives at most `max_visual` tokens."""
        most = min(self.max_pixels, max_visual * self.token_side**2)
        return self.model_copy(update={"max_pixels": most, "min_pixels": min(self.min_pixels, most)})


class TilePreprocessing(Scaling):
    """How a picture becomes one tile of fixed size, or several and a thumbnail of the whole.

    Of the shapes of min_tiles to max_tiles tiles, fewest first, the one closest to the picture's aspect ratio is taken
    (width / height, by absolute difference); a later one of the same difference takes its place if the picture has
    more than half as many pixels as it has.
    """

    kind: Literal["tiles"] = "tiles"
    tile_pixels: Side
    """Pixels along one side of a tile."""
    tile_side: int = Field(gt=0, le=1024)
    """Visual tokens along one side of a tile."""
    min_tiles: Tiles
    max_tiles: Tiles
    """Without the thumbnail, which a picture of several tiles has behind them."""
    fit: Literal["crop", "stretch"]
    """Whether the middle of the picture is cut out, or all of it is stretched to the tiles."""

    @property
    def token_side(self) -> int:
        """Pixels along one side of a visual token."""
        return self.tile_pixels // self.tile_side

    @property
    def least_visual(self) -> int:
        """Visual tokens of the smallest picture."""
        return self.tile_side**2 * (self.min_tiles + (self.min_tiles > 1))

    def capped(self, max_visual: int) -> TilePreprocessing:
        """With max_tiles such that a picture gives at most `max_visual` tokens.

        Raises:
            UserError: one tile has more.
        """
        tile = self.tile_side**2
        if max_visual < tile:
            raise UserError(
                f"max_visual {max_visual} is too small: a picture gives this model at least {tile} visual tokens"
            )
        most = max(1, min(self.max_tiles, max_visual // tile - 1))  # a single tile has no thumbnail
        return self.model_copy(update={"max_tiles": most, "min_tiles": min(self.min_tiles, most)})


Preprocessing = Annotated[PatchPreprocessing | TilePreprocessing, Field(discriminator="kind")]


class SpecialTokens(Frozen):
    """Token ids that a runtime must know."""

    image: TokenId
    vision_start: TokenId | None
    vision_end: TokenId | None
    """Before and behind a picture's image tokens; None where the family has no such tokens."""
    template_marks: bool
    """Whether the chat template writes vision_start and vision_end, or a runtime does beside the image tokens."""
    stop: tuple[TokenId, ...]


class TensorInfo(Frozen):
    """One input or output of a graph: symbolic axes are strings."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int32"]
    shape: tuple[int | str, ...]


class GraphInfo(Frozen):
    """One graph of the bundle; `sha256` is of its file, which holds no weights. Older bundles have none."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    sha256: str | None = None


class WeightFile(Frozen):
    """A safetensors file of the bundle; `header_sha256` is of its header alone.

    `sha256`, of the whole file, is None until somebody has read it: `ivc-check --weights` does.
    """

    file: str
    size: int = Field(ge=0)
    header_sha256: str
    sha256: str | None = None


class EmbeddingTable(Frozen):
    """Where the token embeddings lie: row-major [vocab, hidden] at byte `offset` of `file`."""

    file: str
    offset: int = Field(ge=0)
    dtype: FloatName
    shape: tuple[Count, Count]


class Manifest(Frozen):
    """manifest.json: everything that a runtime needs to know about a bundle."""

    schema_version: int
    family: str
    dtype: FloatName
    lowering: str
    """Which runtimes the graphs were lowered for: "portable" is none, and every lowering begins there."""
    selection_layer: int = Field(gt=0)
    calibrated: bool
    default_ratio: float = Field(gt=0, le=1)
    max_visual: int = Field(gt=0, le=MOST_VISUAL)
    decoder: DecoderSizes
    rotary: RotarySizes
    selection: SelectionRule
    preprocessing: Preprocessing
    tokens: SpecialTokens
    graphs: dict[GraphName, GraphInfo]
    embedding: EmbeddingTable
    weights: tuple[WeightFile, ...]
    versions: dict[str, str]
    constants_sha256: str | None = None
    """See the function of that name. Older bundles have none."""

    def sealed(self) -> Manifest:
        """The same with the hash over its constants."""
        found = constants_sha256(self.model_dump(mode="json"))
        return self.model_copy(update={"constants_sha256": found})


CONSTANTS = frozenset(
    (
        *("family", "dtype", "lowering", "selection_layer", "default_ratio", "max_visual", "decoder", "rotary"),
        *("selection", "preprocessing", "tokens", "graphs", "embedding"),
    )
)
"""Fields of the manifest that nothing else tells of when they change, but other answers."""


def constants_sha256(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over the CONSTANTS of a manifest, by which an edited one is known.

    manifest: the JSON object. The fields are hashed as JSON in UTF-8, of sorted keys and without spaces, numbers as
    Python writes them.
    """
    constants = {name: manifest[name] for name in CONSTANTS if name in manifest}
    return hashlib.sha256(json.dumps(constants, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Layers(enum.Enum):
    """The layers for which a tensor exists, once each, `{i}` in its name being the layer's number."""

    NONE = enum.auto()
    BELOW = enum.auto()  # layers 0..k-1, which see every token
    COMPACTED = enum.auto()  # those of them whose cache is compacted: all, for most families
    WHOLE = enum.auto()  # those of them whose cache keeps every row
    ABOVE = enum.auto()  # layers k..N-1, which see kept tokens
    ALL = enum.auto()


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a graph; dtype "graph" is the one that the graph computes in, `only` names who has the tensor."""

    name: str
    dtype: Literal["graph", "float32", "int32"]
    axes: tuple[str | int, ...]
    about: str
    layers: Layers = Layers.NONE
    only: Literal["", "patches", "tiles", "tile rule"] = ""


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of a graph, in order."""

    about: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


_CACHE = (1, "kv_heads", "P", "head_dim")
_NEW = (1, "kv_heads", "S", "head_dim")
_KEPT = (1, "kv_heads", "M", "head_dim")
_PAST_LENGTH = TensorSpec("past_length", "int32", (1,), "valid rows of the caches; the others are masked, but finite")
_WHOLE_LENGTH = TensorSpec("past_length.{i}", "int32", (1,), "the same of a layer that is kept whole", Layers.WHOLE)
_POSITION_IDS = TensorSpec("position_ids", "int32", ("axes", 1, "S"), "rotary positions of this run's rows, unpruned")

_ROW_NEW = (1, "kv_heads", 1, "head_dim")

GRAPHS: dict[AnyGraphName, GraphSpec] = {
    "vision": GraphSpec(
        "One picture, or B frames of one size, to visual tokens. No frame sees another.",
        inputs=(
            TensorSpec(
                "pixel_values",
                "graph",
                ("B", "patches", "patch_dim"),
                "normalised pixels, a row a patch",
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
        ),
        outputs=(TensorSpec("image_embeds", "graph", ("B", "visual", "hidden"), "one row a visual token"),),
    ),
    "prefix": GraphSpec(
        "Layers 0..k-1 over every row, and the selection of visual tokens by the values of layer k-1.",
        inputs=(
            TensorSpec("inputs_embeds", "graph", (1, "S", "hidden"), "token embeddings, visual rows in their places"),
            _POSITION_IDS,
            TensorSpec("visual_index", "int32", ("L",), "rows that hold visual tokens, ascending"),
            TensorSpec("text_index", "int32", ("T",), "all other rows, ascending"),
            TensorSpec("query_index", "int32", ("Q",), "text rows that vote"),
            TensorSpec(
                "ivc_priority", "float32", ("L",), "0, or for IVC tokens at least 2 and larger for better ranks"
            ),
            TensorSpec("keep_count", "int32", (1,), "visual tokens to keep, 1..L; a shape input in TensorRT"),
            TensorSpec(
                "thumbnail_index",
                "int32",
                ("H",),
                "thumbnail tokens, as positions within visual_index",
                only="tile rule",
            ),
            TensorSpec(
                "tile_map",
                "int32",
                ("L",),
                "for each visual token, the position within thumbnail_index of the one that shows the same place",
                only="tile rule",
            ),
            _PAST_LENGTH,
            _WHOLE_LENGTH,
            TensorSpec("past_key.{i}", "graph", _CACHE, "cached keys, after rotation", Layers.BELOW),
            TensorSpec("past_value.{i}", "graph", _CACHE, "cached values", Layers.BELOW),
        ),
        outputs=(
            TensorSpec("hidden_states", "graph", (1, "S", "hidden"), "after layer k-1"),
            TensorSpec("new_key.{i}", "graph", _NEW, "keys of this run's rows", Layers.BELOW),
            TensorSpec("new_value.{i}", "graph", _NEW, "values of this run's rows", Layers.BELOW),
            TensorSpec("keep_index", "int32", ("M",), "rows to keep, ascending: all text and the chosen visual tokens"),
            TensorSpec("token_score", "float32", ("L",), "score of each visual token, before seeds and priorities"),
            TensorSpec("seed_index", "int32", ("seeds",), "seeds, best first, as positions within visual_index"),
        ),
    ),
    "decoder": GraphSpec(
        "Drops the rows that were not kept, also from the keys and values of the layers below; then layers k..N-1.",
        inputs=(
            TensorSpec("hidden_states", "graph", (1, "S", "hidden"), "from prefix"),
            TensorSpec("keep_index", "int32", ("M",), "from prefix"),
            TensorSpec("logit_index", "int32", ("R",), "rows of the kept sequence whose logits are wanted"),
            _POSITION_IDS,
            _PAST_LENGTH,
            TensorSpec("new_key.{i}", "graph", _NEW, "from prefix", Layers.COMPACTED),
            TensorSpec("new_value.{i}", "graph", _NEW, "from prefix", Layers.COMPACTED),
            TensorSpec("past_key.{i}", "graph", _CACHE, "cached keys, after rotation", Layers.ABOVE),
            TensorSpec("past_value.{i}", "graph", _CACHE, "cached values", Layers.ABOVE),
        ),
        outputs=(
            TensorSpec("logits", "float32", (1, "R", "vocab"), "next-token logits"),
            TensorSpec("compact_key.{i}", "graph", _KEPT, "kept keys, to append to the cache", Layers.COMPACTED),
            TensorSpec("compact_value.{i}", "graph", _KEPT, "kept values, to append to the cache", Layers.COMPACTED),
            TensorSpec("new_key.{i}", "graph", _KEPT, "keys, to append to the cache", Layers.ABOVE),
            TensorSpec("new_value.{i}", "graph", _KEPT, "values, to append to the cache", Layers.ABOVE),
        ),
    ),
    "decode": GraphSpec(
        "All layers over one row that is no picture, where nothing is chosen: prefix and decoder, joined when a bundle "
        "is opened. No file of a bundle holds it.",
        inputs=(
            TensorSpec("inputs_embeds", "graph", (1, 1, "hidden"), "the row's embedding"),
            TensorSpec("position_ids", "int32", ("axes", 1, 1), "the row's rotary position"),
            _PAST_LENGTH,
            _WHOLE_LENGTH,
            TensorSpec("past_key.{i}", "graph", _CACHE, "cached keys, after rotation", Layers.ALL),
            TensorSpec("past_value.{i}", "graph", _CACHE, "cached values", Layers.ALL),
        ),
        outputs=(
            TensorSpec("logits", "float32", (1, 1, "vocab"), "next-token logits"),
            TensorSpec("new_key.{i}", "graph", _ROW_NEW, "the row's keys, to append to the cache", Layers.ALL),
            TensorSpec("new_value.{i}", "graph", _ROW_NEW, "the row's values, to append to the cache", Layers.ALL),
        ),
    ),
}


FLOAT32_TENSORS = frozenset(
    spec.name for graph in GRAPHS.values() for spec in (*graph.inputs, *graph.outputs) if spec.dtype == "float32"
)
"""Inputs and outputs that are float32 in graphs of every dtype."""


RESIDUALS = ("inputs_embeds", "hidden_states")
"""Tensors of the residual stream: what begins it, and what hands it from graph to graph."""

WIDE_RESIDUALS = frozenset(("hidden_states",))
"""Tensors between float16 graphs that are float32 after the lowering that keeps residual sums in float32."""


def check_ratio(ratio: float) -> float:
    """Return `ratio`, the fraction of visual tokens kept, if it lies in (0, 1].

    Raises:
        UserError: it does not.
    """
    if not 0 < ratio <= 1:  # false for nan as well
        raise UserError(f"ratio {ratio} is out of range: it is the fraction of visual tokens kept, above 0 and up to 1")
    return ratio


def kept_tokens(visual: int, ratio: float) -> int:
    """Visual tokens to keep of one picture: `round(ratio * visual)`, half to even, at least 1.

    The at-least-1 is `keep_count`'s lower bound; it matters only for `ratio * visual < 0.5`.
    """
    return max(1, round(ratio * visual))


def expand_layers(
    specs: tuple[TensorSpec, ...], layers: int, selection_layer: int, whole_layers: Collection[int] = ()
) -> list[tuple[str, TensorSpec]]:
    """Write out `{i}`: key and value of one layer, then of the next, where neighbours exist for the same layers."""
    below = range(selection_layer)
    numbers = {
        Layers.NONE: range(1),
        Layers.BELOW: below,
        Layers.COMPACTED: [i for i in below if i not in whole_layers],
        Layers.WHOLE: [i for i in below if i in whole_layers],
        Layers.ABOVE: range(selection_layer, layers),
        Layers.ALL: range(layers),
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


def graph_file(name: AnyGraphName) -> str:
    """The file of graph `name` in a bundle; `decode` has none, but a name."""
    return f"{name}.onnx"


def graph_info(
    name: AnyGraphName,
    dtype: FloatName,
    decoder: DecoderSizes,
    rotary: RotarySizes,
    selection: SelectionRule,
    preprocessing: Preprocessing,
    selection_layer: int,
) -> GraphInfo:
    """Write out the inputs and outputs of graph `name` for a model of these sizes, cut at `selection_layer`."""
    sizes: dict[str | int, int] = {
        "hidden": decoder.hidden_size,
        "kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "vocab": decoder.vocab_size,
        "axes": len(rotary.sections),
    }
    if isinstance(preprocessing, PatchPreprocessing):
        sizes["patch_dim"] = preprocessing.patch_dim
    else:
        sizes |= {"height": preprocessing.tile_pixels, "visual": preprocessing.tile_side**2}
    has = {"", preprocessing.kind} | ({"tile rule"} if selection.tiles else set())

    def infos(specs: tuple[TensorSpec, ...]) -> tuple[TensorInfo, ...]:
        own = tuple(spec for spec in specs if spec.only in has)
        return tuple(
            TensorInfo(
                name=tensor_name,
                dtype=dtype if spec.dtype == "graph" else spec.dtype,
                shape=tuple(sizes.get(axis, axis) for axis in spec.axes),
            )
            for tensor_name, spec in expand_layers(own, decoder.layers, selection_layer, selection.whole_layers)
        )

    spec = GRAPHS[name]
    return GraphInfo(file=graph_file(name), inputs=infos(spec.inputs), outputs=infos(spec.outputs))


class TensorName(NamedTuple):
    """A tensor's name by its parts: `past_key.3` is ("past_key", 3), and `logits` is ("logits", None)."""

    stem: str
    layer: int | None

    @staticmethod
    def of(name: str | None) -> TensorName:
        """Of a graph's input or output, or of its name in a run."""
        stem, dot, number = (name or "").partition(".")
        return TensorName(stem, int(number) if dot and number.isdecimal() else None)

    @property
    def kind(self) -> Kind | None:
        """Whether it holds keys or values of one layer."""
        found = self.stem.rpartition("_")[2] if self.layer is not None else ""
        return "key" if found == "key" else "value" if found == "value" else None

    @property
    def role(self) -> str:
        """What it holds of its layer's keys or values: past, new, compact, present where caches are written in place;
        "" of other tensors.
        """
        return self.stem.partition("_")[0] if self.kind else ""

    def to(self, role: CacheRole) -> str:
        """The name of the same layer's keys or values in another role."""
        return f"{role}_{self.kind}.{self.layer}"


def in_place_lengths(past_length: str) -> dict[str, tuple[int, ...]]:
    """Inputs that stand for `past_length`, or `past_length.i`, where caches are written in place, and their shapes."""
    _, dot, layer = past_length.partition(".")
    return {f"seqlens_k{dot}{layer}": (1,), f"total_sequence_length{dot}{layer}": ()}


def in_place_info(info: GraphInfo) -> GraphInfo:
    """Inputs and outputs of a graph whose caches are written in place, in buffers of one capacity P.

    - past_length becomes seqlens_k int32 [1], which is past_length + S - 1 (in decoder M for S), and
      total_sequence_length int32 [], in host memory: past_length + S, or P in a decode step that a CUDA graph replays.
    - present_key.i and present_value.i are to be bound to the buffers of past_key.i and past_value.i, and stand for
      new_key.i and new_value.i.
    - new_key.i and new_value.i of the layers below the cut are rows of the caches already, which go from prefix to
      decoder instead. cache_index int32 [P] says which row each row of a compacted cache is. compact_key.i and
      compact_value.i are such caches, to be bound to other buffers.
    - position_ids of `decode` says the row's position P times, once for each row of a cache: attention rotates.
    - hidden_states are a sixteenth of their size: see lowering.precision.scale_residuals.

    The vision graph's stay as they are.
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


def verify(
    name: AnyGraphName,
    model: ir.Model,
    info: GraphInfo,
    lowered: frozenset[tuple[str, str]] = frozenset(),
    opset: int = OPSET,
) -> None:
    """Check a graph against the contract: inputs and outputs, operators, functions, versions.

    lowered: operators that it may have beyond the contract's, by domain and name.

    Raises:
        AssertionError: the graph breaks the contract; a bug of the builder, not of the user.
    """
    for kind, values, tensors in (
        ("input", model.graph.inputs, info.inputs),
        ("output", model.graph.outputs, info.outputs),
    ):
        found = [
            (v.name, v.dtype, [d.value if isinstance(d, ir.SymbolicDim) else d for d in v.shape or ()]) for v in values
        ]
        wanted = [(t.name, data_type(t.dtype), list(t.shape)) for t in tensors]
        if found != wanted:
            raise AssertionError(f"{name}: the {kind}s are {found}, the contract says {wanted}")
    functions = {identifier[:2] for identifier in model.functions} | lowered
    own = [(node, OPERATORS) for node in model.graph.all_nodes()]
    bodies = [(node, BODY_OPERATORS) for f in model.functions.values() for node in f.all_nodes()]
    for node, operators in own + bodies:
        if (node.domain or node.op_type not in operators) and (node.domain, node.op_type) not in functions:
            raise AssertionError(
                f"{name}: {node.domain or 'ai.onnx'}::{node.op_type} is not an operator of the contract"
            )
    if model.opset_imports.get("") != opset or model.ir_version != IR_VERSION:
        raise AssertionError(f"{name}: opset {model.opset_imports.get('')} and IR version {model.ir_version}")


def data_type(name: str) -> ir.DataType:
    """ONNX element type of a dtype's name in the manifest."""
    return ir.DataType.INT32 if name == "int32" else FLOATS[name]  # type: ignore[index]


def first_problem(error: Exception) -> str:
    """An exception in one line: a validation error's first field and what is wrong with it, or the message."""
    if not isinstance(error, ValidationError):
        return str(error)
    detail = error.errors()[0]
    return f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
