"""The memory of all weights in one allocation, on the CPU provider."""

from __future__ import annotations

import gc
import os
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.families.pictures import Grid
from ivc_export.runtime.onnxruntime.cuda import FusedConversation, FusedSession
from ivc_export.runtime.onnxruntime.fused_graphs import FusedGraphs
from ivc_export.runtime.onnxruntime.loading import share_arena, small_workspaces
from ivc_export.runtime.onnxruntime.weights_memory import ALIGNMENT, WeightsMemory, room, view
from tests.conftest import random_picture

PROMPT = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]
ARRAYS: list[npt.NDArray[Any]] = [
    np.arange(15, dtype=np.float16).reshape(3, 5),
    np.arange(7, dtype=np.uint8),
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.array(5, np.int64),
    np.arange(300, dtype=np.int32).reshape(1, 300),
]


def test_places_hold_arrays_of_all_types_and_outlive_their_owner() -> None:
    memory = WeightsMemory(sum(room(array.nbytes) for array in ARRAYS), "cpu")
    placed = [memory.place(array) for array in ARRAYS]
    del memory
    gc.collect()
    for value, array in zip(placed, ARRAYS, strict=True):
        found = value.numpy()
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)
    ends = [value.data_ptr() + room(array.nbytes) for value, array in zip(placed, ARRAYS, strict=True)]
    assert [value.data_ptr() for value in placed[1:]] == ends[:-1]
    assert all((value.data_ptr() - placed[0].data_ptr()) % ALIGNMENT == 0 for value in placed)


def test_a_full_memory_takes_nothing_more() -> None:
    memory = WeightsMemory(ALIGNMENT, "cpu")
    memory.place(ARRAYS[0])
    with pytest.raises(ValueError, match="512 bytes of weights do not fit into 256"):
        memory.place(ARRAYS[1])


def test_a_view_of_all_shares_memory() -> None:
    memory = WeightsMemory(ALIGNMENT, "cpu")
    value = memory.place(ARRAYS[0])
    assert view(value).data_ptr() == value.data_ptr() and view(value).shape() == [3, 5]


def test_sessions_read_weights_from_one_allocation(golden_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights are there once, and the memory is exactly as large as they are."""
    picture, seen = random_picture(Grid(4, 5), 0), list[WeightsMemory]()
    wanted = FusedConversation(FusedSession(golden_bundle, "cpu"), 0.4, capacity=64).run(PROMPT, [picture])

    def of(models: list[ir.Model], device: str) -> WeightsMemory:
        seen.append(cast(WeightsMemory, made(models, device)))
        return seen[0]

    assert WeightsMemory.works("cpu")
    made = WeightsMemory.of
    monkeypatch.setattr(WeightsMemory, "of", of)
    monkeypatch.setattr(FusedGraphs, "_in_one", lambda self: True)
    session = FusedSession(golden_bundle, "cpu")
    found = FusedConversation(session, 0.4, capacity=64).run(PROMPT, [picture])
    np.testing.assert_array_equal(found.logits, wanted.logits)
    assert len(seen) == 1 and seen[0]._used == seen[0]._size
    del session, found
    gc.collect()


@pytest.mark.parametrize("chosen", [None, ":16:8"])
def test_cublas_workspaces_are_small_unless_the_user_chose(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    if chosen is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, chosen)
    with small_workspaces():
        assert os.environ[name] == (chosen or ":4096:1")
    assert os.environ.get(name) == chosen


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is CUDA")
def test_without_cuda_sessions_share_no_arena() -> None:
    assert not share_arena()
