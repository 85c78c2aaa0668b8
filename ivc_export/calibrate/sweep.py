"""Tries selection layers and ratios on PyTorch, and compares with the unpruned model's own answers."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import PIL.Image
import torch

from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.contract.calibration import ENOUGH, Calibration, MeasuredDecoder, Rival, Trial, propose
from ivc_export.contract.manifest import Manifest, Scored
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import Size, estimate_recipe
from ivc_export.exporter.pipeline import chosen_as_asked, copy_processor_files, make_manifest
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.files import read_json
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.processor import Processor
from ivc_export.selection.method import IVC_PRUNE, Method
from ivc_export.source.configuration import read_configuration, read_description, read_model
from ivc_export.source.hub import open_checkpoint
from ivc_export.verify.oracle import reference_layout, reference_picture
from ivc_export.verify.reference import Reference
from ivc_export.verify.reference_picture import ReferencePicture

PROMPTS = "prompts.json"
MOST_LAYERS = 12
RIVALS = (Method("foreground"), *(Method("random", seed) for seed in range(5)))
"""The methods with which a method is compared."""

Compare = Literal["proposed", "all", "none"]


@dataclass(frozen=True)
class Example:
    """A question about a picture."""

    picture: PIL.Image.Image
    prompt: str


def default_examples() -> Path:
    """The folder of pictures and prompts that come with ivc-export."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "calibration_set", package.parent / "calibration") if folder.is_dir())


def read_examples(folder: Path) -> list[Example]:
    """The examples of a folder: prompts.json is a list of {"picture": FILE, "prompt": TEXT}.

    Raises:
        UserError: the list or a picture is missing or damaged.
    """
    path, advice = folder / PROMPTS, 'write a list of {"picture": FILE, "prompt": TEXT} there'
    try:
        pairs = [(folder / str(entry["picture"]), str(entry["prompt"])) for entry in read_json(path, advice)]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {advice}") from error
    if not pairs:
        raise UserError(f"{path} has no examples: add at least one picture with a prompt")
    return [Example(open_picture(picture), prompt) for picture, prompt in pairs]


def layers_to_try(cuts: range) -> list[int]:
    """All possible selection layers of a model, or 12 of them if there are many, from the first quarter of its layers
    to the last."""
    if len(cuts) <= MOST_LAYERS:
        return list(cuts)
    count = cuts[-1] + 1
    first, last = max(cuts[0], count // 4), count - count // 4
    return sorted({round(first + i * (last - first) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)})


def other_scored(checkpoint: Checkpoint, m: Manifest) -> list[Scored]:
    """The other way to score visual tokens, if the family has a choice."""
    own: Scored = read_model(checkpoint)[1].selection.scored
    both = dict.fromkeys((m.selection.scored, own, "values"))
    return [scored for scored in both if scored != m.selection.scored]


@contextmanager
def prompt_bundle(checkpoint: Checkpoint, scored: Scored | None = None) -> Iterator[Bundle]:
    """A bundle without graphs and weights, by which prompts and pictures are prepared. It also says how tokens are
    scored."""
    recipe = ExportRecipe(checkpoint.folder, Path("unused"), scored=scored)
    configuration = read_configuration(checkpoint, chosen_as_asked(recipe, read_description(checkpoint)))
    configuration.weights.check_floats(checkpoint.place)
    with tempfile.TemporaryDirectory() as folder:
        copy_processor_files(checkpoint, configuration, Path(folder))
        none, cut = dict.fromkeys(GRAPH_NAMES, "0" * 64), configuration.model.decoder.cuts[0]
        yield Bundle(Path(folder), make_manifest(recipe, configuration, configuration.weights, cut, False, (), none))


def calibrate(
    model: Path | str,
    examples: Sequence[Example],
    ratios: Sequence[float],
    layers: Sequence[int] | None = None,
    tokens: int = 16,
    enough: float = ENOUGH,
    progress: Callable[[int, int], None] = lambda done, total: None,
    method: Method = IVC_PRUNE,
    compare: Compare = "proposed",
    scored: Scored | None = None,
) -> Calibration:
    """Propose a layer at the first of `ratios`, and compare the method there with RIVALS.

    If the family or `scored` names anything but the layer's values, the method is also compared with itself under the
    way of scoring that the trials do not use.

    Each example is answered greedily without pruning, up to `tokens` tokens. Then the model runs the same tokens pruned
    at each layer and ratio, and its distributions are compared. Everything is in float32 on the CPU.

    layers: those to try; None takes `layers_to_try`. progress: called with the runs done and their total. method: how
    tokens are chosen. compare: at which layers to compare with other methods, always at the first ratio. scored: how
    visual tokens are scored; None takes the family's way.

    Raises:
        UserError: the checkpoint cannot be loaded, its layers do not give the values to score by, or a layer, ratio or
            example is out of range.
    """
    checkpoint = open_checkpoint(model)
    with prompt_bundle(checkpoint, scored) as bundle:
        m = bundle.manifest
        cuts = m.decoder.cuts
        tried = sorted(set(layers)) if layers else layers_to_try(cuts)
        if not cuts[0] <= tried[0] <= tried[-1] <= cuts[-1]:
            raise UserError(
                f"layers {tried[0]} to {tried[-1]} are out of range: give {cuts[0]} to {cuts[-1]} for this model"
            )
        cases = [Case(ratio, layer, method, m.selection.scored) for ratio in ratios for layer in tried]
        if missing := bundle.missing_processor_files():
            raise UserError(
                f"the checkpoint has no {' and no '.join(missing)}, so prompts cannot be read: put the model's own "
                "files into the checkpoint folder"
            )
        processor = Processor(bundle)
        reference = Reference(checkpoint.folder, 1, 1.0, m.selection, reference_layout(bundle, checkpoint.folder))
        rivals: list[tuple[Method, Scored]]
        rivals = [(rival, m.selection.scored) for rival in RIVALS if rival.name != method.name]
        if method.record.exported_as == m.selection.method:  # otherwise a layer's values are not scored
            rivals += [(method, other) for other in other_scored(checkpoint, m)]
        beside = {"none": 0, "proposed": 1, "all": len(tried)}[compare] * len(rivals)
        runs = len(examples) * (1 + len(cases) + (1 + beside if beside else 0))
        steps = itertools.count(1)

        def measure(cases: Sequence[Case]) -> list[list[Compared]]:
            """What each case gave, example by example."""
            found = []
            for example in examples:
                picture = processor.picture(example.picture)
                prompt = processor.question(example.prompt, [picture])
                given = reference_picture(bundle, picture)
                base = greedy_answer(reference, prompt, given, m.tokens.stop, tokens)
                progress(next(steps), runs)
                compared = []
                for case in cases:
                    compared.append(base.compare(reference, prompt, given, case, m.tokens.image))
                    progress(next(steps), runs)
                found.append(compared)
            return [[compared[i] for compared in found] for i in range(len(cases))]

        answers = measure(cases)
        sizes = sorted((Size(*example.picture.size) for example in examples), key=math.prod)
        size = sizes[len(sizes) // 2]
        trials = []
        for i, (ratio, layer, *_) in enumerate(cases):
            own = answers[i]
            before = answers[i - 1] if layer != tried[0] else []
            overlaps = [len(a.kept & b.kept) / len(a.kept | b.kept) for a, b in zip(own, before, strict=False)]
            recipe = ExportRecipe(checkpoint.folder, Path("unused"), ratio, layer, scored=m.selection.scored)
            (cost,) = estimate_recipe(recipe, [size]).pictures
            trials.append(
                Trial(
                    layer=layer,
                    ratio=ratio,
                    divergence=mean_divergence(own),
                    agreement=same_part(own),
                    overlap=sum(overlaps) / len(overlaps) if overlaps else None,
                    saved=round(cost.saved("prefix", "decoder"), 4),
                )
            )
        layer = propose(trials, ratios[0], enough)
        compared_layers = {"none": [], "proposed": [layer], "all": tried}[compare] if rivals else []
        other_cases = [Case(ratios[0], at, *rival) for at in compared_layers for rival in rivals]
        other_answers = measure(other_cases) if other_cases else []
        return Calibration(
            family=m.family,
            decoder=MeasuredDecoder(layers=m.decoder.layers, hidden_size=m.decoder.hidden_size),
            layer=layer,
            ratio=ratios[0],
            answers=len(examples),
            method=method.name,
            method_seed=method.seed if method.record.drawn else None,
            trials=tuple(trials),
            scored=scored,
            rivals=tuple(gather(other_cases, other_answers, m.selection.scored)),
            versions={name: version(name) for name in ("ivc-export", "torch", "transformers")},
        )


class Case(NamedTuple):
    """One way to prune."""

    ratio: float
    layer: int
    method: Method = IVC_PRUNE
    scored: Scored = "values"


@dataclass(frozen=True)
class Compared:
    """One answer under pruning: divergence in nats for each token, whether all tokens are the same, kept visual
    rows."""

    divergence: float
    same: bool
    kept: frozenset[int]


def mean_divergence(answers: Sequence[Compared]) -> float:
    """The mean divergence, in nats for each token. Rounding can make it negative if nothing is pruned."""
    return max(0.0, sum(answer.divergence for answer in answers) / len(answers))


def same_part(answers: Sequence[Compared]) -> float:
    """The fraction of the answers that are the same."""
    return sum(answer.same for answer in answers) / len(answers)


def gather(cases: Sequence[Case], answers: Sequence[Sequence[Compared]], scored: Scored = "values") -> Iterator[Rival]:
    """One figure for all draws of a method at a layer and ratio. answers: of each case. scored: the way of the
    trials."""
    groups: dict[tuple[str, Scored, int, float], list[Sequence[Compared]]] = {}
    for case, own in zip(cases, answers, strict=True):
        groups.setdefault((case.method.name, case.scored, case.layer, case.ratio), []).append(own)
    for (name, by, layer, ratio), draws in groups.items():
        parts = [[figure(own) for own in draws] for figure in (mean_divergence, same_part)]
        spreads = [statistics.stdev(part) if len(part) > 1 else 0.0 for part in parts]
        yield Rival(
            method=name,
            scored=None if by == scored else by,
            layer=layer,
            ratio=ratio,
            draws=len(draws),
            divergence=statistics.fmean(parts[0]),
            divergence_spread=spreads[0],
            agreement=statistics.fmean(parts[1]),
            agreement_spread=spreads[1],
        )


@dataclass(frozen=True)
class Drawn:
    """An unpruned answer: its tokens, and the log-probabilities [tokens, vocab] before each of them."""

    tokens: list[int]
    logs: torch.Tensor

    def compare(
        self,
        reference: Reference,
        prompt: Sequence[int],
        picture: ReferencePicture,
        case: Case,
        image_token: int,
    ) -> Compared:
        """Run the same tokens with pruning, and compare."""
        reference.restart(case.layer, case.ratio, case.method.name, case.method.seed, case.scored)
        turn = reference.run(prompt, [picture])
        kept = frozenset(row for row in turn.keep_index.tolist() if prompt[row] == image_token)
        logits = [turn.logits, *(reference.run([token]).logits for token in self.tokens[:-1])]
        logs = torch.stack(logits).log_softmax(-1)
        divergence = (self.logs.exp() * (self.logs - logs)).sum(-1).mean()
        return Compared(float(divergence), logs.argmax(-1).tolist() == self.tokens, kept)


def greedy_answer(
    reference: Reference, prompt: Sequence[int], picture: ReferencePicture, stop: Sequence[int], most: int
) -> Drawn:
    """A greedy answer without pruning, with its stop token."""
    reference.restart(1, 1.0)
    turn = reference.run(prompt, [picture])
    tokens, logits = [int(turn.logits.argmax())], [turn.logits]
    while tokens[-1] not in stop and len(tokens) < most:
        turn = reference.run(tokens[-1:])
        logits.append(turn.logits)
        tokens.append(int(turn.logits.argmax()))
    return Drawn(tokens, torch.stack(logits).log_softmax(-1))
