"""What onnxruntime raises, told with its reason; what it does not raise is not hidden."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.runtime.failures import is_short_of_memory, own, told
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.tensorrt import device

SHORT, OTHERWISE = "make room", "look after it"


def raised(error: Exception) -> BaseException:
    """What comes of an exception."""
    try:
        with told("prefix cannot run", SHORT, OTHERWISE):
            raise error
    except Exception as found:
        return found


@pytest.mark.parametrize(
    "error",
    [
        state.Fail("Failed to allocate memory for requested buffer of size 40000"),
        state.RuntimeException("CUDA failure 2: out of memory ; GPU=0"),
        state.Fail("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 40000"),
        MemoryError("std::bad_alloc"),
        MemoryError(),
    ],
    ids=repr,
)
def test_lack_of_memory_is_told_with_its_reason(error: Exception) -> None:
    found = raised(error)
    assert isinstance(found, UserError) and found.__cause__ is error
    assert str(found) == f"prefix cannot run for lack of memory ({str(error) or 'MemoryError'}): {SHORT}"


def test_what_else_onnxruntime_raises_is_told_with_its_reason() -> None:
    error = state.InvalidArgument("Got invalid dimensions for input: x\n index: 0 Got: 2 Expected: 1\n")
    wanted = "prefix cannot run (Got invalid dimensions for input: x index: 0 Got: 2 Expected: 1): look after it"
    assert str(raised(error)) == wanted


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("out of memory"), RuntimeError("x"), UserError("x")], ids=repr
)
def test_what_onnxruntime_does_not_raise_passes_through(error: Exception) -> None:
    assert raised(error) is error


def run_node(operator: str, x: npt.NDArray[Any], shape: list[int]) -> None:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
    inputs += [helper.make_tensor_value_info("s", TensorProto.INT64, ["n"])]
    node = helper.make_node(operator, ["x", "s"], ["y"])
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"x": x, "s": np.array(shape)})


def test_onnxruntimes_own_words_are_known() -> None:
    with pytest.raises(own()) as found:
        run_node("Expand", np.zeros(1, np.float32), [10**13])
    assert is_short_of_memory(found.value)
    with pytest.raises(own()) as found:
        run_node("Expand", np.zeros(2, np.float32), [2])
    assert not is_short_of_memory(found.value)
    with pytest.raises(MemoryError) as error:
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([10**13], np.float32)
    assert is_short_of_memory(error.value)


@pytest.mark.parametrize("fused", [False, True])
def test_programming_errors_are_not_called_lack_of_memory(
    fused: bool, golden_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = (
        FusedConversation(FusedSession(golden_bundle, "cpu")) if fused else HostConversation(OnnxSession(golden_bundle))
    )

    class Broken:
        def run(self, *_: object) -> None:
            raise TypeError("a bug")

        run_with_iobinding = run

    session = one.session
    assert isinstance(session, FusedSession | OnnxSession)
    whole = session._sessions["prefix"]
    monkeypatch.setitem(session._sessions, "prefix", Broken())
    if isinstance(session, FusedSession):  # which binds first
        bind = session.bind
        monkeypatch.setattr(session, "bind", lambda name, *of: None if name == "prefix" else bind(name, *of))
    with pytest.raises(TypeError, match="a bug"):
        one.run([1, 2])
    monkeypatch.undo()
    assert session._sessions["prefix"] is whole and np.isfinite(one.run([1, 2]).logits).all()


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x08\x08\x12" + b"\xff" * 40, None], ids=["none", "x", "cut", "other"]
)
def test_a_damaged_graph_is_one_sentence(content: bytes | None, golden_bundle: Bundle, tmp_path: Path) -> None:
    """Also one that is not what the manifest says."""
    bundle = Bundle.load(shutil.copytree(golden_bundle.folder, tmp_path / "bundle"))
    path, other = bundle.folder / "prefix.onnx", bundle.folder / "decoder.onnx"
    path.write_bytes(other.read_bytes() if content is None else content)
    wanted = r"prefix\.onnx is not the graph that was exported: .*export the model again"
    with pytest.raises(UserError, match=wanted):
        bundle.graph("prefix")
    with pytest.raises(UserError, match=wanted):
        FusedSession(bundle, "cpu")


def cuda(status: int) -> Any:
    """The module of CUDA's runtime API as far as an allocation goes; `status` is what that comes to."""
    names = ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice")
    return SimpleNamespace(
        cudaMemcpyKind=SimpleNamespace(**dict.fromkeys(names)),
        cudaStreamCreate=lambda: (0, 1),
        cudaMalloc=lambda size: (status, 64),
        cudaMemsetAsync=lambda *_: (0,),
        cudaStreamSynchronize=lambda stream: (0,),
        cudaStreamDestroy=lambda stream: (0,),
        cudaGetErrorString=lambda status: (0, b"the driver is gone"),
    )


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (2, "the GPU has no 3.0 kB of memory left"),
        (4, "CUDA says: the driver is gone; check that the GPU and its driver work"),
    ],
)
def test_a_gpu_that_fails_is_not_called_full(status: int, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, device.MODULE, cuda(status))
    with pytest.raises(UserError, match=sentence):
        device.CudaDevice().allocate(3000)
    monkeypatch.setitem(sys.modules, device.MODULE, cuda(0))
    assert device.CudaDevice().allocate(3000) == 64
