"""The language models of families: tables of their keys, and the meaning of the keys."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from ivc_export.contract.manifest import DecoderSizes, Scored
from ivc_export.contract.records import INT32_MOST, Count, Epsilon, Heads, Width
from ivc_export.families.settings import CONFIG, One, Settings, check_divides, inconsistent, refuse
from ivc_export.graph.decoder_block import DecoderBlock, SeparateProjections, self_attention_block

Theta = Annotated[float, Field(gt=0, le=1e12)]
Vocabulary = Annotated[int, Field(gt=0, le=1 << 24)]
DecoderLayers = Annotated[int, Field(gt=1, le=1000)]
HeadSize = Annotated[int, Field(gt=0, le=4096)]
WindowRows = Annotated[int, Field(ge=0, le=INT32_MOST)]


class RopeSettings(Settings):
    """Settings of rotary positions. `type` is the older name of `rope_type`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Theta | None = None
    partial_rotary_factor: One = 1.0


class PlainRope(RopeSettings):
    """One-dimensional rotary positions. "dynamic" scaling does not change them up to the model's last position."""

    rope_type: Literal["default", "dynamic"] | None = None
    type: Literal["default", "dynamic"] | None = None


class DecoderSettings(Settings):
    """A decoder of Llama's kind (Llama, Qwen2, InternLM2): the keys that all of these have."""

    default_theta: ClassVar[float] = 10000.0
    block: ClassVar[DecoderBlock]
    """The parts of its layers."""
    scored: ClassVar[Scored] = "values"
    """How the official code scores visual tokens; by the layer's values if it does not cover the decoder."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: DecoderLayers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None
    """null: as many as num_attention_heads."""
    head_dim: HeadSize | None = None
    """null: hidden_size / num_attention_heads."""
    hidden_act: Literal["silu", "swish"] = "silu"
    max_position_embeddings: Count
    rms_norm_eps: Epsilon
    rope_theta: Theta | None = None
    rope_parameters: RopeSettings | None = None
    rope_scaling: RopeSettings | None = None
    partial_rotary_factor: One = 1.0
    tie_word_embeddings: bool = False

    @property
    def rope(self) -> RopeSettings | None:
        """The rotary settings. Older files have rope_scaling, which comes before rope_parameters if it is set."""
        scaling = self.rope_scaling
        return scaling if scaling is not None and scaling.model_fields_set else self.rope_parameters

    @property
    def theta(self) -> float:
        """The base of the rotary frequencies."""
        return (self.rope and self.rope.rope_theta) or self.rope_theta or self.default_theta


class LlamaText(DecoderSettings):
    """LlamaConfig of transformers."""

    block: ClassVar[DecoderBlock] = self_attention_block(SeparateProjections(bias=False))

    model_type: Literal["llama"] = "llama"
    vocab_size: Vocabulary = 32000
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: DecoderLayers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Epsilon = 1e-6
    rope_parameters: PlainRope | None = None
    rope_scaling: PlainRope | None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False


class WindowedText(DecoderSettings):
    """The keys by which layers of Qwen2's kind attend only within a window of earlier rows. Only models without windows
    are supported."""

    block: ClassVar[DecoderBlock] = self_attention_block(SeparateProjections(bias=True))

    use_sliding_window: bool = False
    sliding_window: WindowRows | None = 4096
    max_window_layers: WindowRows
    """Layers from this one on have windows, if use_sliding_window and sliding_window say so."""
    layer_types: Annotated[tuple[str, ...], Strict(False)] | None = None

    def check_windows(self) -> None:
        """Check that every layer attends to every row.

        Raises:
            UserError: one does not, or the number of layers is wrong.
        """
        if self.layer_types is not None:
            if {*self.layer_types} != {"full_attention"}:
                other = next((kind for kind in self.layer_types if kind != "full_attention"), None)
                refuse(
                    "layer_types", other, CONFIG, "this version supports 'full_attention', not sliding-window attention"
                )
            if len(self.layer_types) != self.num_hidden_layers:
                raise inconsistent(
                    f"there are {len(self.layer_types)} layer_types, but num_hidden_layers is {self.num_hidden_layers}"
                )
            return
        first, windowed = self.max_window_layers, self.use_sliding_window and self.sliding_window is not None
        if windowed and first < self.num_hidden_layers:
            known = f"this version supports no sliding-window attention, which layers from {first} on would have"
            refuse("use_sliding_window", True, CONFIG, known)


class Qwen2Text(WindowedText):
    """Qwen2Config of transformers."""

    model_type: Literal["qwen2"] = "qwen2"
    vocab_size: Vocabulary = 151936
    hidden_size: Width = 4096
    intermediate_size: Width = 22016
    num_hidden_layers: DecoderLayers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = 32
    max_position_embeddings: Count = 32768
    rms_norm_eps: Epsilon = 1e-6
    rope_parameters: PlainRope | None = None
    rope_scaling: PlainRope | None = None
    max_window_layers: WindowRows = 28


class Qwen3Text(WindowedText):
    """Qwen3Config of transformers: heads of their own size, and norms of queries and keys instead of biases."""

    block: ClassVar[DecoderBlock] = self_attention_block(SeparateProjections(bias=False), head_norms=True)

    model_type: Literal["qwen3"] = "qwen3"
    vocab_size: Vocabulary = 151936
    hidden_size: Width = 4096
    intermediate_size: Width = 22016
    num_hidden_layers: DecoderLayers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = 32
    head_dim: HeadSize | None = 128
    max_position_embeddings: Count = 32768
    rms_norm_eps: Epsilon = 1e-6
    rope_parameters: PlainRope | None = None
    rope_scaling: PlainRope | None = None
    attention_bias: Literal[False] = False
    max_window_layers: WindowRows = 28


def read_decoder(text: DecoderSettings, tied: bool) -> DecoderSizes:
    """Read the sizes of a decoder.

    Raises:
        UserError: sizes do not fit each other, or attention uses a sliding window.
    """
    if isinstance(text, WindowedText):
        text.check_windows()
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = heads if text.num_key_value_heads is None else text.num_key_value_heads
    if text.head_dim is None:
        check_divides(("hidden_size", hidden, 2 * heads))
    else:
        check_divides(("head_dim", text.head_dim, 2))
    check_divides(("num_attention_heads", heads, kv_heads))
    return DecoderSizes(
        layers=text.num_hidden_layers,
        hidden_size=hidden,
        intermediate_size=text.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=text.head_dim or hidden // heads,
        value_dim=text.head_dim or hidden // heads,
        vocab_size=text.vocab_size,
        rms_norm_epsilon=text.rms_norm_eps,
        tied_embeddings=tied,
        max_positions=text.max_position_embeddings,
    )
