"""A bundle against PyTorch: every tensor that passes between the graphs, and the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from ivc_export import families
from ivc_export.bundle import Bundle
from ivc_export.checkpoint import Checkpoint
from ivc_export.configuration import read_configuration
from ivc_export.errors import UserError
from ivc_export.families import Picture
from ivc_export.reference import Reference, ReferenceLayout, ReferencePicture, ReferenceTurn
from ivc_export.runtime.conversation import Conversation, Step
from ivc_export.runtime.session import OnnxSession

TOLERANCE: dict[str, tuple[float, str]] = {
    "image_embeds": (1e-4, "order of summation; 2e-6 measured on small models"),
    "hidden_states": (1e-4, "order of summation; 3e-6 measured on small models"),
    "keys and values": (1e-4, "order of summation; 3e-6 measured on small models"),
    "token_score": (1e-6, "probabilities, absolute; 1e-8 measured on small models"),
    "logits": (1e-4, "order of summation; 16 steps measured at 2e-5"),
}
"""Largest error in float32, and why. Errors are relative to the reference's largest magnitude where that exceeds 1."""


@dataclass(frozen=True)
class Comparison:
    """One line of the report; `error` and `tolerance` are None for what is compared by equality."""

    name: str
    error: float | None
    tolerance: float | None
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one check."""

    bundle: str
    reference: str
    backend: str
    ratio: float
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


def largest_error(found: npt.NDArray[Any], wanted: torch.Tensor) -> float:
    """Largest absolute error, relative to the reference's largest magnitude where that exceeds 1."""
    reference = wanted.numpy()
    if found.shape != reference.shape:
        return float("inf")
    error = float(np.abs(found - reference).max(initial=0) / max(1.0, float(np.abs(reference).max(initial=0))))
    return error if np.isfinite(error) else float("inf")


def close(name: str, kind: str, pairs: Sequence[tuple[npt.NDArray[Any], torch.Tensor]]) -> Comparison:
    """Compare pairs of tensors by the tolerance of `kind`."""
    tolerance = TOLERANCE[kind][0]
    error = max(largest_error(found, wanted) for found, wanted in pairs)
    if not np.isfinite(error):
        return Comparison(name, None, tolerance, False, "another shape, or not finite")
    return Comparison(name, error, tolerance, error <= tolerance)


def same_rows(
    found: npt.NDArray[np.int32],
    wanted: npt.NDArray[np.int32],
    visual: npt.NDArray[np.int32],
    score: npt.NDArray[np.float32],
    error: float,
) -> Comparison:
    """Compare keep_index exactly; visual rows exchanged for others whose scores differ within the error are a tie.

    visual: rows that hold visual tokens; score: the reference's, of each; error: measured between the two scores,
    and no more than the tolerance of scores counts.
    """
    if np.array_equal(found, wanted):
        return Comparison("keep_index", None, None, True, f"{len(found)} rows, equal")
    flipped = np.setxor1d(found, wanted)
    note = f"{len(found)} rows against {len(wanted)}, {len(flipped)} in one only"
    exchanged = len(found) == len(wanted) and bool(np.all(np.diff(found) > 0)) and bool(np.isin(flipped, visual).all())
    if exchanged:
        gap = float(np.ptp(score[np.isin(visual, flipped)]))
        if gap <= 2 * min(error, TOLERANCE["token_score"][0]):
            return Comparison("keep_index", None, None, True, f"{note}, their scores {gap:.1e} apart: a tie")
        note += f", their scores {gap:.1e} apart"
    return Comparison("keep_index", None, None, False, note)


def synthetic_prompt(bundle: Bundle, seed: int = 0) -> tuple[list[int], list[Picture]]:
    """A seeded prompt that needs no tokenizer: random text around one picture of noise, 336 x 280 pixels."""
    m, generator = bundle.manifest, np.random.default_rng(seed)
    noise = PIL.Image.fromarray(generator.integers(0, 256, (280, 336, 3), np.uint8))
    picture = families.of(m.family).picture(noise, m.preprocessing)
    before, behind = ([t] if t is not None else [] for t in (m.tokens.vision_start, m.tokens.vision_end))
    special = [m.tokens.image, *before, *behind, *m.tokens.stop]
    words = np.setdiff1d(generator.integers(0, m.decoder.vocab_size, 64), special).tolist()
    image = [*before, *[m.tokens.image] * picture.grid.visual, *behind]
    return [*words[:20], *image, *words[20:]], [picture]


def reference_picture(bundle: Bundle, picture: Picture) -> ReferencePicture:
    """The same picture for transformers."""
    m = bundle.manifest
    inputs = families.of(m.family).stock_inputs(picture, m.preprocessing)
    return ReferencePicture({name: torch.from_numpy(array) for name, array in inputs.items()}, *picture.grid)


def reference_layout(bundle: Bundle, checkpoint: Path) -> ReferenceLayout | None:
    """The checkpoint's layout for transformers, where it cannot load the folder."""
    stock, config = families.of(bundle.manifest.family).stock_layout, Checkpoint.open(checkpoint).config
    return ReferenceLayout(stock.config(config), partial(stock.tensors, config)) if stock else None


def check(
    bundle: Bundle,
    checkpoint: Path,
    prompt: tuple[Sequence[int], Sequence[Picture]] | None = None,
    ratio: float | None = None,
    steps: int = 8,
    progress: Callable[[str], None] = lambda stage: None,
) -> ParityReport:
    """Compare a bundle on onnxruntime with the checkpoint on PyTorch, in float32.

    The prefix graph's choice is compared first; the decoder then runs on the reference's choice, and decode steps on
    the reference's tokens, so that one difference does not hide the others.

    prompt: token ids and pictures; None takes a seeded random one. ratio: None takes the bundle's default.

    Raises:
        UserError: the checkpoint cannot be loaded, or is not the bundle's.
    """
    m = bundle.manifest
    if steps < 0:
        raise UserError(f"{steps} decode steps cannot be compared: give 0 or more")
    check_same_model(bundle, checkpoint)
    tokens, pictures = prompt or synthetic_prompt(bundle)
    progress("opening both models")
    conversation = Conversation(OnnxSession(bundle), ratio)
    layout = reference_layout(bundle, checkpoint)
    reference = Reference(checkpoint, m.selection_layer, conversation.ratio, m.selection, layout)
    progress("prefill")
    turn = reference.run(tokens, [reference_picture(bundle, picture) for picture in pictures])
    step = conversation.run(tokens, pictures, keep_index=turn.keep_index.numpy().astype(np.int32))
    comparisons = compare_prefill(step, turn, m.selection_layer)
    kept = int(np.isin(step.keep_index, step.run.visual_index).sum()) if pictures else 0
    for number in range(steps):
        progress(f"decode step {number + 1} of {steps}")
        teacher = [int(turn.logits.argmax())]
        turn, step = reference.run(teacher), conversation.run(teacher)
        comparisons.append(close(f"logits of decode step {number + 1}", "logits", [(step.logits, turn.logits)]))
    visual = sum(picture.grid.visual for picture in pictures)
    return ParityReport(
        bundle=str(bundle.folder),
        reference=str(checkpoint),
        backend="onnxruntime-cpu",
        ratio=conversation.ratio,
        visual_tokens=visual,
        kept_tokens=kept,
        comparisons=tuple(comparisons),
        versions={name: version(name) for name in ("onnxruntime", "torch", "transformers")},
    )


def check_same_model(bundle: Bundle, checkpoint: Path) -> None:
    """Compare what the checkpoint's JSON files say with the manifest, before anything is loaded.

    Raises:
        UserError: the checkpoint is damaged, or is another model.
    """
    configuration, m = read_configuration(Checkpoint.open(checkpoint)), bundle.manifest
    for what, found, wanted in (
        ("family", configuration.family.model_type, m.family),
        ("decoder", configuration.model.decoder, m.decoder),
        ("rotary embedding", configuration.model.rotary, m.rotary),
        ("image token", configuration.tokens.image, m.tokens.image),
    ):
        if found != wanted:
            raise UserError(
                f"{checkpoint} has another {what} than {bundle.folder}: name the checkpoint that was exported"
            )


def compare_prefill(step: Step, turn: ReferenceTurn, cut: int) -> list[Comparison]:
    """Everything that passes between the graphs in one prefill."""
    prefix, decoder = step.prefix, step.decoder
    found = []
    if turn.image_embeds is not None:
        found.append(close("image_embeds", "image_embeds", [(np.concatenate(step.image_embeds), turn.image_embeds)]))
    for i, (key, value) in enumerate(zip(turn.full_keys, turn.full_values, strict=True)):
        pairs = [(prefix[f"new_key.{i}"], key), (prefix[f"new_value.{i}"], value)]
        found.append(close(f"keys and values of layer {i}", "keys and values", pairs))
    found.append(
        close(f"hidden_states before layer {cut}", "hidden_states", [(prefix["hidden_states"], turn.hidden_states)])
    )
    scores = close("token_score", "token_score", [(prefix["token_score"], turn.token_score)])
    found.append(scores)
    wanted = turn.keep_index.numpy()
    score = turn.token_score.numpy()
    found.append(same_rows(prefix["keep_index"], wanted, step.run.visual_index, score, scores.error or 0.0))
    compacted = [
        (decoder[f"compact_{kind}.{i}"], (turn.keys if kind == "key" else turn.values)[i])
        for i in range(cut)
        for kind in ("key", "value")
        if f"compact_{kind}.{i}" in decoder
    ]
    if compacted:
        found.append(close(f"compacted keys and values below layer {cut}", "keys and values", compacted))
    for i in range(cut, len(turn.keys)):
        pairs = [(decoder[f"new_key.{i}"], turn.keys[i]), (decoder[f"new_value.{i}"], turn.values[i])]
        found.append(close(f"keys and values of layer {i}", "keys and values", pairs))
    found.append(close("logits of prefill", "logits", [(step.logits, turn.logits)]))
    return found
