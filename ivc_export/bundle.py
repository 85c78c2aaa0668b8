"""A bundle on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export import contract, staging
from ivc_export.checkpoint import header_sha256
from ivc_export.contract import MANIFEST, SCHEMA_VERSION, Manifest
from ivc_export.errors import UserError
from ivc_export.files import read_object
from ivc_export.floats import FLOAT_DTYPES

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Bundle:
    """An exported model: three graphs, weights, and the manifest that describes them.

    notes: what the export that made it has to say of the checkpoint, a sentence each; none of a bundle that was loaded.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...] = ()

    @staticmethod
    def load(folder: Path | str) -> Bundle:
        """Open the bundle in `folder`.

        Raises:
            UserError: it is none, is unfinished or damaged, its weights changed, or it is of another version.
        """
        if staging.is_unfinished(Path(folder)):
            raise UserError(
                f"{folder} is what an export left that was killed: export the model again, which removes it"
            )
        return Bundle(Path(folder), read_manifest(Path(folder)))

    def check_portable(self, purpose: str) -> None:
        """Refuse graphs that were lowered at export where `purpose` lowers them otherwise.

        Raises:
            UserError: they were.
        """
        if self.manifest.lowering != "portable":
            raise UserError(
                f"{purpose} begins with portable graphs, and {self.folder} has {self.manifest.lowering} ones: export "
                "the model again without --lowering"
            )

    def missing_processor_files(self) -> list[str]:
        """Files that a prompt needs to become tokens, and that the bundle lacks."""
        return [name for name in (TOKENIZER, CHAT_TEMPLATE) if not (self.folder / name).is_file()]

    @cached_property
    def embedding_table(self) -> npt.NDArray[Any]:
        """Token embeddings [vocab, hidden] in the checkpoint's dtype, mapped from the weight file."""
        table = self.manifest.embedding
        return np.memmap(self.folder / table.file, FLOAT_DTYPES[table.dtype], "r", table.offset, table.shape)

    def embed(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Rows of the embedding table for `tokens`, in float32 [len(tokens), hidden]."""
        return self.embedding_table[tokens].astype(np.float32)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the bundle in `folder`.

    Raises:
        UserError: no bundle is there, or its manifest is damaged, of another version, or leaves the bundle.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is not a bundle (it has no {MANIFEST}): make one with ivc-export")
    content = read_object(path, "export the model again")
    try:
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, and this ivc-export reads {SCHEMA_VERSION}: "
                f"{'upgrade ivc-export' if version > SCHEMA_VERSION else 'export the model again'}"
            )
        manifest = Manifest.model_validate(content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({contract.first_problem(error)}): export the model again") from error
    if set(manifest.graphs) != set(contract.GRAPH_NAMES):
        raise UserError(f"{path} is damaged (it names {len(manifest.graphs)} graphs of 3): export the model again")
    files = [g.file for g in manifest.graphs.values()] + [w.file for w in manifest.weights] + [manifest.embedding.file]
    for file in files:
        if "\0" in file or not (folder / file).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} names {file}, which is outside the bundle: export the model again")
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing: copy the whole bundle, or export the model again")
    for weights in manifest.weights:
        size = (folder / weights.file).stat().st_size
        if size != weights.size:
            raise UserError(
                f"{folder / weights.file} has {size:,} bytes and the manifest says {weights.size:,}: "
                "copy the bundle again, or export the model again"
            )
        if header_sha256(folder / weights.file) != weights.header_sha256:
            raise UserError(
                f"{folder / weights.file} changed after the export (its header is another): export the model again"
            )
    table = manifest.embedding
    end = table.offset + math.prod(table.shape) * FLOAT_DTYPES[table.dtype].itemsize
    if min(table.offset, *table.shape) < 0 or end > (folder / table.file).stat().st_size:
        raise UserError(f"{path} is damaged (the embedding table is not within its file): export the model again")
    return manifest
