"""The export, from top to bottom."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir

from ivc_export import __version__
from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.manifest import read_manifest
from ivc_export.bundle.staging import check_apart, check_free, staged_folder
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.checkpoint.formats import detect_format
from ivc_export.checkpoint.formats.floats import FLOAT
from ivc_export.checkpoint.weights import EMBEDDING, FOLDER, Weights
from ivc_export.contract.calibration import read_calibration
from ivc_export.contract.manifest import (
    EmbeddingTable,
    Manifest,
    PackedRows,
    Scored,
    StoredGraph,
    StoredLayer,
    WeightFile,
)
from ivc_export.contract.names import (
    CHAT_TEMPLATE,
    GRAPH_NAMES,
    IVC_DOMAIN,
    MANIFEST,
    PREPROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    GraphName,
)
from ivc_export.contract.origin import ORIGIN
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.exporter.graphs import build_graphs
from ivc_export.exporter.placement import converted_weights, place_weights, plan_conversions
from ivc_export.exporter.quantise import check_stored, round_weights, table_stem
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.family import Family, Model
from ivc_export.graph.functions import PACKED_LINEARS
from ivc_export.lowering import LOWERINGS, exported, lower
from ivc_export.lowering.types import types_of
from ivc_export.runtime.onnxruntime.loading import load_onnxruntime
from ivc_export.selection.method import METHODS
from ivc_export.source.configuration import Configuration, Description, read_configuration, read_description
from ivc_export.source.hub import open_checkpoint
from ivc_export.source.origin import find_origin

BUFFERS = ("rotary_emb.inv_freq", "position_ids")
"""Name endings of tensors that old checkpoints contain and every graph computes."""

StageProgress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done, and how much there is."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def export(recipe: ExportRecipe, progress: StageProgress = no_progress) -> Bundle:
    """Turn a checkpoint into a bundle of three graphs. The bundle appears at `recipe.output` only when it is complete.

    Args:
        recipe: which checkpoint is exported, where to, and how.
        progress: called with the name of a stage, and with how much is done of how much.

    Returns:
        The bundle, opened. Its `notes` are remarks on the checkpoint.

    Raises:
        UserError: the recipe or the checkpoint has a problem that the user can fix.
        OSError: a file cannot be read or written. Nothing new is left on disk, and an older bundle is unchanged.
    """
    lowering = check_lowering(recipe.lowering)
    if recipe.testdata:
        load_onnxruntime()  # only testdata needs it; raises UserError before all the work
    check_free(recipe.output, recipe.force)
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    check_apart(recipe.output, [checkpoint.folder, *checkpoint.folder.iterdir()])
    description = read_description(checkpoint)  # before weights are downloaded
    layer, calibrated = selection_layer(recipe, description)
    description = chosen_as_asked(recipe, description)
    packed = LOWERINGS[lowering].packed_weights
    check_stored(recipe.quantisation, detect_format(checkpoint), description.model, packed)
    description.model.preprocessing.capped(recipe.max_visual)  # raises UserError if no picture is so small
    configuration = read_configuration(checkpoint, description, packed)
    dtype, model = float_dtype(recipe, configuration), configuration.model
    weights = configuration.weights
    weights = round_weights(weights, recipe.quantisation, model, dtype or weights.dtype)
    conversions = plan_conversions(checkpoint.tensors.values(), dtype, weights.derived.values())
    weights = converted_weights(weights, conversions, dtype)
    with staged_folder(recipe.output, recipe.force) as folder:
        graphs = build_graphs(model, weights, layer)
        check_all_used(weights, configuration.family, graphs.values())
        hashes = {}
        for number, (name, graph) in enumerate(graphs.items(), 1):
            hashes[name] = save_graph(lower(graph, lowering), folder / f"{name}.onnx")
            progress("graphs", number, len(graphs))
        files = place_weights(
            checkpoint.weight_files,
            conversions,
            recipe.weights,
            folder,
            lambda done, total: progress("weights", done, total),
        )
        copy_processor_files(checkpoint, configuration, folder)
        manifest = make_manifest(recipe, configuration, weights, layer, calibrated, files, hashes)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        manifest = read_manifest(folder)  # in the form in which it will be read
        if recipe.testdata:
            from ivc_export.verify.testdata import write_testdata

            write_testdata(Bundle(folder, manifest))
            progress("testdata", 1, 1)
    said = [sentence for sentence in (configuration.stored.said, recipe.quantisation.said) if sentence]
    return Bundle(recipe.output, manifest, (*configuration.prompts.notes, *said))


def float_dtype(recipe: ExportRecipe, configuration: Configuration) -> FloatName | None:
    """The dtype of floats in the bundle. None leaves them as they are. Dequantised layers come in float32."""
    stored, weights = configuration.stored, configuration.weights
    dequantised = weights.formats and stored.manifest_name == FLOAT.name
    return recipe.float_name or stored.dtype or (weights.dtype if dequantised else None)


def check_lowering(name: str) -> str:
    """Return a lowering's name.

    Raises:
        UserError: bundles cannot be exported in it.
    """
    if name not in exported():
        raise UserError(f"lowering {name!r} is unknown: give one of {', '.join(exported())}")
    return name


def chosen_as_asked(recipe: ExportRecipe, description: Description) -> Description:
    """The model with the recipe's method and way of scoring, or its calibration's, instead of its family's.

    Raises:
        UserError: the calibration is damaged, or the model's layers do not give the values to score by.
    """
    scored = recipe.scored
    if recipe.calibration is not None:
        scored = read_calibration(recipe.calibration).scored
    model = description.model if scored is None else scoring(description.model, scored)
    return replace(description, model=replace(model, selection=METHODS[recipe.method].rule(model.selection)))


def scoring(model: Model, scored: Scored) -> Model:
    """The model with visual tokens scored by `scored`.

    Raises:
        UserError: its layers do not give these values.
    """
    if scored not in model.block.scored:
        raise UserError(f"this model's layers have no {scored} to score by: give {' or '.join(model.block.scored)}")
    return replace(model, selection=model.selection.model_copy(update={"scored": scored}))


def selection_layer(recipe: ExportRecipe, configuration: Description) -> tuple[int, bool]:
    """The selection layer, and whether it is calibrated. configuration: with the family's way of scoring.

    Raises:
        UserError: the model has no such layer.
    """
    layers, cuts = configuration.model.decoder.layers, configuration.model.decoder.cuts
    default = configuration.family.default_layer(configuration.model.decoder)
    as_measured = default.calibrated and recipe.method == "ivc-prune"
    as_measured = as_measured and recipe.scored in (None, configuration.model.selection.scored)
    if recipe.calibration is not None:
        return calibrated_layer(recipe.calibration, configuration), True
    if recipe.layer is None:
        return default.layer, as_measured
    if recipe.layer not in cuts:
        raise UserError(
            f"layer {recipe.layer} is out of range: this model has {layers} layers, "
            f"so --layer takes {cuts[0]} to {cuts[-1]} (its default is {default.layer})"
        )
    return recipe.layer, as_measured and recipe.layer == default.layer


def calibrated_layer(path: Path, configuration: Description) -> int:
    """The layer that a calibration of this model proposes.

    Raises:
        UserError: the file is not a calibration, is of another model, or proposes a layer that the model does not have.
    """
    found, sizes = read_calibration(path), configuration.model.decoder
    if (found.family, found.decoder.layers, found.decoder.hidden_size) != (
        configuration.family.model_type,
        sizes.layers,
        sizes.hidden_size,
    ):
        raise UserError(
            f"{path} is the calibration of another model, a {found.family} of {found.decoder.layers} layers: "
            "calibrate this one with ivc-calibrate"
        )
    if found.layer not in sizes.cuts:
        raise UserError(
            f"{path} proposes layer {found.layer}, but this model of {sizes.layers} layers takes "
            f"{sizes.cuts[0]} to {sizes.cuts[-1]}: calibrate it again with ivc-calibrate, or give --layer instead"
        )
    return found.layer


def check_all_used(weights: Weights, family: Family, graphs: Iterable[ir.Model]) -> None:
    """Check that the graphs take every tensor of a checkpoint. Otherwise it is larger than its config.json says.

    Raises:
        UserError: no graph takes a tensor.
    """
    stem = table_stem(weights.tensors)
    table = {EMBEDDING} if stem is None else {f"{stem}.packed", f"{stem}.scales"}
    used = {*table, *weights.spare, *(name for graph in graphs for name in graph.graph.initializers)}
    extra = [name for name in weights.tensors if name not in used and not name.endswith(BUFFERS)]
    extra = [name for name in extra if not name.startswith(tuple(family.unused))]
    if extra:
        raise UserError(
            f"config.json does not describe {len(extra)} tensors of the checkpoint, such as {extra[0]}: "
            "check that both belong to the same checkpoint"
        )


def save_graph(graph: ir.Model, path: Path) -> str:
    """Write a graph after a strict inference of types and shapes. Its weights stay external data.

    Returns the file's SHA-256.

    Raises:
        onnx.shape_inference.InferenceError: types or shapes contradict each other; a bug of the builder.
    """
    proto = ir.to_proto(graph)
    proto.graph.value_info.extend(packed_types(graph))
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    ir.save(graph, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def packed_types(graph: ir.Model) -> list[onnx.ValueInfoProto]:
    """Types and shapes of packed products, whose operator onnx does not know."""
    types, found = types_of(graph.graph), []
    for node in graph.graph:
        if node.domain == IVC_DOMAIN and node.op_type in PACKED_LINEARS:
            (y,) = node.outputs
            kind, columns = int(types[y]), node.attributes["N"].as_int()
            found.append(onnx.helper.make_tensor_value_info(str(y.name), kind, [None, columns]))
    return found


def copy_processor_files(checkpoint: Checkpoint, configuration: Configuration, folder: Path) -> None:
    """Write the checkpoint's files on text, pictures and itself, each under one name.

    The manifest contains the settings.
    """
    prompts = configuration.prompts
    (folder / CHAT_TEMPLATE).write_text(prompts.chat_template, encoding="utf-8")
    if prompts.tokenizer is not None:
        (folder / TOKENIZER).write_text(prompts.tokenizer.text, encoding="utf-8")
    if prompts.tokenizer_config:
        write_json(folder / TOKENIZER_CONFIG, prompts.tokenizer_config)
    if configuration.processor is not None:
        write_json(folder / PREPROCESSOR, configuration.processor)
    write_json(folder / "config.json", checkpoint.config)
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    origin = find_origin(checkpoint).model_dump(mode="json", exclude_defaults=True)
    if origin:
        write_json(folder / ORIGIN, origin)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def embedding_table(weights: Weights, shape: tuple[int, int]) -> EmbeddingTable:
    """The place of a bundle's token embeddings. shape: vocabulary and hidden size."""
    stem = table_stem(weights.tensors)
    if stem is None:
        stored, packed = weights.find(EMBEDDING, shape), None
    else:
        stored, scales = weights.tensors[f"{stem}.packed"], weights.tensors[f"{stem}.scales"]
        packed = PackedRows(block=stored.shape[2], scales=scales.offset, dtype=weights.dtype)
    dtype = "uint8" if packed else weights.dtype
    file = f"{FOLDER}/{stored.file.name}"
    return EmbeddingTable(file=file, offset=stored.offset, dtype=dtype, shape=shape, packed=packed)


def make_manifest(
    recipe: ExportRecipe,
    configuration: Configuration,
    weights: Weights,
    layer: int,
    calibrated: bool,
    files: tuple[WeightFile, ...],
    hashes: Mapping[GraphName, str],
) -> Manifest:
    """The manifest of the bundle."""
    model = configuration.model
    return Manifest.sealed(
        family=configuration.family.model_type,
        dtype=weights.dtype,
        lowering=recipe.lowering,
        selection_layer=layer,
        calibrated=calibrated,
        default_ratio=configuration.family.default_ratio if recipe.ratio is None else recipe.ratio,
        max_visual=recipe.max_visual,
        decoder=model.decoder,
        rotary=model.rotary,
        selection=model.selection,
        preprocessing=model.preprocessing.capped(recipe.max_visual),
        tokens=configuration.prompts.tokens,
        video=configuration.video,
        graphs={
            name: StoredGraph(**dict(model.graph_info(name, weights.dtype, layer)), sha256=hashes[name])
            for name in GRAPH_NAMES
        },
        embedding=embedding_table(weights, (model.decoder.vocab_size, model.decoder.hidden_size)),
        weights=files,
        chat=configuration.prompts.segments,
        weight_formats={
            layer: StoredLayer(format=one.manifest_name)
            for layer, one in sorted(weights.formats.items())
            if one.manifest_name != FLOAT.name
        },
        versions={"ivc-export": __version__, "onnx": version("onnx"), "onnx-ir": version("onnx-ir")},
    )
