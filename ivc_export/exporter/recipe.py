"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ivc_export.contract.manifest import Scored
from ivc_export.contract.names import MOST_VISUAL
from ivc_export.contract.ratio import check_ratio
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.selection.method import exported_methods

Dtype = Literal["checkpoint", "float32", "float16", "bfloat16"]
Placing = Literal["copy", "link"]
Rounded = Literal["int4", "int8"]
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Quantisation:
    """Which weights an export rounds to 4 or 8 bits. It needs no data.

    Attributes:
        weights: format of the decoder layers' products: "int4" or "int8". None leaves them as they are.
        group_size: how many values of a row share a scale: 32, 64 or 128. It applies to everything that is rounded.
        asymmetric: whether the groups of decoder layers have zero points. All other groups have none.
        lm_head: format of the product that gives logits. None leaves it as it is.
        embeddings: format of the table of token embeddings: "int8". None leaves it as it is.
        vision: format of the vision encoder's products: "int8". None leaves them as they are.
        search: True searches for the best scale of each group. False takes the scale from the largest value, to
            compare.

    Raises:
        UserError: a value is not one of these, or zero points are wanted for decoder layers that are not rounded.
    """

    weights: Rounded | None = None
    group_size: int = 128
    asymmetric: bool = False
    lm_head: Rounded | None = None
    embeddings: Literal["int8"] | None = None
    vision: Literal["int8"] | None = None
    search: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in GROUPS:
            raise UserError(
                f"weights cannot be quantised in groups of {self.group_size}: give one of {', '.join(map(str, GROUPS))}"
            )
        for what, value, known in (
            ("weights", self.weights, get_args(Rounded)),
            ("lm_head", self.lm_head, get_args(Rounded)),
            ("embeddings", self.embeddings, ("int8",)),
            ("vision", self.vision, ("int8",)),
        ):
            if value not in (None, *known):
                raise UserError(f"{what} cannot be quantised to {value!r}: give one of {', '.join(known)}")
        if self.asymmetric and self.weights is None:
            raise UserError("zero points are for quantised decoder layers: name their format, int4 or int8, too")

    @property
    def rounds(self) -> bool:
        """Whether any weights are rounded."""
        return any((self.weights, self.lm_head, self.embeddings, self.vision))

    @property
    def said(self) -> str:
        """A sentence that says what is rounded. It is empty if nothing is."""
        if not self.rounds:
            return ""
        parts = (
            [f"decoder layers {self.weights}{' with zero points' if self.asymmetric else ''}"] if self.weights else []
        )
        for name, value in (("lm_head", self.lm_head), ("embeddings", self.embeddings), ("vision", self.vision)):
            parts += [f"{name} {value}"] if value else []
        return f"weights are quantised without data, in groups of {self.group_size}: {', '.join(parts)}"


@dataclass(frozen=True)
class ExportRecipe:
    """One export: which checkpoint, where to, and how the bundle prunes.

    Attributes:
        model: a checkpoint folder in Hugging Face's layout, a hub id, or an alias such as "qwen2-vl-2b".
        output: the bundle's folder. It must not exist, unless `force` is true.
        ratio: the default fraction of visual tokens that is kept. A run can choose another. None takes the family's.
        layer: the selection layer k. Layers below it see every token. None takes the family's default.
        max_visual: the most visual tokens of one picture. Larger pictures are scaled down or cut into fewer tiles.
        force: whether to replace an older bundle at `output`. Nothing but a bundle is ever replaced.
        revision: branch, tag or commit on the hub. None takes the main branch.
        dtype: dtype of weights and graphs. "checkpoint" leaves the weights as they are.
        weights: "copy" copies the weight files. "link" makes hard links, which takes no time and no space. Then a
            change of the checkpoint's file changes the bundle too.
        lowering: "portable", for every runtime, or "native": graphs of standard operators only.
        testdata: whether to add inputs and outputs of every graph for one picture and prompt.
        calibration: a file that ivc-calibrate wrote. Its layer and its way of scoring are taken. None takes neither.
        scored: how visual tokens are scored: "values" or "unnormed-values". None takes the family's way.
        method: how visual tokens are chosen: "ivc-prune" or "fastv". Bundles of "ivc-prune" can also run "foreground"
            and "random".
        quantisation: which weights are rounded to 4 or 8 bits.

    Raises:
        UserError: a value is out of range, or two of them contradict each other.
    """

    model: Path | str
    output: Path
    ratio: float | None = None
    layer: int | None = None
    max_visual: int = 1280
    force: bool = False
    revision: str | None = None
    dtype: Dtype = "checkpoint"
    weights: Placing = "copy"
    lowering: str = "portable"
    testdata: bool = False
    calibration: Path | None = None
    scored: Scored | None = None
    method: str = "ivc-prune"
    quantisation: Quantisation = Quantisation()

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.calibration is not None and self.layer is not None:
            raise UserError(
                "both a layer and a calibration are given: leave out one of them, since the calibration has a layer"
            )
        if self.calibration is not None and self.scored is not None:
            raise UserError(
                "both a calibration and --scored are given: leave out one of them, since the calibration has its own"
            )
        if self.scored is not None and self.method != "ivc-prune":
            raise UserError(f"{self.method} scores visual tokens by attention: leave out --scored")
        if self.max_visual < 4:
            raise UserError(f"max_visual {self.max_visual} is too small: give at least 4 visual tokens per picture")
        if self.max_visual > MOST_VISUAL:
            raise UserError(
                f"max_visual {self.max_visual} is too large: give at most {MOST_VISUAL} visual tokens per picture"
            )
        for what, value, known in (
            ("dtype", self.dtype, get_args(Dtype)),
            ("weights", self.weights, get_args(Placing)),
            ("scored", self.scored, (None, *get_args(Scored))),
            ("method", self.method, exported_methods()),
        ):
            if value not in known:
                raise UserError(f"{what} {value!r} is unknown: give one of {', '.join(filter(None, known))}")

        if self.quantisation.rounds and self.weights == "link":
            raise UserError("weights that the export quantises cannot be linked: leave out --weights link")

    @property
    def float_name(self) -> FloatName | None:
        """The requested dtype, or None for the checkpoint's."""
        return None if self.dtype == "checkpoint" else self.dtype
