"""The manifest: everything that a runtime needs to know about a bundle.

Most of its lines are fields and their meaning, from which docs/manifest.md is generated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ivc_export.contract.names import MOST_VISUAL, SCHEMA_VERSION, GraphName
from ivc_export.contract.preprocessing import Preprocessing, VideoPreprocessing
from ivc_export.contract.records import (
    Count,
    Epsilon,
    Frozen,
    Heads,
    Sha256,
    TokenId,
    Width,
)
from ivc_export.dtypes import FLOATS, DtypeName, FloatName

Scored = Literal["values", "unnormed-values"]
"""How visual tokens are scored. "values": by the values that layer k-1 caches. "unnormed-values": by the product of
that layer's value weights with its input rows, without the norm before it."""


class DecoderSizes(Frozen):
    """Sizes of the language decoder."""

    layers: int = Field(gt=1, le=1000)
    """N, the number of layers."""
    hidden_size: Width
    """Width of a row between layers."""
    intermediate_size: Width
    """Width of a row within the feed-forward layer."""
    heads: Heads
    """Number of heads of queries."""
    kv_heads: Heads
    """Number of heads of keys and values."""
    head_dim: int = Field(gt=0, le=4096, multiple_of=2)
    """Size of a head of queries and keys."""
    value_dim: int = Field(gt=0, le=4096)
    """Size of a head of values."""
    vocab_size: int = Field(gt=0, le=1 << 24)
    """Number of token ids."""
    rms_norm_epsilon: Epsilon
    """Epsilon of the RMS norms."""
    tied_embeddings: bool
    """Whether `lm_head` and the table of token embeddings are one weight."""
    max_positions: Count
    """Positions must stay below it."""
    deepstack: int = Field(default=0, ge=0, le=1000)
    """Number of layers, from the first on, after which features of pictures are added to their rows. All of them are in
    `prefix`."""

    @property
    def row_values(self) -> int:
        """How many values one row has in the caches of one layer."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def cuts(self) -> range:
        """Selection layers that are possible for this model."""
        return range(max(1, self.deepstack), self.layers)


class RotarySizes(Frozen):
    """Rotary embedding. Frequency j is `theta ** (-2 j / size)`. `sections[a]` of the frequencies belong to axis a."""

    theta: float = Field(gt=0, le=1e12)
    """Base of the frequencies."""
    sections: tuple[Heads, ...] = Field(min_length=1, max_length=3)
    """Number of frequencies of each position axis. The length of the list is the number of axes."""
    interleaved: bool = False
    """True: axes take frequencies in turn. Of n axes, axis a takes a, a + n, a + 2n, ...; axis 0 takes the rest.
    False: each axis takes one run of frequencies."""

    @property
    def size(self) -> int:
        """How many values of a head are rotated. In most families these are all of them."""
        return 2 * sum(self.sections)


class SelectionRule(Frozen):
    """IVC-Prune's constants for a family. `round` rounds halves to even."""

    method: Literal["ivc-prune"] = "ivc-prune"
    """IVC-Prune. Its bundles also run `foreground` and `random`."""
    ivc_fraction: float = Field(ge=0, le=1)
    """Fraction of the tokens of each picture, or of each tile. So many are chosen by mean cosine, and as many by mean
    sine."""
    seed_divisor: int = Field(gt=0, le=1 << 20, multiple_of=2)
    """One visual token in so many is a seed: max(1, round(L / seed_divisor))."""
    query_offset: int = Field(ge=0, le=1 << 20)
    """Text rows vote from row `end + query_offset` on. `end` is the row behind the last picture."""
    softmax: Literal["visual", "all", "thumbnail"] = "visual"
    """Over which rows the softmax of a vote goes: visual tokens, every row of the run, or the thumbnails' tokens."""
    tiles: bool = False
    """Whether pictures are tiles with a thumbnail, and the thumbnail chooses the tiles' tokens (SelectTileTokens)."""
    views: bool = False
    """Whether pictures are two views with separators, and the first chooses the second's tokens (SelectViewTokens)."""
    row_fraction: float = Field(default=0, ge=0, le=1)
    """With views: the fraction for each row of the second view. `ivc_fraction` is then for the first view."""
    scored: Scored = "values"
    """How visual tokens are scored."""
    whole_layers: tuple[int, ...] = ()
    """Layers whose cache keeps every row, also those of pruned tokens. Such a cache has its own length."""


class FastVRule(Frozen):
    """FastV keeps the tokens to which the last row attends most in layer k-1. It has no constants."""

    method: Literal["fastv"] = "fastv"
    """FastV."""
    whole_layers: tuple[int, ...] = ()
    """See SelectionRule."""
    scored: ClassVar[Scored] = "values"
    """FastV needs no other values."""
    query_offset: ClassVar[int] = 0
    """Any row behind the last picture can be the last row."""
    tiles: ClassVar[bool] = False
    """Tokens of thumbnails and of tiles are treated like all others."""
    views: ClassVar[bool] = False
    """Separators are treated like all other tokens."""


Selection = Annotated[SelectionRule | FastVRule, Field(discriminator="method")]
"""The rule by which a bundle's graphs choose visual tokens."""


class SpecialTokens(Frozen):
    """Token ids that a runtime must know."""

    image: TokenId
    """Stands for one visual token."""
    vision_start: TokenId | None
    """Stands before a picture's image tokens. None if the family has no such token."""
    vision_end: TokenId | None
    """Stands behind a picture's image tokens. None if the family has no such token."""
    template_marks: bool
    """True: the chat template writes vision_start and vision_end. False: the runtime writes them around the image
    tokens."""
    stop: tuple[TokenId, ...]
    """Tokens that end an answer."""


class TensorInfo(Frozen):
    """One input or output of a graph."""

    name: str
    """Its name in the graph."""
    dtype: DtypeName
    """Its dtype."""
    shape: tuple[int | str, ...]
    """Its sizes. A text names an axis that varies."""


class GraphInfo(Frozen):
    """One graph: its file within the bundle, its inputs and its outputs."""

    file: str
    """The file, relative to the bundle."""
    inputs: tuple[TensorInfo, ...]
    """Its inputs, in order."""
    outputs: tuple[TensorInfo, ...]
    """Its outputs, in order."""


class StoredGraph(GraphInfo):
    """One graph of the bundle."""

    sha256: Sha256
    """Hash of the file, which contains no weights."""


class WeightFile(Frozen):
    """A safetensors file of the bundle."""

    file: str
    """The file, relative to the bundle."""
    size: int = Field(ge=0)
    """Its size in bytes."""
    header_sha256: Sha256
    """Hash of its header."""
    sha256: Sha256 | None = None
    """Hash of the whole file. None until `ivc-check --weights` has read the file."""


class PackedRows(Frozen):
    """A table in 8 bits: uint8 [vocab, ceil(hidden / block), block]. The last block of a row is filled up.

    A value is (stored - 128) times the scale of its block, in float32.
    """

    block: int = Field(ge=16, le=128)
    """How many values of a row share a scale."""
    scales: int = Field(ge=0)
    """The byte of the same file at which the scales begin: [vocab, ceil(hidden / block)]."""
    dtype: FloatName
    """Dtype of the scales."""


class EmbeddingTable(Frozen):
    """Where the token embeddings are: row-major [vocab, hidden] at byte `offset` of `file`, as floats or packed."""

    file: str
    """The weight file."""
    offset: int = Field(ge=0)
    """The byte of the file at which the table begins."""
    dtype: FloatName | Literal["uint8"]
    """Dtype of the floats. It is "uint8" for a packed table, so that programs that cannot read packed tables refuse
    it."""
    shape: tuple[Count, Count]
    """[vocab, hidden]."""
    packed: PackedRows | None = None
    """None for a table of floats."""

    @property
    def floats(self) -> FloatName:
        """The dtype of the table's floats, or of its scales."""
        if self.packed is None and self.dtype != "uint8":
            return self.dtype
        return self.packed.dtype if self.packed else "float32"

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """First byte and length of each part of the table."""
        rows, hidden = self.shape
        size = FLOATS[self.floats].bytes
        if self.packed is None:
            return ((self.offset, rows * hidden * size),)
        blocks = -(-hidden // self.packed.block)
        return (self.offset, rows * blocks * self.packed.block), (self.packed.scales, rows * blocks * size)

    @property
    def nbytes(self) -> int:
        """Size of the table in bytes."""
        return sum(length for _, length in self.parts)


class StoredLayer(Frozen):
    """How a layer's weights are stored. The graphs contain the operators that multiply by them."""

    format: str = Field(default="float", pattern="^[a-z0-9-]{1,40}$")
    """One of "float" (numbers of the bundle's dtype), "int4" or "int8"."""


Blanks = Literal["none", "newlines", "blanks"]
"""What a text loses at one end: nothing, newlines, or everything that Python's str.strip strips."""


class Segment(Frozen):
    """The texts that the chat template writes before and behind something."""

    before: str
    """Written before it."""
    behind: str
    """Written behind it."""


class Spoken(Segment):
    """A text in a conversation. First its ends are stripped (`left`, `right`), then `before` and `behind` are added."""

    left: Blanks = "none"
    """What it loses at its left end."""
    right: Blanks = "none"
    """What it loses at its right end."""


class PastAnswer(Spoken):
    """An earlier answer. If it contains `thinking_end`, everything up to the last one is dropped first."""

    thinking_end: str | None = None
    """The text that ends the thinking part. None if answers have none."""
    thinking_left: Blanks = "none"
    """What the rest then loses at its left end."""


class PictureText(Frozen):
    """The text that stands for a picture."""

    text: str
    """The text itself."""
    line: str
    """Written behind a picture if no text of the message precedes it, unless the next part is a text that begins with
    `line`."""
    first: bool
    """Whether pictures come before all texts of their message, wherever they stand in it."""


class ChatSegments(Frozen):
    """A chat template without Jinja. A conversation is these texts around the messages, one behind the other:

    1. `begin` around the system message, or `begin_without_system`.
    2. `first_user` around the parts of the user's first message, `user` around those of later ones. Within them, `text`
       around each text, and `picture` for each picture.
    3. `assistant_past` around each earlier answer.
    4. `assistant_open` at the end.
    """

    begin: Spoken | None
    """None if the template takes no system message."""
    begin_without_system: str
    """The beginning of a conversation without a system message."""
    first_user: Segment
    """Around the parts of the user's first message."""
    user: Segment
    """Around the parts of the user's later messages."""
    text: Spoken
    """Around each text of a user's message."""
    picture: PictureText
    """Stands for each picture of a user's message."""
    assistant_open: str
    """Written at the end, before the answer."""
    assistant_past: PastAnswer
    """Around each earlier answer."""


class Manifest(Frozen):
    """manifest.json: everything that a runtime needs to know about a bundle.

    The export writes every field. Older bundles lack fields that were added later without a new `schema_version`. Such
    a field has a default, which is its meaning for those bundles. A program must refuse fields, methods and formats
    that it does not know: a newer version wrote them, and they may change answers.
    """

    schema_version: int
    """2. A runtime refuses any other version."""
    family: str
    """The model family: config.json's `model_type`."""
    dtype: FloatName
    """Dtype of the weights, and of every graph tensor that is not int32 or always float32."""
    lowering: str
    """The lowering of the graphs. "portable" graphs are not lowered; every other lowering starts from them."""
    selection_layer: int = Field(gt=0)
    """k: layers below it see every token and are in `prefix`; the others are in `decoder`."""
    calibrated: bool
    """Whether k was measured for this model."""
    default_ratio: float = Field(gt=0, le=1)
    """Fraction of visual tokens that is kept, if the user names none."""
    max_visual: int = Field(gt=0, le=MOST_VISUAL)
    """The most visual tokens of one picture."""
    decoder: DecoderSizes
    """Sizes of the language decoder."""
    rotary: RotarySizes
    """The rotary embedding of the decoder."""
    selection: Selection
    """How visual tokens are chosen."""
    preprocessing: Preprocessing
    """How pictures are prepared for `vision`."""
    tokens: SpecialTokens
    """Token ids that a runtime must know."""
    graphs: dict[GraphName, StoredGraph]
    """The three graphs."""
    embedding: EmbeddingTable
    """The table of token embeddings."""
    weights: tuple[WeightFile, ...]
    """All weight files of the bundle."""
    weight_formats: dict[str, StoredLayer] = Field(default_factory=dict)
    """How each layer's weights are stored, by the layer's canonical name. Layers without an entry are floats."""
    video: VideoPreprocessing | None = None
    """None if the model takes no videos."""
    chat: ChatSegments | None = None
    """None if the template cannot be expressed without Jinja."""
    residual_scale: float = Field(default=1, gt=0, le=1)
    """Factor of hidden_states between the graphs."""
    versions: dict[str, str]
    """Versions of the software that made the bundle, by name."""
    constants_sha256: Sha256
    """SHA-256 over the fields from `family` to `residual_scale`, without `calibrated` and `weights`. An edited manifest
    has another."""

    @property
    def visual_tokens(self) -> list[int]:
        """Ids that stand for visual tokens: a picture's, and a video's where the model takes videos."""
        return [self.tokens.image, *([] if self.video is None else [self.video.token])]

    @staticmethod
    def sealed(**fields: Any) -> Manifest:
        """The manifest of these fields, with the hash over its constants."""
        draft = Manifest(schema_version=SCHEMA_VERSION, constants_sha256="0" * 64, **fields)
        return draft.model_copy(update={"constants_sha256": constants_sha256(draft.model_dump(mode="json"))})


CONSTANTS = frozenset(
    (
        *("family", "dtype", "lowering", "selection_layer", "default_ratio", "max_visual", "decoder", "rotary"),
        *("selection", "preprocessing", "video", "tokens", "graphs", "embedding", "weight_formats", "chat"),
        "residual_scale",
    )
)
"""Fields of the manifest whose change would show only in different answers."""


def constants_sha256(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over the CONSTANTS of a manifest, to detect edits.

    manifest: the JSON object. The fields are hashed as JSON in UTF-8, with sorted keys and without spaces. Numbers are
    written as Python writes them.
    """
    constants = {name: manifest[name] for name in CONSTANTS if name in manifest}
    return hashlib.sha256(json.dumps(constants, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
