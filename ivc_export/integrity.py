"""The weight files of a bundle against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from ivc_export.bundle import Bundle
from ivc_export.contract import MANIFEST
from ivc_export.errors import UserError

_CHUNK = 1 << 24


def verify_weights(bundle: Bundle, progress: Callable[[int, int], None] = lambda done, total: None) -> Bundle:
    """Hash every weight file and compare; a hash that the manifest lacks is added to it.

    progress: called with the bytes read so far and their total. Returns the bundle with its manifest complete.

    Raises:
        UserError: a file is not the one that was exported.
        OSError: a file cannot be read, or the manifest not be written.
    """
    manifest, done = bundle.manifest, 0
    total = sum(file.size for file in manifest.weights)
    files = []
    for file in manifest.weights:
        digest = hashlib.sha256()
        with (bundle.folder / file.file).open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress(done, total)
        if file.sha256 not in (None, digest.hexdigest()):
            raise UserError(f"{bundle.folder / file.file} is not the file that was exported: export the model again")
        files.append(file.model_copy(update={"sha256": digest.hexdigest()}))
    if tuple(files) != manifest.weights:
        manifest = manifest.model_copy(update={"weights": tuple(files)})
        path = bundle.folder / MANIFEST
        staged = path.with_name(f".{MANIFEST}.partial")
        staged.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        staged.replace(path)
    return Bundle(bundle.folder, manifest)
