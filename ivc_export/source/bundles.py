"""Finds a bundle in a folder, or on Hugging Face's hub, from where it is downloaded whole."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.staging import fits, named_files, read_own_manifest, shared_patterns
from ivc_export.contract.names import MANIFEST
from ivc_export.errors import UserError
from ivc_export.files import check_regular
from ivc_export.source.hub import is_hub_id, snapshot, snapshot_with

OPENED = "ivc-export"
"""A folder within a repository's folder of the hub's cache. It has a folder for each commit, with the bundle's files.

Files of a snapshot are links out of it, which neither we nor onnxruntime follow. These files are hard links to the same
bytes, and are removed with the repository's folder. Engines and reports of the bundle are written here.
"""
ADVICE = "export the model again, and push it with ivc-export --push-to-hub"


def open_bundle(name: Path | str, revision: str | None = None) -> Bundle:
    """Open a bundle in a folder or on the hub. Files that are not in the hub's cache are downloaded first.

    Args:
        name: a folder, or a hub id (owner/name).
        revision: branch, tag or commit on the hub. None takes the main branch.

    Raises:
        UserError: there is no such bundle, the hub refuses it, or it cannot be opened (see Bundle.load).
    """
    given = str(name)
    if Path(given).exists() or not is_hub_id(given):
        if revision is not None:
            raise UserError(f"{given} is not a hub id, and only hub repositories have revisions: leave out --revision")
        return Bundle.load(given)
    return Bundle.load(download_bundle(given, revision))


def download_bundle(repo: str, revision: str | None = None) -> Path:
    """Download a bundle into the hub's cache, and return its folder there. Its contents are not checked yet.

    Raises:
        UserError: the hub refuses it, or the repository has no bundle.
    """
    folder = snapshot_with(repo, revision, MANIFEST)
    manifest = None if folder is None else read_own_manifest(folder)
    if folder is None or manifest is None:
        raise UserError(
            f"{repo} on the hub is not a bundle (it has no {MANIFEST} that ivc-export wrote): give a repository that "
            f"ivc-export --push-to-hub wrote, or export the model with ivc-export --model {repo}"
        )
    named = list(named_files(manifest))
    outside = [name for name in named if not is_inside(name)]
    if outside:
        raise UserError(f"{repo} on the hub names {outside[0]!r}, which is outside the bundle: {ADVICE}")
    patterns = [*shared_patterns(), *map(glob.escape, named)]
    folder = snapshot(repo, folder.name, patterns, nested=True)
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{repo} on the hub has no {missing[0]}, which its {MANIFEST} names: {ADVICE}")
    return link_files(folder, folder.parents[1] / OPENED / folder.name, patterns)


def is_inside(name: str) -> bool:
    """Whether a file name in a manifest can be that of a file within its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def link_files(snapshot_folder: Path, folder: Path, patterns: list[str]) -> Path:
    """Give `folder` the files of a snapshot that match `patterns`. Existing files stay. Each file appears only when it
    is complete."""
    for path in snapshot_folder.rglob("*"):
        name = path.relative_to(snapshot_folder)
        target = folder / name
        if path.is_dir() or target.exists() or not any(fits(name, pattern) for pattern in patterns):
            continue
        real = path.resolve()
        check_regular(real, "remove it from the hub's cache, and download it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        place(real, target)
    return folder


def place(source: Path, target: Path) -> None:
    """Link a file, or copy it if the file system has no links. Another process may do the same at the same time."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        descriptor, staged = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
        os.close(descriptor)
        try:
            shutil.copyfile(source, staged)
            Path(staged).chmod(0o644)
            Path(staged).replace(target)
        finally:
            with suppress(FileNotFoundError):
                Path(staged).unlink()
