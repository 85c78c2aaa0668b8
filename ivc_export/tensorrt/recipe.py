"""How engines are built: the user's choices, and the compiler's options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ivc_export.contract.names import MOST_VISUAL
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.tensorrt.loading import Target

AttentionChoice = Literal["auto", "grouped", "repeated"]
SoftmaxChoice = Literal["float16", "float32"]

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class Options:
    """How a graph is compiled. Fields as in EngineRecipe.

    reduced: whether the graph is in another dtype than float32. verbose: TensorRT's own messages go to standard error.
    """

    target: Target
    compute_capability: str
    workspace: int | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None
    tactic_sources: tuple[str, ...] | None = None
    reduced: bool = False
    verbose: bool = False


@dataclass(frozen=True)
class EngineRecipe:
    """How engines are built.

    compute_capability: of the target GPU, such as "8.6"; None takes this machine's, which TensorRT requires.
    dtype: None takes the bundle's, but float16 instead of bfloat16 for TensorRT before 10 and GPUs before 8.0.
    max_visual, max_text, max_new: the most visual tokens, other tokens of a prompt, and tokens of all answers.
    opt_visual, opt_text: the numbers for which a prefill is tuned.
    plugin: our plugin's library; None builds graphs of standard operators.
    softmax: dtype of the vision encoder's softmax; None takes float16 in engines in float16, which TensorRT fuses, and
        else float32.
    attention: of decoder layers made of standard operators: `grouped` by key-value head, or with keys and values
        `repeated`, which takes less memory; `auto` groups if that fits.
    memory: bytes that the device has for engines; None takes this machine's.
    workspace: bytes that a layer may use; None leaves it to TensorRT.
    timing_cache: a folder with a file for each graph, read and written, so that a second build is short.
    tactic_sources: names of trt.TacticSource that may be used; None leaves it to TensorRT.

    Raises:
        UserError: a number is out of range.
    """

    target: Target = "tensorrt"
    compute_capability: str | None = None
    dtype: FloatName | None = None
    max_visual: int = 1280
    max_text: int = 512
    max_new: int = 512
    opt_visual: int = 576
    opt_text: int = 64
    plugin: Path | None = None
    softmax: SoftmaxChoice | None = None
    attention: AttentionChoice = "auto"
    memory: int | None = None
    workspace: int | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None
    tactic_sources: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, least, value, most in (
            ("max-visual", 1, self.max_visual, MOST_VISUAL),
            ("max-text", 1, self.max_text, 1 << 20),
            ("max-new", 1, self.max_new, 1 << 20),
            ("opt-visual", 1, self.opt_visual, self.max_visual),
            ("opt-text", 1, self.opt_text, self.max_text),
            ("optimization-level", 0, self.optimization_level, 5),
            ("workspace", 1, 1 if self.workspace is None else self.workspace, 1 << 40),
            ("memory", 1, 1 if self.memory is None else self.memory, 1 << 44),
        ):
            if not least <= value <= most:
                raise UserError(f"{name} {value} is out of range: give {least} to {most}")
        for name, given, known in (
            ("softmax", self.softmax or "float16", get_args(SoftmaxChoice)),
            ("attention", self.attention, get_args(AttentionChoice)),
        ):
            if given not in known:
                raise UserError(f"there is no {name} {given}: give {' or '.join(known)}")
        if self.plugin is not None and self.attention != "auto":
            raise UserError("--attention does not apply to engines with our plugin: leave out --attention or --plugin")
        if self.target == "tensorrt-rtx":
            if self.plugin is not None:
                raise UserError("TensorRT-RTX has no plugins: leave out --plugin")
            if self.compute_capability not in RTX_CAPABILITIES:
                raise UserError(
                    "TensorRT-RTX builds for one compute capability: give --compute-capability with one of "
                    f"{', '.join(RTX_CAPABILITIES)}"
                )
        elif self.compute_capability is not None:
            raise UserError("TensorRT builds only for this machine's GPU: leave out --compute-capability")

    @property
    def capacity(self) -> int:
        """Rows of the caches."""
        return self.max_visual + self.max_text + self.max_new

    def options(self, capability: str, dtype: FloatName, verbose: bool = False) -> Options:
        """How its graphs are compiled."""
        return Options(
            self.target,
            capability,
            self.workspace,
            self.optimization_level,
            self.timing_cache,
            self.tactic_sources,
            dtype != "float32",
            verbose,
        )
