"""Finds a model in a folder, by an alias, or by an id on Hugging Face's hub, and downloads only what is needed."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ivc_export import families
from ivc_export.checkpoint.folder import CONFIG, Checkpoint
from ivc_export.checkpoint.kinds import check_folder
from ivc_export.errors import UserError

TOKENIZER_FILES = ("merges.txt", "tokenizer.model")
"""Files of tokenizers without a tokenizer.json."""


def aliases() -> dict[str, str]:
    """Short names of models that can be exported, with their hub ids."""
    return {alias: repo for name in families.names() for alias, repo in families.of(name).hub.items()}


def open_checkpoint(model: Path | str, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint folder, or a model on the hub. Of the latter only JSON files and templates are downloaded at
    first.

    model: a folder, an alias or a hub id. revision: branch, tag or commit on the hub; None takes its main branch.

    Raises:
        UserError: there is no such model, the hub refuses it, or it is something else; see kinds.KINDS.
    """
    name = str(model)
    if Path(name).exists():
        if revision is not None:
            raise UserError(f"{name} is a folder, which has no revisions: leave out --revision")
        check_folder(Checkpoint(Path(name)))
        return Checkpoint.open(Path(name))
    known = aliases()
    if name in known:
        return HubCheckpoint.download(known[name], revision)
    if is_hub_id(name):
        return HubCheckpoint.download(name, revision)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or sorted(known)
    raise UserError(
        f"{name} is neither a folder nor an alias: give a checkpoint folder, a hub id (owner/name), or an alias such "
        f"as {', '.join(near)}"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


@dataclass(frozen=True)
class HubCheckpoint(Checkpoint):
    """A snapshot in the hub's cache. Its weight files are downloaded when they are first needed."""

    repo: str

    @staticmethod
    def download(repo: str, revision: str | None) -> HubCheckpoint:
        """Download everything but the weights.

        Raises:
            UserError: the hub refuses it, or it is not a checkpoint.
        """
        checkpoint = HubCheckpoint(snapshot(repo, revision, ["*.json", "*.jinja", *TOKENIZER_FILES]), repo)
        check_folder(checkpoint)
        if not (checkpoint.folder / CONFIG).is_file():
            raise UserError(f"{repo} on the hub has no {CONFIG}: give a model in the layout of transformers")
        return checkpoint

    @property
    def place(self) -> str:
        """The repository's name."""
        return self.repo

    @cached_property
    def listing(self) -> frozenset[str] | None:
        """Names of the repository's top-level files and folders. None if the hub does not tell them, for example
        offline."""
        import huggingface_hub

        commit = self.folder.name  # of a snapshot
        try:
            entries = huggingface_hub.HfApi().list_repo_tree(self.repo, revision=commit)
            return frozenset(entry.path.partition("/")[0] for entry in entries)
        except Exception:  # the hub's library and those below it share no base class
            return None

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the repository's files and folders, or of those that are downloaded."""
        return super().names if self.listing is None else self.listing

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, downloaded.

        Raises:
            UserError: the repository lacks one, or the hub refuses it.
        """
        files = super().weight_files
        lacking = [file.name for file in files if self.listing is not None and file.name not in self.listing]
        if lacking:
            raise UserError(
                f"{self.repo} on the hub has no {lacking[0]}: give a model with all of its safetensors files"
            )
        snapshot(self.repo, self.folder.name, [glob.escape(file.name) for file in files])
        return files


def snapshot(repo: str, revision: str | None, patterns: list[str], nested: bool = False) -> Path:
    """Download the files of a repository that match `patterns`, and return the snapshot's folder.

    nested: whether files in folders are included, or only those at the top.

    Token, cache, offline switch and endpoint are huggingface_hub's own (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, ...).

    Raises:
        UserError: the hub refuses them.
    """
    import huggingface_hub  # takes a while to load

    with hub_errors(repo, revision):
        path: str = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=None if nested else ["*/*"]
        )
    return Path(path)


def snapshot_with(repo: str, revision: str | None, name: str) -> Path | None:
    """Download one file of a repository, and return the snapshot's folder. None if the repository has no such file.

    Raises:
        UserError: the hub refuses it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    with hub_errors(repo, revision):
        try:
            return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision)).parent
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            return None


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn exceptions of downloads into one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo} is gated: ask for access at huggingface.co/{repo}, and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision}: give a branch, tag or commit of it") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{repo} is neither a folder nor a model on the hub that you may read: check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo} is not a folder, the hub's cache does not hold all of it, and the hub cannot be reached: "
            "check the connection and HF_HUB_OFFLINE, or download it first"
        ) from error
    except Exception as error:  # the hub's library and those below it share no base class
        raise UserError(
            f"{repo} cannot be downloaded ({reason_of(error)}): try again, or download it first by other means"
        ) from error


def reason_of(error: Exception) -> str:
    """The beginning of an error's message, without its request's id and without signatures of addresses."""
    lines = [re.sub(r" \(Request ID: .*", "", line).strip() for line in str(error).splitlines()]
    first = next((line for line in lines if line), type(error).__name__)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", first)


def silence() -> None:
    """Show no progress of downloads."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
