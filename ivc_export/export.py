"""The export, top to bottom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from pydantic import ValidationError

from ivc_export import __version__, contract, families
from ivc_export.bundle import CHAT_TEMPLATE, TOKENIZER, Bundle, staged_folder
from ivc_export.checkpoint import Checkpoint
from ivc_export.decoder import decoder_graph
from ivc_export.errors import UserError
from ivc_export.families import Family, Model
from ivc_export.prefix import prefix_graph
from ivc_export.recipe import ExportRecipe
from ivc_export.vision import vision_graph
from ivc_export.weights import FOLDER, Weights, copy_weights, main_dtype

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, and how much of how much of it is done."""


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def export(recipe: ExportRecipe, progress: Progress = silent) -> Bundle:
    """Turn a checkpoint into a bundle of three graphs. Nothing is visible at `recipe.output` until all of it is there.

    Raises:
        UserError: whatever the user can mend.
    """
    checkpoint = Checkpoint.open(recipe.model)
    family = families.of(checkpoint.config.get("model_type"))
    model = read_model(checkpoint, family)
    layer, calibrated = selection_layer(recipe, family, model)
    weights = canonical_weights(checkpoint, family)
    with staged_folder(recipe.output, recipe.force) as folder:
        graphs: dict[contract.GraphName, ir.Model] = {
            "vision": vision_graph(family, model, weights),
            "prefix": prefix_graph(model, weights, layer),
            "decoder": decoder_graph(model, weights, layer),
        }
        for number, (name, graph) in enumerate(graphs.items(), 1):
            save_graph(graph, folder / f"{name}.onnx")
            progress("graphs", number, len(graphs))
        total = sum(file.stat().st_size for file in checkpoint.weight_files)
        done = 0

        def copied(count: int) -> None:
            nonlocal done
            done += count
            progress("weights", done, total)

        files = copy_weights(checkpoint, folder, copied)
        copy_processor_files(checkpoint, folder)
        embedding = weights.find("model.embed_tokens.weight", (model.decoder.vocab_size, model.decoder.hidden_size))
        manifest = contract.Manifest(
            schema_version=contract.SCHEMA_VERSION,
            family=family.model_type,
            dtype=weights.dtype,
            lowering="portable",
            selection_layer=layer,
            calibrated=calibrated,
            default_ratio=recipe.ratio,
            max_visual=recipe.max_visual,
            decoder=model.decoder,
            rotary=model.rotary,
            selection=model.selection,
            preprocessing=capped(model.preprocessing, recipe.max_visual),
            tokens=contract.SpecialTokens(
                image=model.image_token,
                vision_start=model.vision_start_token,
                vision_end=model.vision_end_token,
                stop=stop_tokens(checkpoint),
            ),
            graphs={name: model.graph_info(name, weights.dtype, layer) for name in contract.GRAPH_NAMES},
            embedding=contract.EmbeddingTable(
                file=f"{FOLDER}/{embedding.file.name}",
                offset=embedding.offset,
                dtype=weights.dtype,
                shape=(model.decoder.vocab_size, model.decoder.hidden_size),
            ),
            weights=files,
            versions={"ivc-export": __version__, "onnx": version("onnx"), "onnx-ir": version("onnx-ir")},
        )
        (folder / contract.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        progress("done", 1, 1)
    return Bundle.load(recipe.output)


def read_model(checkpoint: Checkpoint, family: Family) -> Model:
    """The checkpoint's configuration, digested.

    Raises:
        UserError: a value is missing or out of range.
    """
    try:
        return family.read(checkpoint.config, processor_config(checkpoint))
    except (ValidationError, TypeError, AttributeError) as error:
        problem = contract.first_problem(error)
        raise UserError(f"config.json does not describe a model ({problem}): give the checkpoint's own file") from error


def selection_layer(recipe: ExportRecipe, family: Family, model: Model) -> tuple[int, bool]:
    """The layer to cut at, and whether it is calibrated.

    Raises:
        UserError: the recipe's layer is not within the model.
    """
    default, last = family.default_layer(model.decoder), model.decoder.layers - 1
    if recipe.layer is None:
        return default.layer, default.calibrated
    if not 1 <= recipe.layer <= last:
        raise UserError(
            f"layer {recipe.layer} is out of range: this model has {model.decoder.layers} layers, "
            f"so --layer takes 1 to {last} (its default is {default.layer})"
        )
    return recipe.layer, default.calibrated and recipe.layer == default.layer


def canonical_weights(checkpoint: Checkpoint, family: Family) -> Weights:
    """The checkpoint's tensors under our names."""
    tensors = {family.canonical_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    return Weights(tensors, main_dtype(tensors))


def capped(preprocessing: contract.Preprocessing, max_visual: int) -> contract.Preprocessing:
    """Lower max_pixels so that a picture gives at most `max_visual` tokens."""
    most = min(preprocessing.max_pixels, max_visual * (preprocessing.patch_size * preprocessing.merge_size) ** 2)
    return preprocessing.model_copy(update={"max_pixels": most, "min_pixels": min(preprocessing.min_pixels, most)})


def save_graph(graph: ir.Model, path: Path) -> None:
    """Write a graph, its weights left as external data, after a strict inference of types and shapes.

    Raises:
        onnx.shape_inference.InferenceError: types or shapes contradict each other; a bug of the builder.
    """
    onnx.shape_inference.infer_shapes(ir.to_proto(graph), check_type=True, strict_mode=True, data_prop=True)
    ir.save(graph, path)


def processor_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The image processor's settings: its own file, or its part of transformers 5's processor_config.json."""
    own = checkpoint.json("preprocessor_config.json")
    return own if own is not None else (checkpoint.json("processor_config.json") or {}).get("image_processor")


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The chat template, from whichever file holds it."""
    path = checkpoint.folder / CHAT_TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        template = (checkpoint.json(file) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's, or else config.json's."""
    for config in (
        checkpoint.json("generation_config.json") or {},
        checkpoint.config,
        checkpoint.config.get("text_config") or {},
    ):
        ids = config.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


def copy_processor_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what turns text into tokens; the manifest holds the image processor's settings."""
    template = chat_template(checkpoint)
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    for name in (TOKENIZER, "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")
