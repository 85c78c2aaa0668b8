"""Runs that cannot be, in every runtime: one sentence each, and the conversation goes on as if they had not been."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_run
from ivc_export.cli import run as run_module
from ivc_export.errors import UserError
from ivc_export.families.pictures import Grid, Visual
from ivc_export.runtime.backends import open_session
from ivc_export.runtime.interface import Conversation, Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from tests.conftest import random_picture
from tests.runtime.test_tensorrt import opened

WHOLE = random_picture(Grid(2, 2), 0)
PROMPT = [1, *[503] * 4, 2]
KEPT = [0, 2, 5]


def altered(**inputs: npt.NDArray[Any] | None) -> Visual:
    """A picture with other inputs, or without them."""
    changed = {name: array for name, array in {**WHOLE.inputs, **inputs}.items() if array is not None}
    return Visual(changed, WHOLE.grid, WHOLE.token_id)


PIXELS, PLACES = WHOLE.inputs["pixel_values"], WHOLE.inputs["patch_position"]
TOKENS: Mapping[str, tuple[Any, str]] = {
    "beyond int32": ([1, 2**40], "token id 1099511627776 is beyond the vocabulary of 512"),
    "beyond int64": ([1, 2**70], "not a list of whole numbers: give token ids of the bundle's tokenizer"),
    "fractions": ([1.5, 2.0], "not a list of whole numbers"),
    "rows of rows": ([[1, 2]], "not a list of whole numbers"),
    "truth": ([True, False], "not a list of whole numbers"),
    "words": (["a", "b"], "not a list of whole numbers"),
}
PICTURES: Mapping[str, tuple[Visual, str]] = {
    "no pixels": (altered(pixel_values=None), r"a picture's pixel_values is missing, but this model takes \['B',"),
    "no places": (altered(patch_position=None), "a picture's patch_position is missing"),
    "no frames": (altered(pixel_values=PIXELS[0]), r"pixel_values is of shape \[16, 1176\]"),
    "other patches": (altered(pixel_values=PIXELS[:, :, :-1]), r"pixel_values is of shape \[1, 16, 1175\]"),
    "no patches": (altered(pixel_values=PIXELS[:, :0]), r"pixel_values is of shape \[1, 0, 1176\]"),
    "places of fewer": (altered(patch_position=PLACES[:8]), r"a picture's patch_position is of shape \[8, 2\]"),
    "fewer": (
        altered(pixel_values=PIXELS[:, :8], patch_position=PLACES[:8]),
        "a picture has the pixels of 2 visual tokens, but its grid has 4: prepare the picture with this bundle's",
    ),
    "more": (
        altered(pixel_values=np.tile(PIXELS, (1, 2, 1)), patch_position=np.tile(PLACES, (2, 1))),
        "the pixels of 8 visual tokens, but its grid has 4",
    ),
}
CHOICES: Mapping[str, Any] = {
    "nothing": [],
    "below": [-1, 2],
    "beyond": [0, 6],
    "twice": [0, 2, 2],
    "falling": [2, 0],
    "fractions": [0.5, 2.0],
    "rows of rows": [[0, 2]],
}


@pytest.fixture(params=["onnxruntime", "fused", "tensorrt"], scope="module")
def session(request: pytest.FixtureRequest, golden_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Session:
    if request.param == "onnxruntime":
        return OnnxSession(golden_bundle)
    if request.param == "fused":
        return FusedSession(golden_bundle, "cpu")
    bundle = Bundle.load(shutil.copytree(golden_bundle.folder, tmp_path_factory.mktemp("engines") / "bundle"))
    with pytest.MonkeyPatch.context() as patch:
        return opened(bundle, patch)[0]


def check(conversation: Conversation, sentence: str, *given: Any) -> None:
    conversation.run([1, 2])
    with pytest.raises(UserError, match=sentence):
        conversation.run(*given)
    assert (conversation.cache.length, conversation.next_position) == (2, 2)
    assert np.isfinite(conversation.run([3]).logits).all()


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_that_are_none(name: str, session: Session) -> None:
    tokens, sentence = TOKENS[name]
    check(session.converse(), sentence, tokens)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_do_not_fit(name: str, session: Session) -> None:
    picture, sentence = PICTURES[name]
    check(session.converse(), sentence, PROMPT, [picture])


@pytest.mark.parametrize("name", CHOICES)
def test_choices_that_cannot_be(name: str, session: Session) -> None:
    sentence = "the rows to keep are not ascending numbers from 0 to 5: give the rows of this same run"
    check(session.converse(), sentence, PROMPT, [WHOLE], np.array(CHOICES[name]))
    conversation: Any = session.converse()
    step = conversation.run(PROMPT, [WHOLE], KEPT)
    assert step.keep_index.tolist() == KEPT and conversation.cache.length == 3


@pytest.mark.parametrize(
    ("backend", "options", "sentence"),
    [
        (
            "torch",
            {},
            "there is no backend torch: give one of onnxruntime-cpu, onnxruntime-cuda, tensorrt, tensorrt-rtx",
        ),
        ("onnxruntime", {}, "there is no backend onnxruntime: give one of onnxruntime-cpu"),
        ("onnxruntime-cpu", {"plugin": "lib.so"}, "onnxruntime-cpu takes no plugin: leave it out"),
        ("tensorrt-rtx", {"plugin": "lib.so"}, "tensorrt-rtx takes no plugin: leave it out .its options: none"),
    ],
)
def test_runtimes_that_are_none(backend: str, options: Any, sentence: str, golden_bundle: Bundle) -> None:
    with pytest.raises(UserError, match=sentence):
        open_session(golden_bundle, backend, **options)


def test_what_a_runtime_raises_ends_a_command_with_one_sentence(
    sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lack of memory, and values beyond float16's range."""
    for broken, sentence in (
        (MemoryError("std::bad_alloc"), "prefix cannot run for lack of memory (std::bad_alloc): use smaller pictures"),
        (UserError("an embedding ends"), "an embedding ends"),
    ):

        class Broken:
            def run(self, *_: object, error: Exception = broken) -> None:
                raise error

        session = OnnxSession(sample_bundle)
        session._sessions["prefix"] = Broken()
        monkeypatch.setattr(run_module, "open_session", lambda *_, found=session, **__: found)
        assert ivc_run([str(sample_bundle.folder), "--prompt", "Hello"]) == 2
        captured = capsys.readouterr()
        assert sentence in " ".join(captured.err.split()) and "Traceback" not in captured.err
