"""A bundle onto the hub and back, on a server on loopback that speaks the hub's protocol."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from tests.repository.test_commands import check_line, lines
from tests.source.local_hub import Hub, local_hub, run_command

QUESTION = ("--prompt", "Where is the ring?", "--max-tokens", "2", "--json")
TOKEN = {"HF_TOKEN": "hf_secret"}


@pytest.fixture
def server(sample_checkpoint: Path) -> Iterator[Hub]:
    with local_hub(sample_checkpoint) as hub:
        yield hub


Outcome = tuple[int, str, str]
"""Exit code, standard output and standard error."""
Run = Callable[..., Outcome]


@pytest.fixture
def run(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs a command here, with settings that huggingface_hub reads of the environment once, when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN["HF_TOKEN"])
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    disable_progress_bars()

    def run(command: str, *arguments: str | Path, **variables: str) -> Outcome:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                if name == "HF_TOKEN":
                    patch.setenv(name, value)
                else:
                    patch.setattr(constants, name.removeprefix("HF_") if name == "HF_ENDPOINT" else name, value)
            capsys.readouterr()
            code = getattr(cli, command)([*map(str, arguments)])
            return code, *capsys.readouterr()

    yield run
    enable_progress_bars()


def refusal(outcome: Outcome) -> str:
    code, _, said = outcome
    assert code == 2 and len(said.splitlines()) == 1, said
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(sample_bundle.folder, tmp_path / "bundle")


def test_an_export_is_pushed_with_a_card_and_runs_by_its_id(server: Hub, run: Run, tmp_path: Path) -> None:
    pushing = ("--model", "owner/model", "--ratio", "0.4", "--push-to-hub", "owner/pruned", "--private", "--json")
    code, out, said = run("ivc_export", *pushing)
    assert code == 0, said
    record, there = json.loads(out), server.repos["owner/pruned"]
    assert record["pushed"]["url"] == f"{server.address}/owner/pruned" and record["pushed"]["licensed"]
    assert server.private == {"owner/pruned": True}
    local = contents(tmp_path / "model-ivc")
    assert {name: there[name] for name in there if name not in (".gitattributes", "README.md")} == local
    assert json.loads(there["origin.json"]) == {"repo": "owner/model", "commit": "c" * 40}
    card = there["README.md"].decode()
    for line in ("base_model: owner/model", "license: apache-2.0", "- ivc-prune", "- multimodal", "| ratio | 0.4 of"):
        assert line in card
    assert "pipeline_tag: image-text-to-text" in card and "Not checked" in card
    found = lines(card)
    assert [line.split()[0] for line in found] == ["pip", "ivc-run"]
    for line in found:
        check_line(line)

    by_id = run("ivc_run", "owner/pruned", *QUESTION)
    by_folder = run("ivc_run", "model-ivc", *QUESTION)
    assert by_id[0] == by_folder[0] == 0, by_id
    assert json.loads(by_id[1])["text"] == json.loads(by_folder[1])["text"]
    server.asked.clear()
    assert run("ivc_check", "owner/pruned", "--weights", "--revision", "main")[0] == 0
    offline = run_command(tmp_path, "ivc_run", "owner/pruned", *QUESTION, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and json.loads(offline.stdout)["text"] == json.loads(by_id[1])["text"]
    assert not [name for name in server.asked if name != "manifest.json"]


def test_a_folders_card_is_told_of_and_what_is_not_for_others_stays(
    server: Hub, run: Run, sample_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(sample_checkpoint, tmp_path / "checkpoint")
    front = (
        "license: other\nlicense_name: our-own\nlicense_link: LICENSE\ntags: [small, 3, '']\nbase_model: owner/older"
    )
    (checkpoint / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    pushing = ("--output", tmp_path / "bundle", "--push-to-hub", "owner/new", "--quiet")
    assert run("ivc_export", "--model", checkpoint, *pushing) == (0, "", "")
    there = server.repos["owner/new"]
    card = there["README.md"].decode()
    assert "license: other" in card and "license_name: our-own" in card and "- small" in card
    assert "base_model:" not in card and "Not checked" in card

    for name in ("engines/a/prefix.plan", "report/reference/picture.png", "report/parity.html", "notes.txt"):
        (tmp_path / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bundle" / name).write_bytes(b"of this machine")
    server.commit("owner/new", there | {"testdata/index.json": b"{}", "LICENSE": b"mine", "docs/a.md": b"too"})
    assert run("ivc_export", *pushing) == (0, "", "")
    assert {*server.repos["owner/new"]} == {*there, "LICENSE", "docs/a.md"}  # what another push left is gone


def test_the_card_has_what_ivc_check_found(
    server: Hub, run: Run, bundle: Path, sample_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), "--steps", "1"]) == 0
    code, out, _ = run("ivc_export", "--output", bundle, "--push-to-hub", "owner/new", "--json")
    assert code == 0 and "licence is not known: add it to the model card" in json.loads(out)["warnings"][-1]
    card = server.repos["owner/new"]["README.md"].decode()
    assert "onnxruntime-cpu, float32, ivc-prune at ratio 0.5" in card and "Passed." in card
    assert "| logits of decode step 1 |" in card

    content = json.loads((bundle / "report" / "parity.json").read_text())
    content["model"]["selection_layer"] += 1
    (bundle / "report" / "parity.json").write_text(json.dumps(content))
    outcome = run("ivc_export", "--output", bundle, "--push-to-hub", "owner/new", "--quiet")
    assert "parity.json is about another model: check the bundle again" in refusal(outcome)


@pytest.mark.parametrize(
    ("call", "status", "sentence"),
    [
        ("PUT 1", 400, "Error while uploading"),
        (
            "commit",
            403,
            "the hub refuses access: check the name, and your token's permissions at",
        ),
        ("commit", 412, "somebody else changed it at the same time"),
        ("preupload", 400, "Bad request"),
        ("repos/create", 403, "the hub refuses access"),
    ],
)
def test_a_push_that_breaks_off_shows_nothing_and_goes_on(
    server: Hub, run: Run, bundle: Path, call: str, status: int, sentence: str
) -> None:
    before = contents(bundle)
    if call != "repos/create":
        server.commit("owner/new", {"README.md": b"# soon"})
    there = dict(server.repos)
    server.refused = {call: status}
    pushing = ("--output", bundle, "--push-to-hub", "owner/new", "--quiet")
    said = refusal(run("ivc_export", *pushing))
    assert f"cannot be uploaded to owner/new ({sentence}" in said
    assert f"the bundle is complete in {bundle}, and nothing of it shows on the hub; continue with ivc-export" in said
    assert server.repos == there and contents(bundle) == before
    sent, server.refused = len(server.stored), {}
    server.calls.clear()
    assert run("ivc_export", *pushing)[0] == 0
    puts = sum(count for name, count in server.calls.items() if name.startswith("PUT"))
    assert puts == len(server.stored) - sent == 4 - sent  # three graphs and the weights, each once
    assert "manifest.json" in server.repos["owner/new"]


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ("--push-to-hub name", {}, "name is not the name of a repository: give --push-to-hub owner/name"),
        ("--push-to-hub ../name", {}, "../name is not the name of a repository"),
        ("--push-to-hub owner/new", {"HF_TOKEN": ""}, "--push-to-hub needs a token that may write"),
        ("--push-to-hub owner/new", {"HF_TOKEN": "hf_old"}, "the hub refuses access: check the name, and your token's"),
        ("--push-to-hub owner/new", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it to upload"),
        ("--push-to-hub owner/new", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "nothing has been exported or uploaded"),
        ("--push-to-hub owner/model", {}, "is not a bundle (it holds model.safetensors): name another repository"),
        ("--push-to-hub owner/a--b", {}, "cannot be uploaded to owner/a--b"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_the_export(
    server: Hub,
    run: Run,
    sample_checkpoint: Path,
    tmp_path: Path,
    arguments: str,
    variables: dict[str, str],
    sentence: str,
) -> None:
    exporting = ("--model", sample_checkpoint, "--output", tmp_path / "new", "--quiet", *arguments.split())
    assert sentence in refusal(run("ivc_export", *exporting, **variables))
    assert not (tmp_path / "new").exists() and not server.repos and not server.stored


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--push-to-hub owner/new", "the following arguments are required: --model"),
        ("--output BUNDLE", "the following arguments are required: --model"),
        (
            "--output BUNDLE --push-to-hub owner/new --ratio 0.3",
            "--ratio works only with --model: give --model as well, or leave it out",
        ),
        ("--output BUNDLE --push-to-hub owner/new --max-visual 9", "--max-visual works only with --model"),
        ("--output BUNDLE --push-to-hub owner/new --dry-run", "--dry-run works only with --model"),
        ("--model x/y --push-to-hub owner/new --dry-run", "--dry-run writes nothing: leave out --push-to-hub"),
        ("--model x/y --private", "--private works only with --push-to-hub"),
    ],
)
def test_options_that_do_not_go_together(
    bundle: Path, arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.ivc_export([str(bundle) if word == "BUNDLE" else word for word in arguments.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_what_should_be_private_is_never_public(server: Hub, run: Run, bundle: Path) -> None:
    server.refused = {"repos/create": 403}
    pushing = ("--output", bundle, "--push-to-hub", "owner/new", "--private", "--quiet")
    said = refusal(run("ivc_export", *pushing))
    assert said.endswith(f"continue with ivc-export --output {bundle} --push-to-hub owner/new --private\n")
    server.refused = {}
    server.commit("owner/new", {"README.md": b"# soon"})
    there = dict(server.repos)
    assert "owner/new on the hub is already public, and --private is for" in refusal(run("ivc_export", *pushing))
    assert server.repos == there and not server.stored
    server.private["owner/new"] = True
    assert run("ivc_export", *pushing) == (0, "", "")


@pytest.mark.parametrize("held", ["manifest.json", "tokenizer.json"])
def test_a_repository_of_another_kind_stays_as_it_is(held: str, server: Hub, run: Run, bundle: Path) -> None:
    server.commit("owner/new", {held: b'{"name": "a page"}', "README.md": b"# another"})
    there = dict(server.repos)
    said = refusal(run("ivc_export", "--output", bundle, "--push-to-hub", "owner/new", "--quiet"))
    assert f"owner/new on the hub is not a bundle (it holds {held}): name another repository" in said
    assert server.repos == there and not server.stored


def test_what_a_link_leads_to_elsewhere_is_not_pushed(server: Hub, run: Run, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"of this machine")
    (bundle / "testdata").mkdir(exist_ok=True)
    (bundle / "testdata" / "picture-9.png").symlink_to(tmp_path / "secret")
    said = refusal(run("ivc_export", "--output", bundle, "--push-to-hub", "owner/new", "--quiet"))
    assert (
        "names 'testdata/picture-9.png', which is outside the bundle or a link to a place outside it: replace the link"
        in said
    )
    assert not server.repos and not server.stored


def test_a_folder_that_is_no_bundle_is_not_pushed(server: Hub, run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    pushing = ("--output", tmp_path / "folder", "--push-to-hub", "owner/new")
    assert "is not a bundle (it has no manifest.json)" in refusal(run("ivc_export", *pushing))
    assert not server.repos


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ("owner/none", {}, "owner/none is neither a folder nor a model on the hub that you may read"),
        ("owner/gated", {}, "owner/gated is gated"),
        ("owner/model", {}, "owner/model on the hub is not a bundle (it has no manifest.json that ivc-export wrote)"),
        ("owner/good --revision v9", {}, "owner/good has no revision v9"),
        (
            "owner/good",
            {"HF_HUB_OFFLINE": "1"},
            "the hub's cache does not hold all of it, and the hub cannot be reached",
        ),
        (
            "bundle --revision v1",
            {},
            "bundle is not a hub id, and only hub repositories have revisions: leave out --revision",
        ),
        ("none", {}, "none is not a bundle"),
        ("owner/good/more", {}, "owner/good/more is not a bundle"),
        ("owner/lacking", {}, "owner/lacking on the hub has no weights/model.safetensors, which its manifest.json"),
        ("owner/leaving", {}, "owner/leaving on the hub names '../../x', which is outside the bundle"),
        ("owner/absolute", {}, "owner/absolute on the hub names '/etc/hostname', which is outside the bundle"),
        ("owner/strange", {}, "owner/strange cannot be downloaded"),
        ("owner/edited", {}, "manifest.json was edited after the export"),
        ("owner/changed", {}, "prefix.onnx"),
    ],
)
def test_what_is_no_bundle_on_the_hub(
    server: Hub, run: Run, bundle: Path, tmp_path: Path, arguments: str, variables: dict[str, str], sentence: str
) -> None:
    good = contents(bundle)
    manifest = json.loads(good["manifest.json"])
    weights, prefix = manifest["weights"][0], manifest["graphs"]["prefix"]

    def naming(name: str) -> bytes:
        return json.dumps(manifest | {"weights": [weights | {"file": name}]}).encode()

    edited = json.dumps(manifest | {"default_ratio": 0.9}).encode()
    for name, changed in {
        "good": {},
        "leaving": {"manifest.json": naming("../../x")},
        "absolute": {"manifest.json": naming("/etc/hostname")},
        "strange": {"testdata/../../../../x.png": b"outside"},
        "edited": {"manifest.json": edited},
        "changed": {"prefix.onnx": good[prefix["file"]][:-1] + b"?"},
    }.items():
        server.commit(f"owner/{name}", good | changed)
    server.commit("owner/lacking", {name: content for name, content in good.items() if "weights" not in name})
    asked = run("ivc_run", *arguments.split(), *QUESTION, **variables)
    assert sentence in refusal(asked)
    assert not list(tmp_path.rglob("x.png")) and not list(tmp_path.rglob("x"))


def test_a_download_that_breaks_off_goes_on(server: Hub, run: Run, bundle: Path) -> None:
    server.commit("owner/good", contents(bundle))
    server.refused = {"GET vision.onnx": 403}
    asking = ("owner/good", *QUESTION)
    code, _, said = run("ivc_run", *asking)
    assert code == 2 and "owner/good" in said.splitlines()[-1]
    server.refused = {}
    assert run("ivc_run", *asking)[0] == 0
    gets = {name: count for name, count in server.calls.items() if name.startswith("GET")}
    assert gets.pop("GET vision.onnx") == 2 and set(gets.values()) == {1}


def test_no_hub_is_asked_about_a_folder(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    bundle.rename(tmp_path / "owner" / "name")
    done = run_command(tmp_path, "ivc_run", "owner/name", *QUESTION, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
