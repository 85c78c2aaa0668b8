"""Records a run of IVC-Prune on PyTorch, so that a bundle can be compared with it where there is no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.recording import Key, Recording, identity
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.checkpoint.weights import EMBEDDING, TABLE
from ivc_export.contract.graphs import SCORED_VALUES, deepstack_names
from ivc_export.contract.manifest import Manifest, SelectionRule
from ivc_export.contract.ratio import check_ratio
from ivc_export.errors import UserError
from ivc_export.families.pictures import Visual
from ivc_export.runtime.processor import prepared
from ivc_export.runtime.videos import Video
from ivc_export.selection.method import Method, find_method
from ivc_export.source.configuration import read_configuration
from ivc_export.verify.dequantised import bundled
from ivc_export.verify.reference import Reference, ReferenceLayout, ReferenceTurn
from ivc_export.verify.reference_picture import ReferencePicture
from ivc_export.verify.routing import MARGIN


def record(
    bundle: Bundle,
    checkpoint: Path,
    tokens: Sequence[int],
    images: Sequence[PIL.Image.Image | Video],
    ratio: float,
    steps: int,
    progress: Callable[[str], None] = lambda stage: None,
    method: Method | None = None,
) -> Recording:
    """Run the checkpoint in float32, on weights rounded to the bundle's dtype: a prefill and `steps` greedy tokens.

    Weights that the export rounded to 4 or 8 bits are taken from the bundle. What rounding costs answers is another
    question.

    tokens: with image tokens. method: None for the bundle's. The tensors have the names of the graphs' outputs in the
    contract.

    Raises:
        UserError: the checkpoint cannot be loaded, or is not the bundle's; ratio or steps are out of range.
    """
    m = bundle.manifest
    if steps < 0:
        raise UserError(f"{steps} decode steps are out of range: give 0 or more")
    check_ratio(ratio)
    method = find_method(m.selection, method)
    check_same_model(bundle, checkpoint)
    progress("opening the checkpoint")
    layout, packed = reference_layout(bundle, checkpoint), bool(m.weight_formats)
    weights, head = rounded_weights(bundle, checkpoint)
    reference = Reference(checkpoint, m.selection_layer, ratio, m.selection, layout, m.dtype, packed, weights, head)
    reference.restart(m.selection_layer, ratio, method.name, method.seed)
    progress("running the prefill in PyTorch")
    pictures = prepared(bundle, images)
    turn = reference.run(tokens, [reference_picture(bundle, p) for p in pictures])
    found = {Key("prefill", graph, "outputs", name): array for (graph, name), array in outputs(turn, m).items()}
    teacher = []
    for number in range(1, steps + 1):
        progress(f"running decode step {number} of {steps} in PyTorch")
        teacher.append(int(turn.logits.argmax()))
        turn = reference.run(teacher[-1:])
        found[Key(f"decode-{number}", "decoder", "outputs", "logits")] = turn.logits[None, None].numpy()
        for layer, margin in turn.margins.items():
            found[Key(f"decode-{number}", "decoder", "outputs", f"{MARGIN}.{layer}")] = margin.numpy()
    facts = {
        "model": identity(m),
        "checkpoint": str(checkpoint),
        "ratio": ratio,
        **method.facts,
        "prompt_tokens": list(tokens),
        "drawn_tokens": teacher,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    return Recording(facts, found)


def outputs(turn: ReferenceTurn, m: Manifest) -> Mapping[tuple[str, str], npt.NDArray[Any]]:
    """The expected outputs of the graphs in this prefill, by graph and name."""
    found: dict[tuple[str, str], torch.Tensor] = {
        ("prefix", "hidden_states"): turn.hidden_states,
        ("prefix", "keep_index"): turn.keep_index.int(),
        ("prefix", "token_score"): turn.token_score,
        ("decoder", "logits"): turn.logits[None, None],
    }
    if isinstance(m.selection, SelectionRule):
        found["prefix", "seed_index"] = turn.seed_index.int()
    if turn.image_embeds is not None:
        found["vision", "image_embeds"] = turn.image_embeds
    found |= {("vision", name): rows for name, rows in zip(deepstack_names(m.decoder), turn.deepstack, strict=False)}
    if m.selection.scored != "values":
        found["prefix", SCORED_VALUES] = turn.scored
    for i, margin in turn.margins.items():
        found["prefix" if i < m.selection_layer else "decoder", f"{MARGIN}.{i}"] = margin
    for i, (key, value) in enumerate(zip(turn.full_keys, turn.full_values, strict=True)):
        found |= {("prefix", f"new_key.{i}"): key, ("prefix", f"new_value.{i}"): value}
    for i, (key, value) in enumerate(zip(turn.keys, turn.values, strict=True)):
        if i in m.selection.whole_layers:  # its rows are the prefix's
            continue
        kept = "compact" if i < m.selection_layer else "new"
        found |= {("decoder", f"{kept}_key.{i}"): key, ("decoder", f"{kept}_value.{i}"): value}
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in found.items()}


def reference_picture(bundle: Bundle, picture: Visual) -> ReferencePicture:
    """The same picture, or video, for transformers."""
    grid = picture.grid
    inputs = families.preparation(bundle.manifest).stock_inputs(picture)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return ReferencePicture(tensors, grid.rows, grid.columns, grid.tile, grid.content, grid.time)


def rounded_weights(bundle: Bundle, checkpoint: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Weights that an export rounded to 4 or 8 bits, as float32 of the same values; see Reference's rounded and
    head."""
    m, opened = bundle.manifest, Checkpoint.open(checkpoint)
    stored = read_configuration(opened).weights.formats
    own = {layer: one.format for layer, one in m.weight_formats.items() if layer not in stored}
    bits = {f"{layer}.weight": int(name.removeprefix("int")) for layer, name in own.items()}
    tensors = {families.of(m.family).canonical_name(name): tensor for name, tensor in opened.tensors.items()}
    packed = bundled(bundle.folder, bits | {TABLE: 8})  # whose rows are filled up
    columns = {name: tensors[EMBEDDING if name == TABLE else name].shape[1] for name in packed}
    found = {name: weight[:, : columns[name]] for name, weight in packed.items()}
    head = found.get(EMBEDDING)
    if m.embedding.packed is None:
        found.pop(EMBEDDING, None)
    elif TABLE in found:
        found[EMBEDDING] = found.pop(TABLE)
    return {tensors[name].name: weight for name, weight in found.items()}, head


def reference_layout(bundle: Bundle, checkpoint: Path) -> ReferenceLayout | None:
    """The checkpoint's layout for transformers, if transformers cannot load the folder."""
    stock, config = families.of(bundle.manifest.family).stock_layout, Checkpoint.open(checkpoint).config
    return (
        ReferenceLayout(stock.config(config, bundle.manifest.tokens.image), partial(stock.tensors, config))
        if stock
        else None
    )


def check_same_model(bundle: Bundle, checkpoint: Path) -> None:
    """Compare the checkpoint's JSON files with the manifest, before anything is loaded.

    Raises:
        UserError: the checkpoint is damaged, or is another model, or its layers are no plain floats.
    """
    configuration, m = read_configuration(Checkpoint.open(checkpoint)), bundle.manifest
    configuration.weights.check_floats(str(checkpoint))
    for what, found, wanted in (
        ("family", configuration.family.model_type, m.family),
        ("decoder", configuration.model.decoder, m.decoder),
        ("rotary embedding", configuration.model.rotary, m.rotary),
        ("image token", configuration.prompts.tokens.image, m.tokens.image),
    ):
        if found != wanted:
            raise UserError(
                f"the {what} of {checkpoint} differs from that of {bundle.folder}: give the checkpoint that was "
                "exported"
            )
