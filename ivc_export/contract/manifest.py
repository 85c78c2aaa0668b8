"""The manifest: everything that a runtime needs to know about a bundle."""

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
"""What visual tokens are scored by: the values of layer k-1, which it caches, or what its value weights make of the
rows that enter it, without the norm before them."""


class DecoderSizes(Frozen):
    """Sizes of the language decoder."""

    layers: int = Field(gt=1, le=1000)
    hidden_size: Width
    intermediate_size: Width
    heads: Heads
    kv_heads: Heads
    head_dim: int = Field(gt=0, le=4096, multiple_of=2)
    """Of a head's queries and keys."""
    value_dim: int = Field(gt=0, le=4096)
    """Of a head's values."""
    vocab_size: int = Field(gt=0, le=1 << 24)
    rms_norm_epsilon: Epsilon
    tied_embeddings: bool
    max_positions: Count
    deepstack: int = Field(default=0, ge=0, le=1000)
    """Layers, from the first on, behind which features of the pictures are added to their rows; `prefix` holds them."""

    @property
    def row_values(self) -> int:
        """What one row takes in the caches of one layer, in values."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def cuts(self) -> range:
        """Selection layers that this model can be cut at."""
        return range(max(1, self.deepstack), self.layers)


class RotarySizes(Frozen):
    """Rotary embedding: frequency j is `theta ** (-2 j / size)`, and `sections[a]` of them turn with axis a."""

    theta: float = Field(gt=0, le=1e12)
    sections: tuple[Heads, ...] = Field(min_length=1, max_length=3)
    interleaved: bool = False
    """Whether axes take frequencies in turn (j of axis a is a, a + n, a + 2n, ... of n axes; what remains is axis 0's),
    or one axis after the other."""

    @property
    def size(self) -> int:
        """Values of a head that are turned: all of them, for most families."""
        return 2 * sum(self.sections)


class SelectionRule(Frozen):
    """IVC-Prune's constants for a family; `round` is half to even throughout."""

    method: Literal["ivc-prune"] = "ivc-prune"
    ivc_fraction: float = Field(ge=0, le=1)
    """Of each picture's tokens, or of each tile's: as many by mean cosine, and as many by mean sine."""
    seed_divisor: int = Field(gt=0, le=1 << 20, multiple_of=2)
    query_offset: int = Field(ge=0, le=1 << 20)
    """Text votes from row `end + query_offset` on, where `end` is the row behind the last picture."""
    softmax: Literal["visual", "all", "thumbnail"] = "visual"
    """What a vote is shared among: the visual tokens, every row of the run, or the thumbnails' tokens."""
    tiles: bool = False
    """Whether pictures are tiles with a thumbnail, by which tokens are chosen (SelectTileTokens)."""
    views: bool = False
    """Whether pictures are two views with separators, and the first chooses the second's tokens (SelectViewTokens)."""
    row_fraction: float = Field(default=0, ge=0, le=1)
    """Where there are views: as ivc_fraction, of each row of the second view; ivc_fraction is of the first."""
    scored: Scored = "values"
    whole_layers: tuple[int, ...] = ()
    """Layers whose cache keeps every row, also of pruned tokens: it has a length of its own."""


class FastVRule(Frozen):
    """FastV has no constants: the tokens that the last row attends to most in layer k-1 are kept."""

    method: Literal["fastv"] = "fastv"
    whole_layers: tuple[int, ...] = ()
    """As SelectionRule's."""
    scored: ClassVar[Scored] = "values"
    """Nothing else has to be made for it."""
    query_offset: ClassVar[int] = 0
    """Any row behind the last picture can choose."""
    tiles: ClassVar[bool] = False
    """A thumbnail's tokens, and those of tiles, are tokens like others."""
    views: ClassVar[bool] = False
    """So are separators."""


Selection = Annotated[SelectionRule | FastVRule, Field(discriminator="method")]
"""How a bundle's graphs choose visual tokens."""


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
    dtype: DtypeName
    shape: tuple[int | str, ...]


class GraphInfo(Frozen):
    """One graph: its file within the bundle, and what it takes and gives."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class StoredGraph(GraphInfo):
    """One graph of the bundle; `sha256` is of its file, which holds no weights."""

    sha256: Sha256


class WeightFile(Frozen):
    """A safetensors file of the bundle; `header_sha256` is of its header alone.

    `sha256`, of the whole file, is None until somebody has read it: `ivc-check --weights` does.
    """

    file: str
    size: int = Field(ge=0)
    header_sha256: Sha256
    sha256: Sha256 | None = None


class PackedRows(Frozen):
    """A table in 8 bits: uint8 [vocab, ceil(hidden / block), block], the last block of a row filled up.

    A value is (stored - 128) times its block's scale, in float32. scales: the byte of the same file at which these lie,
    [vocab, ceil(hidden / block)] of `dtype`.
    """

    block: int = Field(ge=16, le=128)
    scales: int = Field(ge=0)
    dtype: FloatName


class EmbeddingTable(Frozen):
    """Where the token embeddings lie: row-major [vocab, hidden] at byte `offset` of `file`, or packed there.

    dtype: of the floats; "uint8" where they are packed, so that programs which know no packed ones refuse them.
    """

    file: str
    offset: int = Field(ge=0)
    dtype: FloatName | Literal["uint8"]
    shape: tuple[Count, Count]
    packed: PackedRows | None = None
    """None where they are floats."""

    @property
    def floats(self) -> FloatName:
        """The dtype of what floats it holds."""
        if self.packed is None and self.dtype != "uint8":
            return self.dtype
        return self.packed.dtype if self.packed else "float32"

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Where it lies: first byte and length of each part."""
        rows, hidden = self.shape
        size = FLOATS[self.floats].bytes
        if self.packed is None:
            return ((self.offset, rows * hidden * size),)
        blocks = -(-hidden // self.packed.block)
        return (self.offset, rows * blocks * self.packed.block), (self.packed.scales, rows * blocks * size)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(length for _, length in self.parts)


class StoredLayer(Frozen):
    """How a layer's weights are stored: "float" is as numbers of the bundle's dtype; see checkpoint.formats for others.

    The graphs say how to multiply by them.
    """

    format: str = Field(default="float", pattern="^[a-z0-9-]{1,40}$")


Blanks = Literal["none", "newlines", "blanks"]
"""What is stripped from an end of a text: nothing, newlines, or all that Python's str.strip strips."""


class Segment(Frozen):
    """What the chat template writes before and behind something."""

    before: str
    behind: str


class Spoken(Segment):
    """A text in a conversation: what is stripped from its ends, and what is then written before and behind it."""

    left: Blanks = "none"
    right: Blanks = "none"


class PastAnswer(Spoken):
    """An earlier answer: where it holds `thinking_end`, all up to the last one is dropped first."""

    thinking_end: str | None = None
    thinking_left: Blanks = "none"
    """What is then stripped from the left of what remains."""


class PictureText(Frozen):
    """What stands for a picture."""

    text: str
    line: str
    """Written behind a picture that no text of its message precedes, but where the next part is a text that begins with
    it."""
    first: bool
    """Whether pictures come before all texts of their message, wherever they stand in it."""


class ChatSegments(Frozen):
    """A chat template without Jinja: a conversation is these texts, and what was said, one behind the other.

    That is `begin` around the system message, or `begin_without_system`; `first_user` around the parts of the user's
    first message, `user` around those of later ones, `text` around each text of them; `assistant_past` around each
    answer; and behind the last message `assistant_open`.
    """

    begin: Spoken | None
    """None where the template takes no system message."""
    begin_without_system: str
    first_user: Segment
    user: Segment
    text: Spoken
    picture: PictureText
    assistant_open: str
    assistant_past: PastAnswer


class Manifest(Frozen):
    """manifest.json: everything that a runtime needs to know about a bundle.

    Every field stands in the file. A field that was added without a new `schema_version` has a default, which says what
    bundles without it mean; so has whatever is added to a record within. A program refuses fields, methods and formats
    that it does not know, since they may change answers: such a bundle was made by a newer one.
    """

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
    selection: Selection
    preprocessing: Preprocessing
    tokens: SpecialTokens
    graphs: dict[GraphName, StoredGraph]
    embedding: EmbeddingTable
    weights: tuple[WeightFile, ...]
    weight_formats: dict[str, StoredLayer] = Field(default_factory=dict)
    """How a layer's weights are stored, by its canonical name; those of layers that it does not name, as floats."""
    video: VideoPreprocessing | None = None
    """None where videos are not taken."""
    chat: ChatSegments | None = None
    """None where only the template itself says what a conversation looks like."""
    residual_scale: float = Field(default=1, gt=0, le=1)
    """What hidden_states are multiplied by between the graphs."""
    versions: dict[str, str]
    constants_sha256: Sha256
    """See the function of that name."""

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
"""Fields of the manifest that nothing else tells of when they change, but other answers."""


def constants_sha256(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over the CONSTANTS of a manifest, by which an edited one is known.

    manifest: the JSON object. The fields are hashed as JSON in UTF-8, of sorted keys and without spaces, numbers as
    Python writes them.
    """
    constants = {name: manifest[name] for name in CONSTANTS if name in manifest}
    return hashlib.sha256(json.dumps(constants, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
