"""Uploads a bundle to Hugging Face's hub in one commit. Either all of it arrives, or nothing changes.

Weights are sent before the commit. Those that have arrived are not sent again, so the next push resumes one that broke
off.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ivc_export.bundle.bundle import Bundle
from ivc_export.bundle.staging import fits, read_own_manifest, shared_patterns
from ivc_export.contract.names import MANIFEST
from ivc_export.contract.origin import read_origin
from ivc_export.errors import UserError
from ivc_export.exporter.card import model_card, read_checked
from ivc_export.files import confined
from ivc_export.source.hub import is_hub_id, reason_of, snapshot_with
from ivc_export.source.origin import CARD, completed

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo  # takes a while to load

KEPT = (CARD, ".gitattributes", "LICENSE*", "LICENCE*", "NOTICE*")
"""Files that a repository may have besides a bundle's."""
WEIGHTS = "weights/*"
TOKENS = "huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Pushed:
    """Where a bundle was uploaded to. licensed: whether the card names the base model's licence."""

    repo: str
    commit: str
    url: str
    licensed: bool


def check_push(repo: str, private: bool = False) -> None:
    """Check, before any work, that a repository can take a bundle. Nothing is written.

    Raises:
        UserError: the name is not valid, there is no token, or the hub refuses; or see check_takes_bundle.
    """
    if not is_hub_id(repo):
        raise UserError(f"{repo} is not the name of a repository: give --push-to-hub owner/name")
    import huggingface_hub  # takes a while to load

    if huggingface_hub.get_token() is None:
        raise UserError(
            f"--push-to-hub needs a token that may write: create one at {TOKENS}, and set HF_TOKEN or log in with "
            "`hf auth login`"
        )
    api = huggingface_hub.HfApi()
    with upload_errors(repo, "nothing has been exported or uploaded, so try again"):
        api.whoami()
        if api.repo_exists(repo):
            check_takes_bundle(api.model_info(repo), private)


def push(bundle: Bundle, repo: str, private: bool = False) -> Pushed:
    """Upload a bundle with a card. It replaces a bundle in the repository. The repository is created if there is none.

    Engines and reports are not uploaded: engines fit one machine, and reports show pictures. private: of a new
    repository.

    Raises:
        UserError: the hub refuses, and the repository is unchanged; or see read_checked, read_origin and shared_files.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    origin = completed(read_origin(bundle.folder))
    card = model_card(bundle, origin, read_checked(bundle), repo)
    files = shared_files(bundle)
    api = huggingface_hub.HfApi()
    options = ("--output", str(bundle.folder), "--push-to-hub", repo, *(("--private",) if private else ()))
    again = f"continue with {shlex.join(('ivc-export', *options))}"
    with upload_errors(repo, f"the bundle is complete in {bundle.folder}, and nothing of it shows on the hub; {again}"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo)
        there = check_takes_bundle(info, private)
        stale = [name for name in there if is_of_bundle(name) and name not in files]
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, str(bundle.folder / name)) for name in files),
                CommitOperationAdd(CARD, card.encode()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"Upload a bundle of ivc-export {bundle.manifest.versions['ivc-export']}",
            parent_commit=info.sha,
        )
    return Pushed(repo, commit.oid, f"{api.endpoint}/{repo}", origin.license is not None)


def shared_files(bundle: Bundle) -> list[str]:
    """Files of a bundle to share, relative to its folder: its graphs, weights, and the files beside them.

    Raises:
        UserError: one of them is a link that leaves the folder.
    """
    names = {path.relative_to(bundle.folder) for path in bundle.folder.rglob("*") if path.is_file()}
    beside = {str(name) for name in names if any(fits(name, pattern) for pattern in shared_patterns())}
    found = sorted({*bundle.files, *beside})
    for name in found:
        confined(bundle.folder, name, "replace the link with the file itself, or remove it")
    return found


def is_of_bundle(name: str) -> bool:
    """Whether a push may have written a file of a repository; the card does not count."""
    return any(fits(Path(name), pattern) for pattern in (*shared_patterns(), WEIGHTS))


def check_takes_bundle(info: ModelInfo, private: bool) -> list[str]:
    """Check that a repository can take a bundle, and return the names of its files.

    Raises:
        UserError: it has files but no bundle of ours, or it is public and should be private.
    """
    names = [sibling.rfilename for sibling in info.siblings or ()]
    held = [name for name in names if not any(fits(Path(name), kept) for kept in KEPT)]
    folder = snapshot_with(info.id, info.sha, MANIFEST) if MANIFEST in held else None
    if held and (folder is None or read_own_manifest(folder) is None):
        raise UserError(
            f"{info.id} on the hub is not a bundle (it holds {min(held, key=is_of_bundle)}): name another repository"
        )
    if private and info.private is False:
        raise UserError(
            f"{info.id} on the hub is already public, and --private is for a new repository: leave --private out, or "
            "change it in the repository's settings"
        )
    return names


@contextmanager
def upload_errors(repo: str, advice: str) -> Iterator[None]:
    """Turn errors of the hub's library into one sentence, which ends with `advice`."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's library and those below it share no base class
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set: unset it to upload"
        elif status in (401, 403, 404):
            reason = f"the hub refuses access: check the name, and your token's permissions at {TOKENS}"
        elif status in (409, 412):
            reason = "somebody else changed it at the same time"
        else:
            reason = reason_of(error)
        raise UserError(f"the bundle cannot be uploaded to {repo} ({reason}); {advice}") from error
