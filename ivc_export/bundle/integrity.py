"""Compares the graph and weight files of a bundle with its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.manifest import StoredGraph, WeightFile
from ivc_export.contract.names import MANIFEST
from ivc_export.errors import UserError
from ivc_export.files import replace_text

_CHUNK = 1 << 24


def verify_files(bundle: Bundle, progress: Callable[[int, int], None] = lambda done, total: None) -> Bundle:
    """Hash every graph and weight file, and compare. A missing hash of a weight file is added to the manifest.

    progress: called with the bytes read so far and their total. Returns the bundle with its manifest complete.

    Raises:
        UserError: a file is not the exported one.
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    manifest, done = bundle.manifest, 0
    total = sum((bundle.folder / file).stat().st_size for file in bundle.files)

    def hashed(record: StoredGraph | WeightFile) -> str:
        nonlocal done
        digest = hashlib.sha256()
        with (bundle.folder / record.file).open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress(done, total)
        if record.sha256 not in (None, digest.hexdigest()):
            raise UserError(f"{bundle.folder / record.file} is not the file that was exported: export the model again")
        return digest.hexdigest()

    for info in manifest.graphs.values():
        hashed(info)
    weights = tuple(file.model_copy(update={"sha256": hashed(file)}) for file in manifest.weights)
    if weights != manifest.weights:
        manifest = manifest.model_copy(update={"weights": weights})
        replace_text(bundle.folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return Bundle(bundle.folder, manifest)
