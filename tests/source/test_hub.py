"""Models by hub id and alias, from a local server that speaks the hub's protocol and from its cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ivc_export import cli, families
from ivc_export.errors import UserError
from ivc_export.source import hub
from tests.exporter.test_export import files
from tests.exporter.test_placement import cache_of_links
from tests.source.local_hub import COMMIT, EXTRA, Hub, local_hub, run_command


@pytest.fixture
def server(sample_checkpoint: Path) -> Iterator[Hub]:
    with local_hub(sample_checkpoint) as hub:
        yield hub


def export(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_command(folder, "ivc_export", *arguments, **variables)


def test_a_hub_model_is_downloaded_once_and_linked_out_of_the_cache(
    server: Hub, sample_checkpoint: Path, tmp_path: Path
) -> None:
    model = ("--model", "owner/model", "--revision", "v1")
    dry = export(tmp_path, *model, "--dry-run", "--json", HF_ENDPOINT=server.address, HF_TOKEN="hf_secret")
    assert dry.returncode == 0 and json.loads(dry.stdout)["family"] == "qwen2_vl", dry.stderr
    assert "config.json" in server.asked
    assert all(name.endswith((".json", ".jinja")) for name in server.asked)
    assert server.tokens == {"Bearer hf_secret"}
    loud = export(tmp_path, *model, "--weights", "link", HF_ENDPOINT=server.address)
    assert loud.returncode == 0, loud.stderr
    assert "model.safetensors" in server.asked and not set(EXTRA) & set(server.asked)
    assert "Fetching" in loud.stderr or "Download" in loud.stderr  # the hub's own progress
    bundle = tmp_path / "model-ivc"
    (weights,) = json.loads((bundle / "manifest.json").read_text())["weights"]
    stored = sample_checkpoint / "model.safetensors"
    assert weights["sha256"] == hashlib.sha256(stored.read_bytes()).hexdigest()
    assert (bundle / weights["file"]).stat().st_nlink == 2 and not (bundle / weights["file"]).is_symlink()
    before = files(bundle)
    offline = export(tmp_path, *model, "--force", "--quiet", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout, offline.stderr) == (0, "", "")
    assert files(bundle) == before


SHARDS = dict.fromkeys(("visual.x", "model.layers.0.x", "lm_head.weight"), "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "option", "sentence"),
    [
        ("pytorch_model.bin", b"", "--dry-run", "owner/model holds only pickled weights (pytorch_model.bin), which"),
        ("model.safetensors.index.json", json.dumps({"weight_map": SHARDS}).encode(), "--quiet",
         "owner/model on the hub has no model-00001-of-00002.safetensors"),
    ],
)  # fmt: skip
def test_what_the_hubs_list_of_files_tells_is_told_before_weights_are_downloaded(
    server: Hub, tmp_path: Path, name: str, content: bytes, option: str, sentence: str
) -> None:
    for left_out in ("model.safetensors", *EXTRA):
        del server.contents[left_out]
    server.contents[name] = content
    done = export(tmp_path, "--model", "owner/model", option, HF_ENDPOINT=server.address)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert not [name for name in server.asked if not name.endswith((".json", ".jinja"))]


@pytest.mark.parametrize(
    ("model", "variables", "sentence"),
    [
        ("owner/gated", {}, "owner/gated is gated: ask for access at huggingface.co/owner/gated"),
        ("owner/none", {}, "owner/none is neither a folder nor a model on the hub that you may read"),
        ("owner/model@v9", {}, "owner/model has no revision v9"),
        ("owner/other", {}, "model type 'bert' of config.json is not supported"),
        (
            "owner/model",
            {"HF_HUB_OFFLINE": "1"},
            "the hub's cache does not hold all of it, and the hub cannot be reached",
        ),
        (
            "owner/model",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "the hub's cache does not hold all of it, and the hub cannot be reached",
        ),
        ("owner/a--b", {}, "owner/a--b is neither a folder nor a model on the hub"),
    ],
)
def test_a_hub_that_does_not_give_the_model(
    server: Hub, tmp_path: Path, model: str, variables: dict[str, str], sentence: str
) -> None:
    name, _, revision = model.partition("@")
    arguments = ["--model", name, *(["--revision", revision] if revision else [])]
    done = export(tmp_path, *arguments, "--quiet", **({"HF_ENDPOINT": server.address} | variables))
    assert done.returncode == 2
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert "model.safetensors" not in server.asked
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


@pytest.mark.skipif(
    int(version("huggingface-hub").split(".")[0]) < 2, reason="older ones give what there is; our check names the file"
)
def test_a_cache_without_the_weights_says_so_offline(server: Hub, tmp_path: Path) -> None:
    assert export(tmp_path, "--model", "owner/model", "--dry-run", HF_ENDPOINT=server.address).returncode == 0
    done = export(tmp_path, "--model", "owner/model", "--quiet", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "the hub's cache does not hold all of it, and the hub cannot be reached" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_cache_made_by_others_serves_offline(sample_checkpoint: Path, tmp_path: Path) -> None:
    """Blobs and links alone, as older versions of the hub's library and other tools leave them."""
    cache = tmp_path / "home" / "hub" / "models--Qwen--Qwen2-VL-2B-Instruct"
    cache_of_links(sample_checkpoint, cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    for placing in ("link", "copy"):
        output = tmp_path / placing
        arguments = ("--model", "qwen2-vl-2b", "--weights", placing, "--output", output)
        done = export(tmp_path, *arguments, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert files(output)["weights/model.safetensors"] == files(sample_checkpoint)["model.safetensors"]


def test_aliases_are_ids_of_models_that_can_be_exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hub.aliases()["qwen2-vl-2b"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert len(hub.aliases()) == sum(len(families.of(name).hub) for name in families.names())
    asked = []

    def snapshot(*arguments: Any) -> Path:
        asked.append(arguments[:2])
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    monkeypatch.setattr(hub, "snapshot", snapshot)
    monkeypatch.setattr(hub.HubCheckpoint, "listing", None)
    for alias, repo in hub.aliases().items():
        assert hub.open_checkpoint(alias, "v2").config == {}
        assert asked.pop() == (repo, "v2")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "qwen2-vl-3b"], "qwen2-vl-3b is neither a folder nor an alias: .* such as qwen2"),
        (["--model", "xyz"], "xyz is neither a folder nor an alias: .* qwen2-vl-2b, qwen2-vl-7b"),
        (["--model", "./no/folder"], "./no/folder is neither a folder nor an alias"),
        (["--model", "SAMPLE", "--revision", "main"], "which has no revisions: leave out --revision"),
    ],
)
def test_names_of_nothing(
    sample_checkpoint: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.ivc_export([str(sample_checkpoint) if a == "SAMPLE" else a for a in arguments]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    with pytest.raises(UserError, match=sentence):
        raise UserError(message)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("\n Bad request. (Request ID: Root=1-2)\nmore", "Bad request."),
        (
            "Server error '500' for url 'https://x.y/z?X-Amz-Signature=a1&b=c'\nsee",
            "Server error '500' for url 'https://x.y/z'",
        ),
        ("", "OSError"),
    ],
)
def test_reasons_are_short_and_sign_nothing(said: str, told: str) -> None:
    assert hub.reason_of(OSError(said)) == told
