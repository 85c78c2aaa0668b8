"""Whatever ends an export, nothing half-written opens as a bundle, and an older bundle is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ivc_export import staging
from ivc_export.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.export import export
from ivc_export.recipe import ExportRecipe
from tests.test_export import files

POINTS = 20

KILLED_AT_EVERY_POINT = """
import json, os, signal, sys
from pathlib import Path
from ivc_export.export import export
from ivc_export.recipe import ExportRecipe

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
        pytest.raises(UserError, match="came to exist"),
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
