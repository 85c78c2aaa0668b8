"""benchmarks.tensorrt_layers on a small model, with stand-ins for TensorRT and a GPU: what it builds and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from benchmarks import tensorrt_layers as layers
from ivc_export.checkpoint.weights import read_values
from samples.tiny import TINY
from tests.runtime.fake_tensorrt import CAPABILITY, FakeTensorrt, HostDevice


def plan(trt: Any, model: ir.Model, profiles: Any, options: Any, work: Path) -> bytes:
    """The graph in the place of an engine, with its weights in it."""
    assert options.tactic_sources and all(profiles)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            value.const_value = ir.tensor(read_values(value.const_value), name=name)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def config(count: int, depth: int) -> dict[str, Any]:
        tiny = TINY["qwen2_vl"]
        return {**tiny, "num_hidden_layers": count, "vision_config": {**tiny["vision_config"], "depth": depth}}

    for name, value in {
        "qwen2_vl_2b": config,
        "compile_graph": plan,
        "load_tensorrt": lambda _: FakeTensorrt(SimpleNamespace(folder=tmp_path)),  # type: ignore[arg-type]
        "own_capability": lambda _: CAPABILITY,
        "make_logger": lambda _: None,
        "CudaDevice": HostDevice,
        "ROUNDS": 1,
        "RUNS": 1,
    }.items():
        monkeypatch.setattr(layers, name, value)


@pytest.mark.usefixtures("stand_ins")
def test_it_builds_and_times_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["vision-float16", "repeated", "grouped/prefix", "grouped/select", "grouped/compact", "grouped/decoder"]
    for what in ("build", "time"):
        options = ["--only", *names, "--visual", "1024", "--output", str(tmp_path / "found.json")]
        monkeypatch.setattr(sys, "argv", ["tensorrt_layers", what, str(tmp_path), *options])
        layers.main()
    found = json.loads((tmp_path / "found.json").read_text())
    kinds = ["vision-float16", *["repeated"] * 4, *["grouped"] * 4]
    assert [row["kind"] for row in found["rows"]] == kinds
    assert found["rows"][0]["patches"] == 4096 and "vision_ms_a_layer" in found["rows"][0]
    for row in found["rows"][1:]:
        assert {"prefix_ms_a_layer", "decoder_ms_a_layer", "select_ms"} <= row.keys()
        assert row["prefix_captured"] and row["residual_sums"] == "float32"
    assert [layers.residual_sums(kind) for kind in ("plugin", "plugin-int4")] == ["float16", "float16"]
    assert found["scratch_bytes"]["repeated"] == {"prefix": 1024, "decoder": 1024}


@pytest.mark.usefixtures("stand_ins")
def test_what_it_does_not_know_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tensorrt_layers", "build", str(tmp_path), "--only", "grouped/vision-1"])
    with pytest.raises(SystemExit, match="there is no grouped/vision-1: give some of vision-float16"):
        layers.main()
