"""What ivc-bench --report writes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from ivc_export.bench.facts import board
from ivc_export.bench.posting import posted
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.tensorrt.graphs import EngineChoices
from ivc_export.tensorrt.profiles import profile_names
from ivc_export.tensorrt.recipe import EngineRecipe
from ivc_export.tensorrt.store import BuiltEngine, make_record


def test_a_report_holds_the_engines_record_and_no_folders(sample_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(sample_bundle.folder, tmp_path / "private" / "bundle"))
    plugin = tmp_path / "private" / "libivc_plugin.so"
    plugin.write_bytes(b"a library")
    trt = SimpleNamespace(__version__="10.3.0")
    choices = EngineChoices("tensorrt", "float32", "plugin", "float32", "grouped")
    record = make_record(bundle, EngineRecipe(plugin=plugin), trt, "8.7", choices)
    built = {n: BuiltEngine(file=f"{n}.plan", bytes=1, profiles=profile_names(n)) for n in GRAPH_NAMES}
    for name, text in (
        ("10.3.0-sm87", record.model_copy(update={"engines": built}).model_dump_json()),
        ("8.6.2-sm87", "{"),
    ):
        folder = bundle.folder / "engines" / name
        folder.mkdir(parents=True)
        (folder / "build.json").write_text(text)
    command = f"ivc-bench {bundle.folder} --plugin={plugin} --against owner/name --json {tmp_path}/a.json"
    found = posted({"command": command, "rows": []}, bundle)
    assert found["command"] == "ivc-bench bundle --plugin=libivc_plugin.so --against name --json a.json"
    assert found["engines"]["8.6.2-sm87"] == "build.json cannot be read"
    assert found["engines"]["10.3.0-sm87"]["recipe"]["plugin"] == "libivc_plugin.so"
    assert found["engines"]["10.3.0-sm87"]["plugin_sha256"] == record.plugin_sha256
    assert "private" not in json.dumps(found)


def test_a_jetson_says_what_it_is(tmp_path: Path) -> None:
    assert board(tmp_path) is None
    for name, text in (
        ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\nmore\n"),
        ("proc/device-tree/model", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    found = board(tmp_path)
    assert found is not None and found["l4t"].startswith("R36 (release), REVISION: 4.3")
    assert found["model"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
