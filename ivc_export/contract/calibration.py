"""The file of a calibration. ivc-calibrate writes it and `ivc-export --calibration` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from ivc_export.contract.manifest import Scored
from ivc_export.contract.records import Frozen, Seed, Width, first_problem
from ivc_export.errors import UserError
from ivc_export.files import read_json

ENOUGH = 0.99
SPREADS = 2
"""A method differs from chance if it differs from the mean of random draws by more than so many standard deviations."""
ADVICE = "write a calibration with ivc-calibrate"


class Trial(Frozen):
    """One layer at one ratio, compared with the unpruned model's own answers.

    divergence: mean Kullback-Leibler divergence of next-token distributions, from the unpruned to the pruned, in nats.
    agreement: fraction of answers that are the same, token by token. overlap: mean of intersection over union of kept
    visual tokens with those of the layer tried before; None for the first. saved: part of the language model's prefill
    FLOPs.
    """

    layer: int = Field(gt=0)
    ratio: float = Field(gt=0, le=1)
    divergence: float = Field(ge=0)
    agreement: float = Field(ge=0, le=1)
    overlap: float | None = Field(ge=0, le=1)
    saved: float


class Rival(Frozen):
    """Another method at a layer and ratio that was tried, for comparison. Fields as in Trial.

    scored: its way of scoring, if it is not that of the trials. draws: how many seeds were tried. Figures are means
    over them; spreads are their standard deviations, 0 for one draw.
    """

    method: str
    scored: Scored | None = None
    layer: int = Field(gt=0)
    ratio: float = Field(gt=0, le=1)
    draws: int = Field(gt=0)
    divergence: float = Field(ge=0)
    divergence_spread: float = Field(ge=0)
    agreement: float = Field(ge=0, le=1)
    agreement_spread: float = Field(ge=0)

    @property
    def name(self) -> str:
        """Its name in tables and plots."""
        return self.method if self.scored is None else f"{self.method} by {self.scored}"


class MeasuredDecoder(Frozen):
    """Facts by which a calibrated model is recognised, besides its family. Files of earlier versions have more."""

    model_config = ConfigDict(extra="ignore")

    layers: int = Field(gt=1, le=1000)
    hidden_size: Width


class Calibration(Frozen):
    """A proposal for one model, and the trials behind it.

    method, method_seed: how the trials chose tokens. scored: how they scored them; None for the family's way. rivals:
    other methods, for comparison.
    """

    schema_version: Literal[1] = 1
    family: str
    decoder: MeasuredDecoder
    layer: int = Field(gt=0)
    ratio: float = Field(gt=0, le=1)
    answers: int = Field(gt=0)
    method: str = "ivc-prune"
    method_seed: Seed | None = None
    scored: Scored | None = None
    trials: tuple[Trial, ...] = Field(min_length=1)
    rivals: tuple[Rival, ...] = ()
    versions: dict[str, str]


def propose(trials: Sequence[Trial], ratio: float, enough: float = ENOUGH) -> int:
    """The lowest layer at which `enough` of the answers agree at `ratio`. If there is none, the layer with the least
    divergence.

    A lower layer saves more, because the layers below it see every token.
    """
    found = sorted((trial for trial in trials if trial.ratio == ratio), key=lambda trial: trial.layer)
    agreeing = [trial for trial in found if trial.agreement >= enough]
    return (agreeing[0] if agreeing else min(found, key=lambda trial: trial.divergence)).layer


def shortfall(found: Calibration, enough: float = ENOUGH) -> str | None:
    """A sentence if fewer than `enough` of the answers agree at the proposed layer, and so at every layer."""
    (agreement,) = (t.agreement for t in found.trials if (t.layer, t.ratio) == (found.layer, found.ratio))
    if agreement >= enough:
        return None
    return (
        f"no layer keeps {enough:.4g} of the answers at ratio {found.ratio:g}: layer {found.layer} has the least "
        f"divergence, and keeps {agreement:.4g}; give a larger --ratio, or a smaller --agreement"
    )


def verdict(found: Calibration) -> str | None:
    """A sentence on whether the choice of tokens makes a difference. None if there is no random choice to compare with.

    It makes no difference if the fraction of unchanged answers is within SPREADS standard deviations of random's mean.
    """
    trials = {(trial.layer, trial.ratio): trial.agreement for trial in found.trials}
    random = [rival for rival in found.rivals if rival.method == "random"]
    if not random:
        return None
    same = [
        r.layer for r in random if abs(trials[r.layer, r.ratio] - r.agreement) <= SPREADS * r.agreement_spread + 1e-9
    ]
    layers = same or [rival.layer for rival in random]
    named = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    return (
        f"on this data the selection method makes {'no' if same else 'a'} difference at {named}, ratio "
        f"{random[0].ratio:g}: the fraction of unchanged answers of {found.method} is {'' if same else 'not '}within "
        f"{SPREADS} standard deviations of random's"
    )


def read_calibration(path: Path) -> Calibration:
    """Read a calibration.

    Raises:
        UserError: the file is missing, or is not a calibration.
    """
    try:
        return Calibration.model_validate(read_json(path, ADVICE))
    except ValidationError as error:
        raise UserError(f"{path} is not a calibration ({first_problem(error)}): {ADVICE}") from error
