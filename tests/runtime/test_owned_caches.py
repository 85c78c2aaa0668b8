"""Engines whose decoder layers write to caches of the runtime's, with a stand-in for TensorRT and for our kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Visual
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.tensorrt.session import TensorrtConversation
from samples.make_sample import make_checkpoint
from samples.tiny import wide
from tests.conftest import LOGIT_TOLERANCE
from tests.runtime.fake_tensorrt import HostDevice
from tests.runtime.test_tensorrt import opened

Turns = list[tuple[list[int], list[Visual]]]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "llava", "internvl"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "checkpoint", wide(request.param, heads=4))
    return export(ExportRecipe(checkpoint, folder / "bundle", max_visual=400))


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "libivc_plugin.so"
    path.write_bytes(b"a library")
    return path


def turns(bundle: Bundle) -> Turns:
    noise = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    picture = families.preparation(bundle.manifest).picture(PIL.Image.fromarray(noise), bundle.manifest.tokens.image)
    shown = [1, 2, *picture.tokens, 7, 8, 9]
    return [
        (shown, [picture]),
        ([5], []),
        ([6], []),
        ([7], []),
        ([4, 3, 2], []),
        (shown, [picture]),
        ([9], []),
        ([8], []),
    ]


def spoil(conversation: TensorrtConversation, device: HostDevice) -> None:
    """Something in rows of the caches that hold nothing yet."""
    for tensor in conversation.cache.written.values():
        assert tensor.address in device.memory
        garbage = np.full(tensor.shape, 100, tensor.dtype)
        device.upload(tensor.address, garbage)


def test_conversations_equal_those_on_the_host(bundle: Bundle, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them on one engine, a turn of each at a time; caches begin with garbage in all their rows."""
    session, device = opened(bundle, monkeypatch, max_visual=400, max_new=1024, plugin=plugin)
    copies: list[int] = []
    copy = device.copy_blocks

    def counted(*arguments: int) -> None:
        copies.append(arguments[0])
        copy(*arguments)

    monkeypatch.setattr(device, "copy_blocks", counted)
    pairs = [(session.converse(r), HostConversation(OnnxSession(bundle), r)) for r in (0.4, 0.7)]
    layers, whole = bundle.manifest.decoder.layers, bundle.manifest.selection.whole_layers
    for found, _ in pairs:
        spoil(found, device)
        assert len(found.cache.written) == 2 * (layers - len(whole))
    for number, (tokens, pictures) in enumerate(turns(bundle)):
        for found, wanted in pairs:
            step, reference = found.run(tokens, pictures), wanted.run(tokens, pictures)
            np.testing.assert_array_equal(step.keep_index, reference.keep_index)
            assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
            if number in (0, 1, 5):
                assert step.decoder.keys() == reference.decoder.keys()
                for name, array in reference.decoder.items():
                    np.testing.assert_allclose(step.decoder[name], array, atol=LOGIT_TOLERANCE, err_msg=name)
    assert len(copies) == 2 * len(pairs) * len(turns(bundle)) * len(whole)  # other layers' rows are where they belong
    device.check()


@pytest.mark.parametrize("owned", [True, False])
def test_decode_steps_are_replayed(bundle: Bundle, plugin: Path, owned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step as it is, one captured too, and every further one a launch that begins no engine: so in each of two
    conversations by turns, whose caches lie apart."""
    maxima = {"max_visual": 400, "max_new": 1024}
    session, device = opened(bundle, monkeypatch, **maxima, plugin=plugin if owned else None)
    contexts = [session.engines[name].contexts["decode"] for name in ("prefix", "decoder")]
    pairs = [(session.converse(r), HostConversation(OnnxSession(bundle), r)) for r in (0.4, 0.7)]
    assert all(bool(found.cache.written) == owned for found, _ in pairs)
    decoded = 0
    for tokens, pictures in turns(bundle):
        decoded += len(tokens) == 1
        for found, wanted in pairs:
            before = [context.started for context in contexts], device.replays
            step, reference = found.run(tokens, pictures), wanted.run(tokens, pictures)
            assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
            if len(tokens) == 1 and decoded > 2:
                assert ([context.started for context in contexts], device.replays) == (before[0], before[1] + 1)
    assert decoded == 5 and device.replays == len(pairs) * (decoded - 2)
    device.check()


def test_a_step_that_cannot_be_captured_runs_all_the_same(
    bundle: Bundle, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, device = opened(bundle, monkeypatch, max_visual=400, plugin=plugin)
    monkeypatch.setattr(device, "capture", lambda work: None)
    found, wanted = session.converse(), HostConversation(OnnxSession(bundle))
    for tokens, pictures in turns(bundle)[:5]:
        step, reference = found.run(tokens, pictures), wanted.run(tokens, pictures)
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
