"""Conversations of several threads over one session: a run at a time, and nothing of one in another."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.families.pictures import Grid, Visual
from ivc_export.runtime.interface import Conversation, Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from tests.conftest import random_picture
from tests.runtime.test_tensorrt import opened

GRIDS = (Grid(4, 5), Grid(3, 4), Grid(1, 1))
ROUNDS = 3


@pytest.fixture(params=["onnxruntime", "fused", "tensorrt"])
def session(
    request: pytest.FixtureRequest, golden_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Session:
    if request.param == "onnxruntime":
        return OnnxSession(golden_bundle)
    if request.param == "fused":
        return FusedSession(golden_bundle, "cpu")
    return opened(Bundle.load(shutil.copytree(golden_bundle.folder, tmp_path / "bundle")), monkeypatch)[0]


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def turns(number: int) -> list[tuple[list[int], list[Visual]]]:
    """A picture, decode steps, and a turn without a picture, other ones for each thread."""
    grid = GRIDS[number]
    prompt = [1, 2, 500, *[503] * grid.visual, 501, 7 + number, 8, 9]
    steps: list[tuple[list[int], list[Visual]]] = [([20 + number + i], []) for i in range(4)]
    return [(prompt, [random_picture(grid, number)]), *steps, ([5, 6, number], [])]


def answers(session: Session, number: int, start: threading.Barrier | None = None) -> list[npt.NDArray[Any]]:
    """The logits of one thread's conversations, one after the other."""
    found = []
    if start:
        start.wait()
    for _ in range(ROUNDS):
        conversation = session.converse(0.4)
        found += [conversation.run(tokens, pictures).logits for tokens, pictures in turns(number)]
    return found


def test_conversations_of_threads_equal_those_one_after_the_other(session: Session) -> None:
    wanted = [answers(session, number) for number in range(len(GRIDS))]
    start = threading.Barrier(len(GRIDS))
    with ThreadPoolExecutor(len(GRIDS)) as pool:
        found = list(pool.map(lambda number: answers(session, number, start), range(len(GRIDS))))
    for ours, reference in zip(found, wanted, strict=True):
        for logits, alone in zip(ours, reference, strict=True):
            np.testing.assert_array_equal(logits, alone)


def test_a_run_waits_for_the_one_before(session: Session) -> None:
    conversation: Conversation = session.converse()
    done = threading.Event()

    def run() -> None:
        conversation.run([1, 2])
        done.set()

    thread = threading.Thread(target=run)
    with session.lock:
        thread.start()
        assert not done.wait(0.2)
        session.converse().run([1, 2])  # the thread that holds the lock goes on
    thread.join()
    assert done.is_set() and conversation.cache.length == 2
