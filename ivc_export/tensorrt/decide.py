"""Decides the softmax and the attention of engines, and says before a build what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from rich.filesize import decimal

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.tensorrt.footprint import Footprint, estimate, shortage
from ivc_export.tensorrt.graphs import EngineChoices, EngineGraphs, graph_to_count, packed_weights
from ivc_export.tensorrt.recipe import EngineRecipe

CHOOSABLE: tuple[EngineGraphs, ...] = ("native", "opset-21")
"""Lowerings in which decoder layers may have either kind of attention."""


class Decision(NamedTuple):
    """What is built, the memory that it takes, and sentences that say what was chosen and what it costs."""

    choices: EngineChoices
    footprint: Footprint
    sentences: tuple[str, ...]


def decide(bundle: Bundle, recipe: EngineRecipe, choices: EngineChoices) -> Decision:
    """Choose the decoder's attention by memory, if the recipe leaves it open.

    choices: as `graphs.choose_graphs` makes them.
    """
    models = {name: graph_to_count(bundle, name, choices) for name in GRAPH_NAMES}

    def footprint(one: EngineChoices) -> Footprint:
        return estimate(bundle, recipe, one, models)

    why = "as asked"
    if recipe.attention == "auto" and choices.graphs in CHOOSABLE:
        lacking = shortage(footprint(choices), recipe)
        repeated = replace(choices, attention="repeated")
        if lacking is None:
            why = "which fits"
        elif footprint(repeated).running < footprint(choices).running:
            why, choices = f"because with grouped attention {lacking.split(':')[0]}", repeated
        else:
            why = "and repeated needs no less memory"
    packed = packed_sentences(bundle, choices, footprint(choices))
    sentences = (softmax_sentence(choices, footprint), attention_sentence(choices, footprint, why), *packed)
    return Decision(choices, footprint(choices), sentences)


def packed_sentences(bundle: Bundle, choices: EngineChoices, found: Footprint) -> tuple[str, ...]:
    """Sentences on layers in 4 or 8 bits in engines. Empty if there are none."""
    size = decimal(found.weights)
    return tuple(
        f"weights: {kind} layers {'stay' if kind == built else 'become'} {built}, about {size} for all weights"
        for kind, built in packed_weights(bundle, choices.graphs, choices.dtype).items()
    )


def softmax_sentence(choices: EngineChoices, footprint: Callable[[EngineChoices], Footprint]) -> str:
    """The dtype of the vision encoder's softmax, and what the other dtype would cost."""
    text = f"vision: softmax in {choices.softmax}, about {decimal(footprint(choices).activations['vision'])}"
    if choices.dtype != "float16":
        return text
    other = replace(choices, softmax="float32" if choices.softmax == "float16" else "float16")
    return f"{text} (--softmax {other.softmax}: {decimal(footprint(other).activations['vision'])})"


def attention_sentence(choices: EngineChoices, footprint: Callable[[EngineChoices], Footprint], why: str) -> str:
    """How decoder layers compute attention, why, and what the other way would cost."""
    if choices.graphs not in CHOOSABLE:
        fused = "by our plugin" if choices.graphs == "plugin" else "by one operator, which TensorRT fuses"
        how = fused if choices.attention == "operator" else choices.attention
        return f"decoder: attention {how}, about {decimal(decoder(footprint(choices)))}"
    other = replace(choices, attention="repeated" if choices.attention == "grouped" else "grouped")
    pace = {"grouped": "slower prefill, faster steps", "repeated": "faster prefill, slower steps"}[other.attention]
    return (
        f"decoder: attention {choices.attention}, {why}, about {decimal(decoder(footprint(choices)))} "
        f"(--attention {other.attention}: {decimal(decoder(footprint(other)))}, {pace})"
    )


def decoder(found: Footprint) -> int:
    """Activations of the larger of the two graphs with decoder layers."""
    return max(found.activations["prefix"], found.activations["decoder"])
