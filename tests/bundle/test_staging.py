"""Whatever ends an export, nothing half-written opens as a bundle, and an older bundle is whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivc_export import cli, families
from ivc_export.bundle import staging
from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.exporter.test_export import files

POINTS = 20

KILLED_AT_EVERY_POINT = """
import json, os, signal, sys
from pathlib import Path
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe

checkpoint, folder, points, older = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "older"

def run(name, kill_at, report=None):
    seen = 0
    def step(event, arguments):
        nonlocal seen
        files = event in ("open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree")
        if event in ("ctypes.dlsym", "progress") or (files and name in str(arguments[0])):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(step)
    recipe = ExportRecipe(checkpoint, folder / name / "bundle", ratio=0.25, force=older)
    export(recipe, lambda *arguments: step("progress", arguments))
    if report:
        report.write_text(str(seen))

def child(*arguments):
    pid = os.fork()
    if pid == 0:
        try:
            run(*arguments)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert child("count", 0, folder / "seen") == 0
total = int((folder / "seen").read_text())
codes = [child(f"killed{point}", 1 + point * (total - 1) // (points - 1)) for point in range(points)]
print(json.dumps([total, codes]))
"""


@pytest.mark.parametrize("situation", ["fresh", "older"])
def test_an_export_killed_at_20_points_leaves_no_bundle_and_the_older_one_whole(
    sample_checkpoint: Path, sample_bundle: Bundle, tmp_path: Path, situation: str
) -> None:
    older = files(sample_bundle.folder)
    for name in ("count", *(f"killed{point}" for point in range(POINTS))):
        (tmp_path / name).mkdir()
        if situation == "older":
            subprocess.run(["cp", "-r", sample_bundle.folder, tmp_path / name / "bundle"], check=True)
    arguments = [str(sample_checkpoint), str(tmp_path), str(POINTS), situation]
    done = subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_POINT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, codes = json.loads(done.stdout)
    assert total > POINTS and codes == [-9] * POINTS
    newer = files(tmp_path / "count" / "bundle")
    left = replaced = 0
    for point in range(POINTS):
        place = tmp_path / f"killed{point}"
        for folder in [place, *place.iterdir()]:
            if folder.name != "bundle":
                with pytest.raises(UserError):
                    Bundle.load(folder)
                left += folder != place
        if situation == "older" or (place / "bundle").exists():
            found = files(place / "bundle")
            assert found in ((older, newer) if situation == "older" else (newer,)), point
            replaced += found == newer
    assert left > POINTS / 2 and replaced < POINTS / 2
    place = tmp_path / f"killed{POINTS // 2}"
    assert len(list(place.iterdir())) == 1 + (situation == "older")
    export(ExportRecipe(sample_checkpoint, place / "bundle", ratio=0.25, force=True))
    assert [path.name for path in place.iterdir()] == ["bundle"]
    assert files(place / "bundle") == newer


SIGNALLED = """
import os, signal, sys
from ivc_export import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever a job in the background inherits
for ending in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(ending, signal.SIG_DFL)
def signalled(event, arguments):
    if event == "open" and "weights/model.safetensors" in str(arguments[0]) and arguments[2] & os.O_WRONLY:
        os.kill(os.getpid(), int(sys.argv[1]))
sys.addaudithook(signalled)
sys.exit(cli.ivc_export(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143), (1, 129)], ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_clean_up(
    sample_checkpoint: Path, sample_bundle: Bundle, tmp_path: Path, number: int, code: int
) -> None:
    subprocess.run(["cp", "-r", sample_bundle.folder, tmp_path / "bundle"], check=True)
    for arguments in (
        ["--output", str(tmp_path / "new" / "bundle")],
        ["--output", str(tmp_path / "bundle"), "--force"],
    ):
        command = [sys.executable, "-c", SIGNALLED, str(number), "--model", str(sample_checkpoint), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
        assert files(tmp_path / "bundle") == files(sample_bundle.folder)


def test_a_living_export_is_left_alone(tmp_path: Path) -> None:
    with staging.staged_folder(tmp_path / "bundle", force=False) as first:
        (first / "a").write_text("a")
        with staging.staged_folder(tmp_path / "bundle", force=True):
            assert first.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_target_that_appears_meanwhile_is_not_harmed(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="was created during the export"),
        staging.staged_folder(tmp_path / "bundle", force=False),
    ):
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "thesis.txt").write_text("years of work")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["bundle", "bundle/thesis.txt"]


@pytest.mark.parametrize("killed", [False, True])
def test_where_names_cannot_be_exchanged_the_older_bundle_comes_back(
    sample_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    before = files(export(ExportRecipe(sample_checkpoint, tmp_path / "bundle")).folder)
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if ".partial-" in source.name or (killed and ".replaced-" in source.name):
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(staging, "renamed_at_once", lambda first, second: False)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(ExportRecipe(sample_checkpoint, tmp_path / "bundle", ratio=0.25, force=True))
    if killed:  # between the two renames: nothing is at the bundle's place
        (moved,) = tmp_path.iterdir()
        assert files(moved) == before
        with pytest.raises(UserError, match="replace it with --force"):
            export(ExportRecipe(sample_checkpoint, tmp_path / "bundle"))
    assert files(tmp_path / "bundle") == before
    assert export(ExportRecipe(sample_checkpoint, tmp_path / "bundle", ratio=0.25, force=True)).manifest.default_ratio
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_folders_made_for_a_failed_export_vanish(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staging.staged_folder(tmp_path / "a" / "b" / "bundle", force=False):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before the lock", "with a lock of its own"])
def test_a_folder_that_is_taken_for_an_abandoned_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another export tidies between the making of a folder and its lock."""
    make = tempfile.mkdtemp
    taken: list[str] = []
    held: list[int] = []

    def made(prefix: str, dir: Path) -> str:
        folder = str(make(prefix=prefix, dir=dir))
        if not taken:
            taken.append(folder)
            if moment == "before the lock":
                staging.tidy(tmp_path / "bundle")
                assert not Path(folder).exists()
            else:
                held.append(staging.lock(Path(folder)))
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    with staging.staged_folder(tmp_path / "bundle", force=False) as folder:
        assert str(folder) not in taken and staging.is_locked(folder)
        staging.tidy(tmp_path / "bundle")
        (folder / "a").write_text("a")
    assert files(tmp_path / "bundle")
    for descriptor in held:
        os.close(descriptor)


def test_without_locks_folders_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unknown)
    (tmp_path / ".bundle.partial-other").mkdir()
    with staging.staged_folder(tmp_path / "bundle", force=False) as folder:
        (folder / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.partial-other", "bundle"]


Change = Callable[[Path], object]


def write(path: Path, content: str = "years of work") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def other_program(output: Path) -> None:
    shutil.rmtree(output)
    write(output / "manifest.json", '{"name": "an app", "icons": []}')


def other_layout(output: Path) -> None:
    """A manifest that shares its keys with ours, of another program."""
    write(output / "manifest.json", '{"schema_version": 1, "graphs": {}, "versions": {"chart-maker": "3"}}')


def damaged(output: Path) -> None:
    write(output / "manifest.json", "{")


def checkpoint_within(output: Path) -> None:
    """The checkpoint's own folder lies within the bundle."""
    shutil.move(output.parent / "checkpoint", output / "weights" / "original")
    (output.parent / "checkpoint").symlink_to(output / "weights" / "original")


def weights_within(output: Path) -> None:
    """The checkpoint's weights are a link to the bundle's."""
    weights = output.parent / "checkpoint" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(output / "weights" / "model.safetensors")


def become_checkpoint(output: Path) -> None:
    """The checkpoint's own folder, in which another program left its manifest.json."""
    shutil.rmtree(output)
    shutil.move(output.parent / "checkpoint", output)
    (output.parent / "checkpoint").symlink_to(output)
    write(output / "manifest.json", "{}")


def become_parent(output: Path) -> None:
    shutil.rmtree(output)
    output.mkdir()
    shutil.move(output.parent / "checkpoint", output / "checkpoint")
    (output.parent / "checkpoint").symlink_to(output / "checkpoint")


def become_file(output: Path) -> None:
    shutil.rmtree(output)
    write(output)


def pipe_for_manifest(output: Path) -> None:
    (output / "manifest.json").unlink()
    os.mkfifo(output / "manifest.json")


def become_pipe(output: Path) -> None:
    shutil.rmtree(output)
    os.mkfifo(output)


def become_circle(output: Path) -> None:
    shutil.rmtree(output)
    output.symlink_to(output.name)


FOREIGN = "which is not part of a bundle: move it"
NO_BUNDLE = "exists and is not a bundle: name another output folder"
REFUSED: list[tuple[str, Change, str]] = [
    ("another program's manifest", other_program, NO_BUNDLE),
    ("another program's manifest of our keys", other_layout, NO_BUNDLE),
    ("a damaged manifest", damaged, NO_BUNDLE),
    ("a pipe for a manifest", pipe_for_manifest, NO_BUNDLE),
    ("a file", become_file, NO_BUNDLE),
    ("a pipe", become_pipe, NO_BUNDLE),
    ("links in a circle", become_circle, NO_BUNDLE),
    ("the checkpoint's folder", become_checkpoint, NO_BUNDLE),
    ("the checkpoint's parent", become_parent, NO_BUNDLE),
    ("notes", lambda b: write(b / "notes.txt"), f"holds notes.txt, {FOREIGN}"),
    ("a calibration", lambda b: write(b / "calibration.json", "{}"), f"holds calibration.json, {FOREIGN}"),
    ("other weights", lambda b: write(b / "weights" / "x.safetensors"), f"holds weights/x.safetensors, {FOREIGN}"),
    ("notes on a report", lambda b: write(b / "report" / "a" / "b.md"), f"holds report/a/b.md, {FOREIGN}"),
    ("notes on engines", lambda b: write(b / "engines" / "x" / "log.txt"), f"holds engines/x/log.txt, {FOREIGN}"),
    ("a link", lambda b: (b / "pictures").symlink_to(b.parent), f"holds pictures, {FOREIGN}"),
    ("a checkpoint", checkpoint_within, f"holds weights/original/chat_template.jinja, {FOREIGN}"),
    ("the checkpoint's weights", weights_within, "checkpoint/model.safetensors lies in"),
]  # fmt: skip


def everything(folder: Path) -> dict[str, Any]:
    """Every entry below `folder`: its kind, and its bytes where it is a file."""
    found = sorted(Path(where, name) for where, folders, names in os.walk(folder) for name in folders + names)
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in found
    }


@pytest.fixture
def place(sample_checkpoint: Path, sample_bundle: Bundle, tmp_path: Path) -> Path:
    """A folder of a checkpoint and of a bundle of it."""
    shutil.copytree(sample_checkpoint, tmp_path / "checkpoint")
    shutil.copytree(sample_bundle.folder, tmp_path / "bundle")
    return tmp_path


@pytest.mark.parametrize(("change", "sentence"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_force_replaces_a_bundle_alone(
    place: Path, change: Change, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(place / "bundle")
    before = everything(place)
    capsys.readouterr()
    arguments = ["--model", str(place / "checkpoint"), "--output", str(place / "bundle"), "--force"]
    assert cli.ivc_export(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and len(said.splitlines()) == 1
    assert everything(place) == before


def thesis(output: Path) -> None:
    """Somebody moves the older bundle away and begins to write in its place."""
    output.rename(output.with_name("away"))
    write(output / "thesis.txt")


def link(output: Path) -> None:
    output.rename(output.with_name("away"))
    output.symlink_to("away")


def other_bundle(output: Path) -> None:
    """Another export ends first."""
    path = output / "manifest.json"
    path.write_text(path.read_text().replace('"default_ratio": 0.5', '"default_ratio": 0.4'))


MEANWHILE: list[tuple[str, Change, str]] = [
    ("a folder in its place", thesis, "bundle changed during the export, and stays as it is"),
    ("a link in its place", link, "bundle changed during the export, and stays as it is"),
    ("another bundle", other_bundle, "bundle changed during the export, and stays as it is"),
    ("a file in it", lambda b: write(b / "notes.txt"), "bundle received notes.txt during the export"),
]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("change", "sentence"), [row[1:] for row in MEANWHILE], ids=[row[0] for row in MEANWHILE])
def test_what_appears_during_an_export_stays(
    place: Path, change: Change, sentence: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(staging, "renamed_at_once", lambda first, second: False)
    before: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "weights" and done == total and not before:
            change(place / "bundle")
            before.update(without_staging(place))

    with pytest.raises(UserError, match=sentence):
        export(ExportRecipe(place / "checkpoint", place / "bundle", force=True), progress)
    assert everything(place) == before


def without_staging(place: Path) -> dict[str, Any]:
    return {path: content for path, content in everything(place).items() if not path.startswith(".")}


def test_a_bundle_that_vanishes_during_an_export_is_replaced(place: Path) -> None:
    with staging.staged_folder(place / "bundle", force=True) as folder:
        (folder / "a").write_text("a")
        shutil.rmtree(place / "bundle")
    assert list(files(place / "bundle")) == ["a"]


def test_hidden_folders_of_others_stay(place: Path) -> None:
    """Their names are like those that killed exports leave, and their content is not."""
    for name in (".bundle.partial-notes", ".bundle.replaced-notes"):
        write(place / name / "thesis.txt")
    before = everything(place)
    export(ExportRecipe(place / "checkpoint", place / "bundle", force=True))
    assert everything(place) == before


def test_a_bundle_in_which_engines_are_being_built_stays(place: Path) -> None:
    recipe = ExportRecipe(place / "checkpoint", place / "bundle", force=True)
    with (
        staging.fresh_folder(place / "bundle", staging.WORK),
        pytest.raises(UserError, match="engines are being built in"),
    ):
        export(recipe)
    (place / "bundle" / f"{staging.WORK}killed").mkdir()
    export(recipe)
    assert not list((place / "bundle").glob(f"{staging.WORK}*"))


@pytest.mark.parametrize("family", families.names())
def test_what_commands_write_into_a_bundle_can_be_replaced(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY[family])
    recipe = ExportRecipe(checkpoint, tmp_path / "bundle", testdata=True, force=True)
    export(recipe)
    checked = ["report/parity.json", "report/parity.html", "report/reference/prefill/vision/outputs/image_embeds.bin"]
    built = ["engines/10.3.0-sm87/vision.plan", "engines/10.3.0-sm87/build.json"]
    killed = [".manifest.json.partial-a1b2c3d4", "report/.parity.json.partial-a1b2c3d4", ".build-a1b2c3d4/done/log.txt"]
    for name in (*checked, *built, *killed):
        write(tmp_path / "bundle" / name)
    assert staging.foreign_file(tmp_path / "bundle") is None
    export(recipe)
    assert not (tmp_path / "bundle" / "report").exists()
