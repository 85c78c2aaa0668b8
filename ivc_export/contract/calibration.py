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
"""By how many spreads of random draws a method must differ from their mean to differ from chance."""
ADVICE = "write a calibration with ivc-calibrate"


class Trial(Frozen):
    """One layer at one ratio, against the unpruned model's own answers.

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
    """Another way to choose at a layer and ratio that was tried, to compare with; fields as in Trial.

    scored: what it scored by, where that is not what the trials did. draws: how many seeds were tried. Figures are
    means over them; spreads, their standard deviations, 0 of one draw.
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
        """What tables and plots call it."""
        return self.method if self.scored is None else f"{self.method} by {self.scored}"


class MeasuredDecoder(Frozen):
    """What a calibrated model is known by, beside its family; files of earlier versions say more of it."""

    model_config = ConfigDict(extra="ignore")

    layers: int = Field(gt=1, le=1000)
    hidden_size: Width


class Calibration(Frozen):
    """A proposal for one model, and what it rests on.

    method, method_seed: how the trials chose tokens. scored: what they scored them by, None for the family's. rivals:
    other ways beside them.
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
    """The lowest layer at which `enough` of the answers agree at `ratio`, or else the one that diverges least.

    A lower layer saves more, since the layers below it see every token.
    """
    found = sorted((trial for trial in trials if trial.ratio == ratio), key=lambda trial: trial.layer)
    agreeing = [trial for trial in found if trial.agreement >= enough]
    return (agreeing[0] if agreeing else min(found, key=lambda trial: trial.divergence)).layer


def verdict(found: Calibration) -> str | None:
    """Where the choice of tokens makes no difference, as a sentence; None if no random choice stands beside it.

    That is where the part of the answers that stay the same is within random's mean and SPREADS spreads.
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
        f"the choice makes {'no' if same else 'a'} difference on this data at {named}, ratio {random[0].ratio:g}: "
        f"{found.method} leaves as they were a part of the answers that is {'' if same else 'not '}within "
        f"{SPREADS} spreads of random's"
    )


def read_calibration(path: Path) -> Calibration:
    """Read a calibration.

    Raises:
        UserError: the file is missing, or is no calibration.
    """
    try:
        return Calibration.model_validate(read_json(path, ADVICE))
    except ValidationError as error:
        raise UserError(f"{path} is not a calibration ({first_problem(error)}): {ADVICE}") from error
