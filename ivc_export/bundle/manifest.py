"""Reads a bundle's manifest, and checks it against itself, the family, and the files that it names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ivc_export import families
from ivc_export.checkpoint import formats
from ivc_export.checkpoint.folder import header_sha256, read_index
from ivc_export.contract.graphs import graph_info
from ivc_export.contract.manifest import Manifest, SelectionRule, StoredGraph, constants_sha256
from ivc_export.contract.names import GRAPH_NAMES, MANIFEST, SCHEMA_VERSION
from ivc_export.contract.preprocessing import ViewPreprocessing
from ivc_export.contract.records import first_problem
from ivc_export.errors import UserError
from ivc_export.files import check_regular, confined, read_object
from ivc_export.lowering import LOWERINGS, exported

NEWER, UPGRADE = "was made by a newer ivc-export", "upgrade ivc-export, or "
COPY = "copy the whole bundle, or export the model again"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the bundle in `folder`.

    Raises:
        UserError: there is no bundle, or its manifest is damaged, edited, of another version, or names files outside
            it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not a bundle (it has no {MANIFEST}): make one with ivc-export")
    again = f"export the model again with ivc-export --model CHECKPOINT --output {folder} --force"
    content = read_object(confined(folder, MANIFEST, COPY), "export the model again")
    try:
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, but this ivc-export reads {SCHEMA_VERSION}: "
                f"{'upgrade ivc-export' if version > SCHEMA_VERSION else again}"
            )
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        newer = any(is_unknown(detail) for detail in error.errors())
        what, mend = (NEWER, UPGRADE) if newer else ("is damaged", "")
        raise UserError(f"{path} {what} ({first_problem(error)}): {mend}{again}") from error
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}): export the model again") from error
    strange = [layer for layer, stored in manifest.weight_formats.items() if not formats.has_format(stored.format)]
    if strange:
        stored = manifest.weight_formats[strange[0]].format
        raise UserError(f"{path} {NEWER} (weight_formats.{strange[0]}: {stored} is unknown): {UPGRADE}{again}")
    if set(manifest.graphs) != set(GRAPH_NAMES):
        raise UserError(f"{path} is damaged (it names {len(manifest.graphs)} graphs of 3): export the model again")
    check_files(folder, manifest)
    problem = find_contradiction(manifest)
    if problem:
        raise UserError(f"{path} is damaged ({problem}): export the model again")
    if manifest.constants_sha256 != constants_sha256(content):
        raise UserError(f"{path} was edited after the export, and its fields decide the answers: {again}")
    return manifest


def is_unknown(problem: ErrorDetails) -> bool:
    """Whether this version does not know a field, method or format."""
    chosen = problem["loc"][-1] in ("method", "format", "kind") and problem["type"] == "literal_error"
    return chosen or problem["type"] in ("extra_forbidden", "union_tag_invalid")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that the files that the manifest names are the exported ones, by their sizes and headers.

    Raises:
        UserError: a file is missing, outside the bundle, or of another size or header; or the embeddings are in no
            file.
    """
    if not manifest.weights:
        raise UserError(f"{folder / MANIFEST} is damaged (it names no weight files): export the model again")
    for file in (*(graph.file for graph in manifest.graphs.values()), *(weights.file for weights in manifest.weights)):
        check_regular(confined(folder, file, COPY), COPY)
    for weights in manifest.weights:
        size = (folder / weights.file).stat().st_size
        if size != weights.size:
            raise UserError(
                f"{folder / weights.file} has {size:,} bytes, but the manifest says {weights.size:,}: "
                "copy the bundle again, or export the model again"
            )
        if header_sha256(folder / weights.file) != weights.header_sha256:
            raise UserError(
                f"{folder / weights.file} changed after the export (its header differs): export the model again"
            )
        read_index(folder / weights.file, COPY)  # checks that the tensors end at the file's end
    table = manifest.embedding
    if table.file not in {weights.file for weights in manifest.weights}:
        raise UserError(
            f"{folder / MANIFEST} is damaged (the embedding table is in {table.file}, which is not one of its weight "
            "files): export the model again"
        )
    if any(start + length > (folder / table.file).stat().st_size for start, length in table.parts):
        raise UserError(
            f"{folder / MANIFEST} is damaged (the embedding table is not within its file): export the model again"
        )


def find_contradiction(m: Manifest) -> str | None:
    """The first contradiction between fields of a manifest, or None."""
    if m.family not in families.names():
        return f"family {m.family!r} is not one of {', '.join(families.names())}"
    family = families.of(m.family)
    d, ids = m.decoder, [*m.visual_tokens, m.tokens.vision_start, m.tokens.vision_end, *m.tokens.stop]
    views = family.preprocessing is ViewPreprocessing
    beyond = [i for i in ids if i is not None and i >= d.vocab_size]
    facts = (
        ("lowering", m.lowering in exported()),
        ("decoder.deepstack", d.deepstack < d.layers),
        ("selection_layer", m.selection_layer in d.cuts),
        ("decoder.kv_heads", d.heads % d.kv_heads == 0),
        ("rotary.sections", m.rotary.size <= d.head_dim),
        ("rotary.sections", len(m.rotary.sections) == family.axes),
        ("selection.tiles", m.selection.tiles == (family.tiles and isinstance(m.selection, SelectionRule))),
        ("selection.views", m.selection.views == (views and isinstance(m.selection, SelectionRule))),
        ("selection.whole_layers", all(0 <= i < d.layers for i in m.selection.whole_layers)),
        ("selection.whole_layers", max(Counter(m.selection.whole_layers).values(), default=1) == 1),
        ("preprocessing.kind", isinstance(m.preprocessing, family.preprocessing)),
        ("preprocessing", m.preprocessing.capped(m.max_visual) == m.preprocessing),
        ("video", m.video is None or (family.video is not None and m.video.token != m.tokens.image)),
        ("video.max_pixels", m.video is None or m.video.min_pixels <= m.video.max_pixels),
        ("tokens", not beyond),
        ("residual_scale", m.lowering in LOWERINGS and m.residual_scale == LOWERINGS[m.lowering].hidden_scale),
        ("embedding.shape", m.embedding.shape == (d.vocab_size, d.hidden_size)),
        ("embedding.dtype", m.embedding.floats == m.dtype),
        ("embedding.packed", (m.embedding.dtype == "uint8") == (m.embedding.packed is not None)),
    )
    for field, agrees in facts:
        if not agrees:
            return f"{field} does not fit the other fields"
    sizes = (d, m.rotary, m.selection, m.preprocessing, m.selection_layer)
    for name, info in m.graphs.items():
        if info != StoredGraph(**dict(graph_info(name, m.dtype, *sizes)), sha256=info.sha256):
            return f"graphs.{name} does not fit the other fields"
    return None
