"""benchmarks.join_results: one results file of several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import join_results

COMMAND = "python -m benchmarks.gpu_generate --sizes 256 --checkpoint /a/b --op-library /a/lib.so --output /a/c.json"
GPU = {"name": "NVIDIA H200", "driver": "1"}


def written(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def run(tmp_path: Path, name: str, **more: Any) -> str:
    """A run's file, with an answer of 40 tokens."""
    rows = [{"side": name, "tokens": list(range(40))}]
    content = {"command": COMMAND, "gpu": GPU, "settings": {"count": 39}, "rows": rows, "failures": {}}
    return written(tmp_path / f"{name}.json", content | more)


def test_runs_are_joined_without_places_of_files(tmp_path: Path) -> None:
    output = tmp_path / "joined.json"
    files = {name: run(tmp_path, name, profiles=[name]) for name in ("turns", "profile", "beside", "long")}
    others = [word for name in ("profile", "beside", "long") for word in (f"--{name}", files[name])]
    join_results.main(["generate", files["turns"], *others, "--note", "a remark", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["profiles"] == ["profile"] and found["notes"] == ["a remark"]
    parts = (found["rows"], found["beside"]["rows"], found["long"]["rows"])
    assert [rows[0]["side"] for rows in parts] == ["turns", "beside", "long"]
    assert found["rows"][0]["tokens"] == list(range(join_results.SHOWN))
    command = "python -m benchmarks.gpu_generate --sizes 256 --checkpoint CHECKPOINT --op-library lib.so"
    assert {found["command"], found["profile_command"], found["long"]["command"]} == {command}


def test_runs_of_packed_weights_are_joined(tmp_path: Path) -> None:
    output = tmp_path / "joined.json"
    content = {"command": "python -m benchmarks.cuda_packed --folder /a", "gpu": GPU, "decoded_tokens": 32, "rounds": 7}
    rows = {"float16": {"decode": 2}, "int4": {"decode": 1}}
    turns, without = (written(tmp_path / name, content | {"rows": rows}) for name in ("turns", "without"))
    profile = written(tmp_path / "profile", {"first": {"kernels": []}, "decode": {"kernels": [1]}})
    join_results.main(["packed", turns, "--without", without, "--profile", profile, "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["command"] == "python -m benchmarks.cuda_packed" and found["without_library"]["rows"] == rows
    kernels = {"first_token": {"kernels": []}, "decode": {"kernels": [1]}}
    assert found["profile"] == {"what": "int4", "decoded_tokens": 32, **kernels}


def test_files_are_named_after_the_gpu() -> None:
    assert join_results.short_name({"gpu": GPU}) == "h200" and join_results.short_name({"gpu": None}) == "gpu"
