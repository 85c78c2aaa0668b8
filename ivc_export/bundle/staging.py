"""Makes folders appear only when they are complete, even if the writer is killed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import fnmatch
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ivc_export.contract.names import GRAPH_NAMES, MANIFEST
from ivc_export.contract.origin import ORIGIN
from ivc_export.errors import UserError
from ivc_export.files import read_object

WORK = ".build-"
"""How the names of folders begin in which engines are being built, within a bundle."""
OWN = (
    *(MANIFEST, f".{MANIFEST}.partial-*", *(f"{name}.onnx" for name in GRAPH_NAMES)),
    *(ORIGIN, "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("testdata/index.json", "testdata/*.png", "testdata/*/*/*/*.bin"),
    *("report/parity.json", "report/parity.html", "report/.parity.*.partial-*"),
    *("report/reference/index.json", "report/reference/*.png", "report/reference/*/*/*/*.bin"),
    *("engines/*/build.json", "engines/*/*.plan"),
)
"""The files that commands write into a bundle, besides those that its manifest names: a pattern for each part of a
path."""

LOCAL = ("report/", "engines/")
"""Those of them that describe the machine and the pictures of their author. They are left out when a bundle is
shared."""

_PARTIAL, _REPLACED = ".partial-", ".replaced-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def is_unfinished(folder: Path) -> bool:
    """Whether a bundle is being written in `folder`, or was until its writer was killed."""
    name = real(folder).name
    return name.startswith(".") and _PARTIAL in name


@contextmanager
def staged_folder(target: Path, force: bool) -> Iterator[Path]:
    """Yield a new folder beside `target`. It becomes `target` if the block succeeds, and is removed if it does not.

    A killed writer leaves a hidden folder, which nobody opens as a bundle. The next call for the same target removes
    it. With `force`, the bundle that is at `target` now is replaced in one step, so that one of the two bundles exists
    at any moment. Anything that appears there meanwhile stays.

    Raises:
        UserError: see check_free; or nothing can be written, or `target` changed meanwhile.
    """
    target = real(target)
    made = [parent for parent in target.parents if not parent.exists()]
    with ExitStack() as stack:
        stack.callback(remove_empty, made)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            tidy(target)
            check_free(target, force)
            older = read_own_manifest(target)
            staging = stack.enter_context(fresh_folder(target.parent, f".{target.name}{_PARTIAL}", is_own))
        except OSError as error:
            raise UserError(
                f"nothing can be written beside {target} ({error.strerror}): name another output"
            ) from error
        yield staging
        staging.chmod(0o755)
        put_in_place(staging, target, force=older is not None)
        if older is not None and staging.exists():  # what was replaced
            check_replaced(staging, target, older)


def real(path: Path) -> Path:
    """The absolute path without links. It also works for links in a circle, for which Path.resolve raises an error."""
    return Path(os.path.realpath(path))


def check_free(target: Path, force: bool) -> None:
    """Check that a new bundle may go to a target. The target may hold only a bundle without other files, and only with
    `force`.

    Raises:
        UserError: it holds something else, or has a name like those of unfinished folders.
    """
    target = real(target)
    if is_unfinished(target):
        raise UserError(f"{target} is named like an unfinished export: name another output folder")
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if read_own_manifest(target) is None:
        raise UserError(f"{target} exists and is not a bundle: name another output folder")
    if not force:
        raise UserError(f"{target} exists: name another output folder, or replace it with --force")
    if foreign := foreign_file(target):
        raise UserError(
            f"{target} holds {foreign}, which is not part of a bundle: move it, or name another output folder"
        )
    if any(is_locked(work) for work in target.glob(f"{WORK}*")):
        raise UserError(f"engines are being built in {target}: wait for them, or name another output folder")


def check_apart(target: Path, sources: Iterable[Path]) -> None:
    """Check that the export does not read from a target that it would replace.

    Raises:
        UserError: one of `sources`, or the target of its link, is `target` or within it.
    """
    target = real(target)
    for source in sources:
        if real(source).is_relative_to(target):
            raise UserError(
                f"{source} lies in {target}, which the export would replace: move it, or name another output folder"
            )


def check_replaced(replaced: Path, target: Path, older: dict[str, Any]) -> None:
    """Check what a new bundle at `target` replaced. If that changed since the export began, it goes back.

    Raises:
        UserError: it is another bundle, not a bundle, or has other files now.
    """
    if replaced.is_symlink() or read_own_manifest(replaced) != older:
        what = "changed"
    elif foreign := foreign_file(replaced):
        what = f"received {foreign}"
    else:
        return
    exchange(replaced, target)
    raise UserError(f"{target} {what} during the export, and stays as it is: name another output folder")


def read_own_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the bundle in `folder`, of any version. None if there is no bundle."""
    try:
        content = read_object(folder / MANIFEST, "")
    except UserError:
        return None
    known = isinstance(content.get("graphs"), dict) and isinstance(content.get("versions"), dict)
    return content if known and "schema_version" in content and "ivc-export" in content["versions"] else None


def is_own(folder: Path) -> bool:
    """Whether `folder` has only files that an export writes, so that it can be removed."""
    return foreign_file(folder) is None


def foreign_file(folder: Path) -> str | None:
    """A file or link below `folder` that is not part of a bundle, relative to it. None if there is none."""
    manifest = read_own_manifest(folder)
    named = ["weights/*.safetensors"] if manifest is None else [*map(glob.escape, named_files(manifest))]
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if Path(where, name).is_symlink()]
        for name in sorted(files + links):
            path = Path(where, name).relative_to(folder)
            if not path.parts[0].startswith(WORK) and not any(fits(path, pattern) for pattern in (*OWN, *named)):
                return str(path)
    return None


def named_files(manifest: dict[str, Any]) -> Iterator[str]:
    """All files that a manifest names in any field."""
    entries = [*manifest["graphs"].values(), manifest.get("embedding")]
    entries += manifest["weights"] if isinstance(manifest.get("weights"), list) else []
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            yield entry["file"]


def shared_patterns() -> list[str]:
    """Patterns of the files of a bundle that are shared with others, besides those that its manifest names."""
    return [pattern for pattern in OWN if not pattern.startswith(LOCAL) and _PARTIAL not in pattern]


def fits(path: Path, pattern: str) -> bool:
    """Whether each part of a relative path matches that of `pattern`."""
    parts = pattern.split("/")
    return len(parts) == len(path.parts) and all(map(fnmatch.fnmatchcase, path.parts, parts))


@contextmanager
def fresh_folder(parent: Path, prefix: str, removable: Callable[[Path], bool] = lambda folder: True) -> Iterator[Path]:
    """Yield a new folder in `parent`, and remove it at the end if it is `removable`.

    It is locked until then. The lock tells others that its writer is alive; see remove_abandoned.
    """
    folder, descriptor = make_locked(parent, prefix)
    try:
        yield folder
    finally:
        if removable(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def make_locked(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Make a new folder in `parent`. Return it with the descriptor that holds its lock, if the file system has locks.

    Between the two steps others may think that the folder is abandoned, and remove it. Then another one is made.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue
        except OSError:  # a file system without locks, on which nobody removes folders
            return folder, None
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)


def lock(folder: Path) -> int:
    """Lock `folder` until the returned descriptor is closed, or this process ends.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: there is no such folder, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether the writer of `folder` is alive."""
    try:
        os.close(lock(folder))
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def tidy(target: Path) -> None:
    """Remove what killed writers left beside `target`. Put back a bundle that one of them had moved away."""
    for old in target.parent.glob(f".{glob.escape(target.name)}{_REPLACED}*"):
        if not os.path.lexists(target):
            old.rename(target)
        elif read_own_manifest(target) is not None and is_own(old):
            shutil.rmtree(old, ignore_errors=True)
    remove_abandoned(target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*"), is_own)


def remove_abandoned(folders: Iterable[Path], removable: Callable[[Path], bool] = lambda folder: True) -> None:
    """Remove the `folders` that are `removable` and whose writers are no longer alive."""
    for folder in folders:
        with suppress(OSError):
            descriptor = lock(folder)  # fails while the writer is alive
            try:
                if removable(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def remove_empty(folders: list[Path]) -> None:
    """Remove the `folders` that are empty, inner ones first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def put_in_place(staging: Path, target: Path, force: bool) -> None:
    """Rename `staging` to `target`. With `force`, a bundle at `target` moves to `staging`.

    Raises:
        UserError: something appeared at `target`, and `force` is not set.
    """
    if force and target.exists():
        exchange(staging, target)
        return
    try:
        staging.rename(target)  # also onto an empty folder
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"{target} was created during the export: name another output folder") from error
        raise


def exchange(staging: Path, target: Path) -> None:
    """Swap two folders in one step, or in two if the file system cannot. `tidy` repairs what a kill between them
    leaves."""
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
    """Exchange two names by Linux's renameat2, which Python does not offer. False if the system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # in glibc since 2.28
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))
