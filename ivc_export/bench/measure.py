"""Lets sides take turns over prompts and ratios. Each figure is a median over rounds."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ivc_export.bench.footprint import Footprints
from ivc_export.bench.prompts import Prompt
from ivc_export.bench.roofline import Workload, measure_ceilings
from ivc_export.bench.sides import Answer, BundleSide, Side
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.ratio import check_ratio, kept_tokens
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.runtime.interface import Session
from ivc_export.runtime.plan import plan_run
from ivc_export.runtime.probes import Ceilings

FIRST_TOKENS = 8
"""How many tokens at the beginning must be equal in all float32 sides."""


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a run. ratios: fractions of visual tokens kept, in addition to 1, which is always measured. count:
    tokens to decode.

    Raises:
        UserError: a number is out of range.
    """

    ratios: tuple[float, ...] = (0.5,)
    count: int = 32
    rounds: int = 5
    warmups: int = 2

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            check_ratio(ratio)
        for what, least, value in (("tokens", 1, self.count), ("rounds", 1, self.rounds), ("warmups", 0, self.warmups)):
            if value < least:
                raise UserError(f"{what} {value} is out of range: give {least} or more")

    @property
    def all_ratios(self) -> tuple[float, ...]:
        """1, then the other ratios from the largest on."""
        return tuple(sorted({1.0, *self.ratios}, reverse=True))


@dataclass(frozen=True)
class Row:
    """One side at one size and ratio: milliseconds, bytes, and tokens.

    stages: times to the first token: vision, prefix and decoder, or vision and prefill for a peer; "host" is the rest.
    decode: time of a token, the median of all steps. decode_mean: the mean, with the steps that capture a CUDA graph.
    selection: times of selection and compaction alone, where they can be measured: "select" and "compact" of a prefill,
        "share" of the prefill that both take; "decode" and "decode_share" are the same for a decode step.
    ideal: times by the roofline. roofline: how much of each is reached. device_bytes, host_bytes: the most that the
        side has held so far, with its weights; host memory without mapped files.
    agreement: how many leading tokens equal those of the first side at ratio 1, of `tokens`; None at other ratios.
    """

    side: str
    dtype: FloatName
    device: str
    ratio: float
    visual_tokens: int
    kept_tokens: int
    text_tokens: int
    stages: dict[str, float]
    prefill: float
    first_token: float
    decode: float
    decode_mean: float
    selection: dict[str, float] | None
    ideal: dict[str, float]
    roofline: dict[str, float]
    cache_bytes: int
    visual_cache_bytes: int
    host_bytes: int
    device_bytes: int | None
    tokens: list[int]
    agreement: int | None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, with times rounded to a microsecond."""

        def rounded(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: rounded(part) for key, part in value.items()}
            return round(value, 4) if isinstance(value, float) else value

        return {key: rounded(value) for key, value in asdict(self).items()}


@contextmanager
def noted(failures: dict[str, str] | None, name: str) -> Iterator[None]:
    """Collect an error of the block in `failures`, if it is given: one line that describes it, and the traceback."""
    try:
        yield
    except Exception as error:
        if failures is None:
            raise
        failures[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


@dataclass
class Contestant:
    """A side, and the memory that it has taken."""

    side: Side
    memory: Footprints


class Bench:
    """All sides over one bundle.

    failures: collects errors. Without it, an error ends the run. A side that fails is left out of that prompt's rows.

    Raises:
        UserError: the bundle's graphs are not portable, so selection cannot be separated from the rest.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: BenchSettings,
        progress: Callable[[str], None] = lambda text: None,
        failures: dict[str, str] | None = None,
    ) -> None:
        bundle.check_portable("ivc-bench")
        self.bundle, self.settings, self.progress, self.failures = bundle, settings, progress, failures
        self.workload = Workload(bundle)
        self._workloads = {bundle.folder: self.workload}
        self.ceilings: dict[tuple[str, FloatName], Ceilings] = {}

    def measure(self, contestants: Sequence[Contestant], prompt: Prompt) -> list[Row]:
        """Measure the rows of one prompt: every side at every ratio, peers only at ratio 1.

        Raises:
            UserError: a side fails, or float32 sides draw different tokens with nothing pruned.
        """
        self._measure_ceilings(contestants)
        ratios = self.settings.all_ratios
        turns = [(one, ratio) for one in contestants for ratio in (ratios if one.side.prunes else (1.0,))]
        seen: dict[tuple[str, float], list[Answer]] = {(one.side.name, ratio): [] for one, ratio in turns}
        for number in range(self.settings.warmups + self.settings.rounds):
            warm = number >= self.settings.warmups
            for one, ratio in turns if number % 2 else turns[::-1]:
                name = one.side.name
                if (name, ratio) not in seen:
                    continue
                kind = f"round {number + 1 - self.settings.warmups}" if warm else "warm-up"
                self.progress(f"{prompt.visual} visual tokens, {kind}: {name}, ratio {ratio:g}")
                answer = None
                with noted(self.failures, f"{name}, {prompt.visual} visual tokens"):
                    answer = self._answer(one, prompt, ratio, watched=not warm)
                if answer is None:
                    seen = {key: answers for key, answers in seen.items() if key[0] != name}
                elif warm:
                    seen[name, ratio].append(answer)
        self._measure_ceilings(contestants)
        return self._rows([turn for turn in turns if (turn[0].side.name, turn[1]) in seen], prompt, seen)

    def _measure_ceilings(self, contestants: Sequence[Contestant]) -> None:
        """Measure the limits before and after rounds, and keep the best. Other work on the machine can only lower
        them."""
        sessions: dict[tuple[str, FloatName], Session | None] = {}
        for side in (one.side for one in contestants):
            key = side.device, side.dtype
            measures = isinstance(side, BundleSide) and side.backend.ceilings is not None
            sessions[key] = side.session if isinstance(side, BundleSide) and measures else sessions.get(key)
        for key, session in sessions.items():
            self.progress(f"measuring the roofline: {key[0]}, {key[1]}")
            found = measure_ceilings(*key, session)
            self.ceilings[key] = found.best(self.ceilings.get(key, found))

    def _answer(self, one: Contestant, prompt: Prompt, ratio: float, watched: bool) -> Answer:
        with one.memory.grow() if watched else nullcontext():  # while times are taken, measuring memory would disturb
            return one.side.answer(prompt, ratio, self.settings.count)

    def _rows(
        self,
        turns: Iterable[tuple[Contestant, float]],
        prompt: Prompt,
        seen: dict[tuple[str, float], list[Answer]],
    ) -> list[Row]:
        rows: list[Row] = []
        for one, ratio in turns:
            self.progress(f"{prompt.visual} visual tokens: measuring the selection of {one.side.name}, ratio {ratio:g}")
            row = self._row(one, ratio, prompt, seen[one.side.name, ratio])
            if row.ratio == 1:
                first = next((other for other in rows if other.ratio == 1), row)
                row = replace(row, agreement=agreement(row.tokens, first.tokens))
            rows.append(row)
        with noted(self.failures, f"tokens, {prompt.visual} visual tokens"):
            check_tokens(rows)
        return rows

    def _row(self, one: Contestant, ratio: float, prompt: Prompt, answers: Sequence[Answer]) -> Row:
        side, count = one.side, self.settings.count
        kept, text = kept_tokens(prompt.visual, ratio), len(prompt.tokens) - prompt.visual

        def median(values: Iterable[float]) -> float:
            return 1000 * statistics.median(values)

        stages = {name: median(answer.stages[name] for answer in answers) for name in answers[0].stages}
        prefill = median(sum(answer.stages.values()) - answer.stages["vision"] for answer in answers)
        stages["host"] = median(answer.first - sum(answer.stages.values()) for answer in answers)
        decode = median(step for answer in answers for step in answer.steps)
        ceilings = self.ceilings[side.device, side.dtype]
        limits = self._workload(side).work(prompt, kept).ideal(ceilings, answers[0].cache_bytes, count)
        ideal = {name: 1000 * seconds for name, seconds in limits.items()}
        measured = {"vision": stages["vision"], "prefill": prefill, "decode": decode}
        return Row(
            side=side.name,
            dtype=side.dtype,
            device=side.device,
            ratio=ratio,
            visual_tokens=prompt.visual,
            kept_tokens=kept,
            text_tokens=text,
            stages=stages,
            prefill=prefill,
            first_token=median(answer.first for answer in answers),
            decode=decode,
            decode_mean=median(statistics.mean(answer.steps) for answer in answers),
            selection=self._selection(one.side, ratio, prompt, prefill, decode),
            ideal=ideal,
            roofline={name: ideal[name] / measured[name] for name in ideal},
            cache_bytes=answers[0].cache_bytes,
            visual_cache_bytes=answers[0].visual_cache_bytes,
            host_bytes=one.memory.host.most,
            device_bytes=one.memory.device.most if one.memory.device is not None else None,
            tokens=answers[-1].tokens,
            agreement=None,
        )

    def _workload(self, side: Side) -> Workload:
        """Of the bundle that a side runs: another may have packed weights."""
        bundle = side.session.bundle if isinstance(side, BundleSide) else self.bundle
        if bundle.folder not in self._workloads:
            self._workloads[bundle.folder] = Workload(bundle)
        return self._workloads[bundle.folder]

    def _selection(
        self, side: Side, ratio: float, prompt: Prompt, prefill: float, decode: float
    ) -> dict[str, float] | None:
        if not isinstance(side, BundleSide) or side.backend.time_selection is None:
            return None
        plan = plan_run(self.bundle.manifest, np.array(prompt.tokens, np.int32), [prompt.picture.grid], 0, ratio)
        found = None
        with noted(self.failures, f"selection of {side.name}, {prompt.visual} visual tokens"):
            found = side.backend.time_selection(side.session, plan, len(prompt.tokens) + self.settings.count)
        if found is None:
            return None
        times = {name: 1000 * seconds for name, seconds in asdict(found).items()}
        share = (times["select"] + times["compact"]) / prefill
        return times | {"share": share, "decode_share": times["decode"] / decode}


def agreement(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    pairs = zip(tokens, others, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(others)))


def check_tokens(rows: Sequence[Row]) -> None:
    """Check that sides that compute in float32 draw the same first tokens with nothing pruned.

    Raises:
        UserError: they draw different ones.
    """
    exact = [row for row in rows if row.ratio == 1 and row.dtype == "float32"]
    for row in exact[1:]:
        if row.tokens[:FIRST_TOKENS] != exact[0].tokens[:FIRST_TOKENS]:
            raise UserError(
                f"{row.side} and {exact[0].side} give different tokens at ratio 1, both in float32. One of them "
                "computes wrong results, so the times cannot be compared: run ivc-check to find out which"
            )
