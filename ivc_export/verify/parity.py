"""Compares a bundle with a recorded run of its checkpoint: logits, and every tensor between the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.recording import Recording, identity
from ivc_export.contract.graphs import SCORED_VALUES, TensorName, deepstack_names, scored_name
from ivc_export.contract.manifest import Manifest, SelectionRule
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.runtime.backends import BACKENDS, find_backend
from ivc_export.runtime.interface import Session, Step, image_rows
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.plan import Run
from ivc_export.runtime.processor import prepared
from ivc_export.runtime.videos import Video
from ivc_export.selection.fastv import select_by_score
from ivc_export.selection.ivc_prune import Selected, select, text_votes
from ivc_export.selection.method import METHODS, Method
from ivc_export.verify.routing import MARGIN, RoutingTie, earliest, first_tie, margins_of, prompt_tie
from ivc_export.verify.testdata import draw_picture, make_prompt

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """One line of the report. `error` and `tolerance` are None if equality is compared."""

    name: str
    error: float | None
    tolerance: float | None
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one check. model: see recording.identity."""

    bundle: str
    reference: str
    model: dict[str, Any]
    backend: str
    dtype: FloatName
    ratio: float
    method: str
    method_seed: int | None
    visual_tokens: int
    kept_tokens: int
    comparisons: tuple[Comparison, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(comparison.passed for comparison in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"passed": self.passed}


def check(bundle: Bundle, checkpoint: Path, ratio: float | None = None, steps: int = 8) -> ParityReport:
    """Compare a bundle on onnxruntime with its checkpoint on PyTorch, both in float32, with a built-in prompt.

    ratio: None takes the bundle's default.

    Raises:
        UserError: see oracle.record and compare.
    """
    from ivc_export.verify.oracle import record  # this needs torch; comparing alone does not

    image = draw_picture()
    _, tokens, _ = make_prompt(bundle, image)
    ratio = bundle.manifest.default_ratio if ratio is None else ratio
    return compare(OnnxSession(bundle), record(bundle, checkpoint, tokens, [image], ratio, steps), [image])[0]


def compare(
    session: Session,
    reference: Recording,
    images: Sequence[PIL.Image.Image | Video] = (),
    progress: Callable[[str], None] = lambda stage: None,
) -> tuple[ParityReport, Step]:
    """Compare a bundle with a recorded run of the same prompt and pictures. Returns the bundle's prefill too.

    The prefix graph's choice is compared first. Then the decoder runs on the reference's choice, and decode steps run
    on the reference's tokens. So one difference does not hide the others.

    reference: see oracle.record.

    Raises:
        UserError: the recorded run is of another model, or damaged, or this backend's precision is not known.
    """
    bundle, m, facts = session.bundle, session.bundle.manifest, reference.facts
    if facts["model"] != identity(m):
        raise UserError(
            f"the stored run is not a run of {bundle.folder}: check the bundle against its checkpoint on a machine "
            "with torch"
        )
    check_recording(reference, m, len(facts["drawn_tokens"]), bool(images))
    tolerance = find_tolerances(session)
    pictures = prepared(bundle, images)
    progress("prefill")
    conversation = session.converse(facts["ratio"], method=recorded_method(facts))
    keep_index = reference.of("prefill", "prefix")["keep_index"]
    prefill = conversation.run(facts["prompt_tokens"], pictures, keep_index)
    comparisons = compare_prefill(prefill, reference, m, tolerance)
    tie = prompt_tie(reference, tolerance["routing"])
    for number, token in enumerate(facts["drawn_tokens"], 1):
        progress(f"running decode step {number} of {len(facts['drawn_tokens'])}")
        step = conversation.run([token])
        recorded = reference.of(f"decode-{number}", "decoder")
        tie = tie or first_tie(margins_of(recorded), m.decoder.layers, tolerance["routing"])
        pair = (step.logits, recorded["logits"][0, 0])
        comparisons.append(behind(close(f"logits of decode step {number}", tolerance["logits"], [pair]), tie))
    report = ParityReport(
        bundle=str(bundle.folder),
        reference=facts["checkpoint"],
        model=identity(m),
        backend=session.backend,
        dtype=session.dtype,
        ratio=conversation.ratio,
        method=recorded_method(facts).name,
        method_seed=facts.get("method_seed"),
        visual_tokens=sum(picture.grid.visual for picture in pictures),
        kept_tokens=int(np.isin(keep_index, prefill.run.visual_index).sum()) if pictures else 0,
        comparisons=tuple(comparisons),
        versions={**m.versions, **session.versions, **facts["versions"]},
    )
    return report, prefill


def recorded_method(facts: Mapping[str, Any]) -> Method:
    """The method of a recorded run. Recordings of earlier versions do not name it."""
    return Method(facts.get("method", "ivc-prune"), facts.get("method_seed") or 0)


def check_recording(reference: Recording, m: Manifest, steps: int, pictures: bool) -> None:
    """Check that a recorded run has everything that `compare` compares, in possible shapes.

    Raises:
        UserError: it has not.
    """
    named = {(graph, t.name): t for graph in ("prefix", "decoder") for t in m.graphs[graph].outputs}
    wanted = {key for key in named if TensorName.of(key[1]).role == "new"} | {("decoder", "logits")}
    wanted |= {("prefix", name) for name in ("hidden_states", *METHODS[m.selection.method].operator.outputs)}
    wanted |= {("prefix", scored_name(m.selection, m.selection_layer))}
    found = {(key.graph, key.name): a for key, a in reference.tensors.items() if key[::2] == ("prefill", "outputs")}
    problem = next((f"{graph}'s {name} is missing" for graph, name in sorted(wanted - {*found})), None)
    for name in seen(m):
        if pictures != (("vision", name) in found):
            problem = f"{name} and the number of pictures do not match"
    for (graph, name), array in found.items():
        if TensorName.of(name).stem == MARGIN:
            row = array.ndim == 1 and np.issubdtype(array.dtype, np.floating)
            problem = problem if row else f"{name} has the wrong shape"
            continue
        info = named.get((graph, name))
        shape = info.shape if info else ("rows", m.decoder.hidden_size)
        known = info is not None or (graph == "vision" and name in seen(m))
        axes = zip(shape, array.shape, strict=False)
        integers = info is not None and info.dtype == "int32"
        if not known or len(shape) != array.ndim or any(a != b for a, b in axes if not isinstance(a, str)):
            problem = f"{graph}'s {name} has the wrong shape"
        elif integers != np.issubdtype(array.dtype, np.integer):
            problem = f"{graph}'s {name} has the wrong dtype"
    for number in range(1, steps + 1):
        logits = reference.of(f"decode-{number}", "decoder").get("logits")
        if logits is None or logits.shape != (1, 1, m.decoder.vocab_size):
            problem = f"step {number} has no logits"
    if problem is None:
        rows, choice = found["prefix", "hidden_states"].shape[1], found["prefix", "keep_index"]
        if rows < 1 or len(choice) < 1 or choice[0] < 0 or choice[-1] >= rows or (np.diff(choice) <= 0).any():
            problem = "keep_index does not hold ascending rows"
    if problem:
        raise UserError(f"the stored run is damaged ({problem}): run ivc-check --against again")


def seen(m: Manifest) -> list[str]:
    """Outputs of vision with a row for each visual token."""
    return ["image_embeds", *deepstack_names(m.decoder)]


def find_tolerances(session: Session) -> dict[str, float]:
    """The largest allowed errors for a session, by kind of tensor.

    Raises:
        UserError: this backend's precision is not known.
    """
    known = find_backend(session.backend).tolerances
    if session.dtype not in known:
        measured = ", ".join(f"{name} in {dtype}" for name, one in BACKENDS.items() for dtype in one.tolerances)
        what = f"no tolerance has been measured for {session.backend} in {session.dtype}"
        raise UserError(f"{what}: check on one of these: {measured}")
    return {kind: bound for kind, (bound, _) in known[session.dtype].errors.items()}


def compare_prefill(step: Step, reference: Recording, m: Manifest, tolerance: Mapping[str, float]) -> list[Comparison]:
    """Compare everything that passes between the graphs in one prefill."""
    cut, found = m.selection_layer, []
    vision, wanted = reference.of("prefill", "vision"), reference.of("prefill", "prefix")
    if vision:
        for name in seen(m):
            pair = (np.concatenate(image_rows(step.vision, name)), vision[name])
            found.append(close(name, tolerance["image_embeds"], [pair]))

    margins, close_enough = margins_of(wanted), tolerance["routing"]

    def layers(
        title: str,
        names: Sequence[str],
        graph: Mapping[str, Array],
        oracle: Mapping[str, Array],
        tie: RoutingTie | None,
        kind: str = "keys and values",
    ) -> Comparison:
        pairs = [(graph[name], oracle[name]) for name in names]
        found = close(title, tolerance[kind], pairs)
        if tie is not None:  # rows before it must be correct
            rows = close(title, tolerance[kind], [(a[..., : tie.row, :], b[..., : tie.row, :]) for a, b in pairs])
            found = behind(found, tie if rows.passed else None)
        return found

    for i in range(cut):
        names, tie = (f"new_key.{i}", f"new_value.{i}"), first_tie(margins, i, close_enough)
        found.append(layers(f"keys and values of layer {i}", names, step.prefix, wanted, tie))
    tie = first_tie(margins, cut, close_enough)
    title = f"hidden_states before layer {cut}"
    found.append(layers(title, ["hidden_states"], step.prefix, wanted, tie, "hidden_states"))
    scoring = first_tie(margins, cut - 1, close_enough)
    if SCORED_VALUES in wanted:
        found.append(layers("what visual tokens are scored by", [SCORED_VALUES], step.prefix, wanted, scoring))
    found += compare_selection(step, wanted, m, tolerance, scoring)
    keep_index, wanted = wanted["keep_index"], reference.of("prefill", "decoder")
    kept = tie and tie.among(keep_index)
    if compact := [name for name in wanted if TensorName.of(name).role == "compact"]:
        found.append(layers(f"compacted keys and values below layer {cut}", compact, step.decoder, wanted, kept))
    margins = margins_of(wanted)
    for i in range(cut, m.decoder.layers):
        names, tie = (f"new_key.{i}", f"new_value.{i}"), earliest([kept, first_tie(margins, i, close_enough)])
        found.append(layers(f"keys and values of layer {i}", names, step.decoder, wanted, tie))
    logits = close("logits of prefill", tolerance["logits"], [(step.logits, wanted["logits"][0, 0])])
    return [*found, behind(logits, prompt_tie(reference, close_enough))]


def behind(found: Comparison, tie: RoutingTie | None) -> Comparison:
    """Let a comparison pass that fails after a tie of experts, if its values are finite."""
    if found.passed or tie is None or (found.error is None and found.tolerance is not None):
        return found
    note = f"{found.note}; {tie}" if found.note else str(tie)
    return replace(found, passed=True, error=None, tolerance=None, note=note)


def compare_selection(
    step: Step, wanted: Mapping[str, Array], m: Manifest, tolerance: Mapping[str, float], tie: RoutingTie | None
) -> list[Comparison]:
    """Compare the choice twice: with NumPy on the graph's own values, and with the reference.

    In reduced precision, near-ties may be decided differently than in the reference. The first comparison does not
    depend on precision, so a wrong index cannot pass as a tie.

    tie: of experts, in the layers before the scores.
    """
    if not isinstance(m.selection, SelectionRule):
        scores, own_rows, *others = compare_ranking(step, wanted, tolerance["token_score"])
        return [behind(scores, tie), own_rows, *(behind(one, tie) for one in others)]
    name, run = scored_name(m.selection, m.selection_layer), step.run
    own, values = step.prefix[name][0], wanted[name][0]
    reference = Selected(*(wanted[key] for key in ("keep_index", "token_score", "seed_index")))
    in_numpy, suffix = choose(own, run, m.selection), ", of the graph's own values"
    others = compare_choice(step, own, values, reference, m.selection, tolerance["token_score"], "")
    exact = compare_choice(step, own, own, in_numpy, m.selection, tolerance["selection"], suffix)
    return [*exact, *(behind(one, tie) for one in others)]


def compare_ranking(step: Step, wanted: Mapping[str, Array], tolerance: float) -> list[Comparison]:
    """Compare the choice of a method that ranks tokens by scores alone: the graph's exactly, and the reference's."""
    run, score, name = step.run, step.prefix["token_score"], "keep_index, of the graph's own scores"
    scores = close("token_score", tolerance, [(score, wanted["token_score"])])
    if score.shape != run.visual_index.shape or score.shape != wanted["token_score"].shape:
        return [scores]
    own = select_by_score(score, run.visual_index, run.text_index, run.keep_count)
    found, all_tokens = step.prefix["keep_index"], np.arange(len(score), dtype=np.int32)
    rows = (found, wanted["keep_index"], run.visual_index, wanted["token_score"], all_tokens)
    return [
        scores,
        same_rows(name, found, own.keep_index, run.visual_index, score, all_tokens[:0], 0.0),
        same_rows("keep_index", *rows, min(tolerance, scores.error or 0.0)),
    ]


def choose(values: Floats, run: Run, rule: SelectionRule, seed_index: Ints | None = None) -> Selected:
    """The choice in NumPy by `values` [kv_heads, S, value_dim], with the given seeds or its own."""
    rows = (run.visual_index, run.text_index, run.query_index)
    return select(values, run.ivc_priority, *rows, run.keep_count, rule, run.tiles, seed_index)


def compare_choice(
    step: Step,
    own: Floats,
    values: Floats,
    wanted: Selected,
    rule: SelectionRule,
    tolerance: float,
    suffix: str,
) -> list[Comparison]:
    """Compare seeds, scores and kept rows with those `wanted`.

    own: the values that the graph scores; values: those by which `wanted` was chosen; both [kv_heads, S, value_dim]. If
    seeds tie, those of the graph are replayed on `values`, because their votes are in every score.
    """
    run, seeds, score = step.run, step.prefix["seed_index"], step.prefix["token_score"]
    shapes = (seeds.shape, score.shape) == (wanted.seed_index.shape, wanted.token_score.shape)
    if not shapes or own.shape != values.shape or not np.isin(seeds, np.arange(len(score))).all():
        note = "the shape differs, or there is a seed outside the visual tokens"
        return [Comparison(f"seed_index{suffix}", None, None, False, note)]
    replayed = choose(values, run, rule, seeds)
    rows = (run.visual_index, run.text_index, run.query_index)
    text = [text_votes(v, *rows, rule, run.tiles) for v in (own, values)]
    error = min(tolerance, max(largest(text[0] - text[1]), largest(score - replayed.token_score)))
    found = same_seeds(f"seed_index{suffix}", seeds, wanted.seed_index, text[1], error)
    oracle = wanted if np.array_equal(seeds, wanted.seed_index) else replayed
    scores = close(f"token_score{suffix}", tolerance, [(score, oracle.token_score)])
    free = np.setdiff1d(np.flatnonzero(run.ivc_priority == 0), seeds)
    kept = (step.prefix["keep_index"], oracle.keep_index, run.visual_index, oracle.token_score)
    return [found, scores, same_rows(f"keep_index{suffix}", *kept, free, min(tolerance, scores.error or 0.0))]


def same_seeds(name: str, found: Ints, wanted: Ints, score: Floats, error: float) -> Comparison:
    """Compare seeds in their order. Another seed in a place is a tie if both scores differ by no more than the error.

    score: the text's votes, which rank the seeds, by the reference; error: measured between them and the graph's. If no
    score is off by more, the i-th best of one side is within twice that of the i-th best of the other.
    """
    if np.array_equal(found, wanted):
        return Comparison(name, None, None, True, f"{counted(len(found), 'seed')}, equal")
    gap = largest(score[found] - score[wanted])
    note = f"{int((found != wanted).sum())} of {counted(len(found), 'seed')} differ, their scores {gap:.1e} apart"
    tied = gap <= 2 * error and len(np.unique(found)) == len(found)
    return Comparison(name, None, None, tied, f"{note}: a tie" if tied else note)


def same_rows(
    name: str, found: Ints, wanted: Ints, visual: Ints, score: Floats, free: Ints, error: float
) -> Comparison:
    """Compare keep_index exactly. Visual rows that are exchanged for others with scores within the error are a tie.

    visual: rows of visual tokens; score: the reference's, of each; free: the tokens about which scores decide, neither
    seeds nor IVC tokens, as positions within visual_index; error: measured between the two scores.
    """
    if np.array_equal(found, wanted):
        return Comparison(name, None, None, True, f"{len(found)} rows, equal")
    flipped = np.setxor1d(found, wanted)
    note = f"{len(found)} rows against {len(wanted)}, {len(flipped)} in one only"
    exchanged = len(found) == len(wanted) and bool(np.all(np.diff(found) > 0))
    if exchanged and bool(np.isin(flipped, visual[free]).all()):
        gap = float(np.ptp(score[np.isin(visual, flipped)]))
        tied = gap <= 2 * error
        note += f", their scores {gap:.1e} apart{': a tie' if tied else ''}"
        return Comparison(name, None, None, tied, note)
    return Comparison(name, None, None, False, note)


def close(name: str, tolerance: float, pairs: Sequence[tuple[Array, Array]]) -> Comparison:
    """Compare pairs of tensors: found and wanted."""
    error = max(largest_error(found, wanted) for found, wanted in pairs)
    if not np.isfinite(error):
        return Comparison(name, None, tolerance, False, "the shape differs, or there are NaN or infinite values")
    return Comparison(name, error, tolerance, error <= tolerance)


def largest_error(found: Array, wanted: Array) -> float:
    """The largest absolute error, relative to the reference's largest magnitude if that exceeds 1."""
    if found.shape != wanted.shape:
        return float("inf")
    error = largest(found - wanted) / max(1.0, largest(wanted))
    return error if np.isfinite(error) else float("inf")


def largest(array: Array) -> float:
    """The largest magnitude; 0 if there are no values."""
    return float(np.abs(array).max(initial=0))


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
