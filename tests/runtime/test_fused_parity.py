"""ivc-check on onnxruntime's CUDA provider: what its session shows, on the CPU provider with the same graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_check
from ivc_export.dtypes import FloatName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime import fused_graphs as fused
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.shown import ShownSession
from ivc_export.verify.oracle import record
from ivc_export.verify.parity import compare
from ivc_export.verify.testdata import draw_picture, make_prompt
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import LOGIT_TOLERANCE, random_picture

PROMPT = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llava", "internvl_chat", "internvl3_5"])
def test_every_tensor_is_compared(name: str, dtype: FloatName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llava keeps a layer whole; InternVL has tiles, internvl_chat scores no values, internvl3_5 norms heads;
    qwen3_vl adds to pictures' rows, too.
    """
    monkeypatch.setitem(cast("dict[str, str]", fused.DTYPES), "cpu", dtype)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY[name], dtype=dtype)
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle", max_visual=400))
    image = draw_picture()
    reference = record(bundle, checkpoint, make_prompt(bundle, image)[1], [image], 0.5, 3)
    report, _ = compare(ShownSession(bundle, "cpu"), reference, [image])
    assert report.passed, [c for c in report.comparisons if not c.passed]
    wanted, _ = compare(OnnxSession(bundle), reference, [image])
    assert [c.name for c in report.comparisons] == [c.name for c in wanted.comparisons]


def test_a_replayed_choice_goes_on(golden_bundle: Bundle) -> None:
    """Behind cached rows, too: the rows that another run kept, of which the graph would have kept others."""
    found, wanted = ShownSession(golden_bundle, "cpu").converse(0.5), HostConversation(OnnxSession(golden_bundle), 0.5)
    for seed in (0, 1):
        own = wanted.session.converse(0.5).run(PROMPT, [random_picture(Grid(4, 5), seed)]).keep_index
        visual = np.setdiff1d(np.arange(3, 23), own)
        keep = np.sort(np.append(visual, np.setdiff1d(np.arange(len(PROMPT)), np.arange(3, 23)))).astype(np.int32)
        assert not np.array_equal(keep, own)
        picture = random_picture(Grid(4, 5), seed)
        step, reference = (one.run(PROMPT, [picture], keep) for one in (found, wanted))
        np.testing.assert_array_equal(step.keep_index, keep)
        assert found.cache.length == wanted.cache.length
        assert np.abs(step.logits - reference.logits).max() < LOGIT_TOLERANCE
        for kind in ("prefix", "decoder"):
            for name, array in getattr(reference, kind).items():
                assert np.abs(getattr(step, kind)[name] - array).max() < LOGIT_TOLERANCE, name
        assert np.abs(found.run([5]).logits - wanted.run([5]).logits).max() < LOGIT_TOLERANCE


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(sample_bundle.folder, tmp_path / "bundle")


def test_ivc_check_takes_the_cuda_provider(
    bundle: Path, sample_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the CPU provider in its place; the report says that its tolerances are bounds."""

    def opened(self: FusedSession, bundle: Bundle, **options: object) -> None:
        assert not options
        FusedSession.__init__(self, bundle, "cpu")
        self.backend = "onnxruntime-cuda"

    monkeypatch.setattr(ShownSession, "__init__", opened)
    monkeypatch.setitem(cast("dict[str, str]", fused.DTYPES), "cpu", "float16")
    command = [str(bundle), "--backend", "onnxruntime-cuda", "--against", str(sample_checkpoint), "--steps", "1"]
    assert ivc_check(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "errors of a correct bundle on onnxruntime-cuda in float16 have not been measured yet" in said
    content = json.loads((bundle / "report" / "parity.json").read_text())
    assert (content["backend"], content["dtype"], content["passed"]) == ("onnxruntime-cuda", "float16", True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--backend", "onnxruntime-cuda"], "this onnxruntime has no CUDA provider: install onnxruntime-gpu"),
        (
            ["--backend", "onnxruntime-cuda", "--precision", "float16"],
            "--precision is for onnxruntime-cpu",
        ),
        (["--provider", "cuda"], "--provider was removed: give --backend onnxruntime-cpu in place of --provider cpu"),
        (["--op-library", "lib.so"], "--op-library is for onnxruntime-cuda: use it with --backend onnxruntime-cuda"),
        (["--plugin", "lib.so"], "--plugin is for tensorrt: use it with --backend tensorrt, or leave it out"),
    ],
)
def test_what_the_provider_lacks_is_told_before_the_checkpoint_runs(
    options: list[str],
    sentence: str,
    bundle: Path,
    sample_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ivc_export.verify.oracle.record", lambda *_: pytest.fail("it runs the checkpoint"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert ivc_check([str(bundle), "--against", str(sample_checkpoint), *options]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1
