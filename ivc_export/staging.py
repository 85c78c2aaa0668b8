"""Folders that appear only when they are whole, whatever kills the writer."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ivc_export.contract import MANIFEST
from ivc_export.errors import UserError

_PARTIAL, _REPLACED = ".partial-", ".replaced-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` is one in which a bundle is being written, or was until the writer was killed."""
    name = folder.resolve().name
    return name.startswith(".") and _PARTIAL in name


@contextmanager
def staged_folder(target: Path, force: bool) -> Iterator[Path]:
    """Yield a new folder beside `target` that becomes `target` if the block succeeds, and vanishes if it does not.

    A writer that is killed leaves a hidden folder, which no bundle is opened from; the next call for the same target
    removes it. What was at `target` is replaced at once, so that one of the two bundles is there at any moment.

    Raises:
        UserError: something is at `target` and `force` is not set, or it is not a bundle, or nothing can be written.
    """
    target = target.resolve()
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tidy(target)
        check_free(target, force)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=target.parent))
    except OSError as error:
        remove_empty(made)
        raise UserError(f"nothing can be written beside {target} ({error.strerror}): name another output") from error
    try:
        with locked(staging):
            yield staging
            staging.chmod(0o755)
            put_in_place(staging, target, force)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # what was replaced, or what failed
        remove_empty(made)


def check_free(target: Path, force: bool) -> None:
    """Refuse a target that holds something, unless that is a bundle and `force` is set.

    Raises:
        UserError: it does, or has a name like those of unfinished folders.
    """
    if is_unfinished(target):
        raise UserError(f"{target} is named like an unfinished export: name another output folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise UserError(f"{target} exists and is not a bundle: name another output folder")
    if not force:
        raise UserError(f"{target} exists: name another output folder, or replace it with --force")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder` that ends with this process, so that others know whether its writer lives."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def tidy(target: Path) -> None:
    """Remove what killed writers left beside `target`, and put back a bundle that one of them had moved away."""
    for old in target.parent.glob(f".{glob.escape(target.name)}{_REPLACED}*"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    remove_abandoned(target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*"))


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove folders whose writers no longer live; see `locked`."""
    for folder in folders:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the writer lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def remove_empty(folders: list[Path]) -> None:
    """Remove the `folders` that are empty, inner ones first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def put_in_place(staging: Path, target: Path, force: bool) -> None:
    """Rename `staging` to `target`; with `force` what is there moves to `staging`.

    Raises:
        UserError: something came to be at `target`, and `force` is not set.
    """
    if force and target.exists():
        exchange(staging, target)
        return
    try:
        staging.rename(target)  # also onto an empty folder
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"{target} came to exist during the export: name another output folder") from error
        raise


def exchange(staging: Path, target: Path) -> None:
    """Swap two folders in one step, or in two where the file system cannot; `tidy` mends what a kill leaves then."""
    if renamed_at_once(staging, target):
        return
    old = staging.with_name(f".{target.name}{_REPLACED}{staging.name.rpartition('-')[2]}")
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    old.rename(staging)


def renamed_at_once(first: Path, second: Path) -> bool:
    """Exchange two names by Linux's renameat2, which Python does not offer; False where there is no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # in glibc since 2.28
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))
