"""What is asked of the packages that we stand on, and what we ask of them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import onnxruntime
import pytest

from ivc_export.runtime import probes as base
from ivc_export.runtime.onnxruntime import probes
from tools.lowest import lowest


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


def test_every_requirement_has_a_lower_bound_and_is_met() -> None:
    pins = [line.partition(";") for line in lowest(["cpu"]) if "python_version <" not in line]
    assert len(pins) == 12
    for pin, _, _ in pins:
        name, least = pin.split("==")
        assert numbers(version(name)) >= numbers(least), pin


def test_lowest_prints_the_extras_that_are_asked_for() -> None:
    command = [sys.executable, "-m", "tools.lowest", "cpu", "check"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == lowest(["cpu", "check"]) and len(lines) == len(lowest()) + 5
    assert "onnxruntime==1.24.1; python_version >= '3.11'" in lines and "jinja2==3.1.6" in lines


@pytest.mark.parametrize(("chosen", "kept"), [(None, False), ("0", True)])
def test_onnxruntime_records_events_only_where_a_user_asks_for_it(
    tmp_path: Path, chosen: str | None, kept: bool
) -> None:
    mine = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    mine |= {"XDG_CACHE_HOME": str(tmp_path)} | ({"ORT_DISABLE_TELEMETRY": chosen} if chosen else {})
    code = "import ivc_export.runtime.onnxruntime.cpu, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], env=mine, capture_output=True, text=True, check=True)
    assert done.stdout == f"{chosen or 1}\n"
    if not kept:
        assert list(tmp_path.rglob("*onnxruntime*")) == []


ORT_VALUE = onnxruntime.OrtValue


class Watched:
    """OrtValue, and whether the arrays that it was made of are alive: not every onnxruntime's binding keeps them."""

    def __init__(self) -> None:
        self.arrays: list[weakref.ref[Any]] = []

    def ortvalue_from_numpy(self, array: Any, *place: Any) -> Any:
        self.arrays.append(weakref.ref(array))
        return ORT_VALUE.ortvalue_from_numpy(array, *place)

    def alive(self) -> bool:
        gc.collect()
        return len(self.arrays) > 0 and all(array() is not None for array in self.arrays)


def test_bound_arrays_live_while_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, seen = Watched(), []

    def best(call: Callable[[], object]) -> float:
        seen.append(watched.alive())
        watched.arrays.clear()
        return 1.0

    monkeypatch.setattr(onnxruntime, "OrtValue", watched)
    monkeypatch.setattr(probes, "best", best)
    monkeypatch.setitem(cast("dict[str, Any]", base.SIZES), "cpu", (64, 4096))
    probes.onnxruntime_ceilings("cpu", "float32")
    assert seen == [True, True]


def test_bound_arrays_live_while_a_part_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    add (float[2] x, float[2] y) => (float[2] z) { z = Add(x, y) }"""
    timed, watched, seen = probes.Timed(ir.from_onnx_text(text)), Watched(), []
    whole = timed.session

    class Session:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def run_with_iobinding(self, binding: Any) -> None:
            seen.append(watched.alive())
            whole.run_with_iobinding(binding)

    timed.session = Session()
    monkeypatch.setattr(onnxruntime, "OrtValue", watched)
    timed.seconds({}, {})
    assert len(seen) > 2 and all(seen)


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="onnxruntime for Python 3.10 reads them: our check alone refuses"
)
def test_onnxruntime_refuses_weights_outside_a_models_folder(tmp_path: Path) -> None:
    """What makes 1.24.1 the lowest, beside our own check."""
    (tmp_path / "outside.bin").write_bytes(bytes(64))
    (tmp_path / "inside").mkdir()
    model = base.one_node("Neg", (16,), 1, "float32")
    weight = ir.ExternalTensor("../outside.bin", 0, 64, ir.DataType.FLOAT, shape=ir.Shape((16,)), name="w")
    value = ir.Value(name="w", shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight)
    model.graph.register_initializer(value)
    model.graph[0].replace_input_with(0, value)
    path = tmp_path / "inside" / "model.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(Exception, match=r"(?i)external data|outside|escapes"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
