from __future__ import annotations

import numpy as np
import pytest

from ivc_export.contract.graphs import scored_name
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.chat import Sampling, generate
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from tests.conftest import GOLDENS, LOGIT_TOLERANCE, Golden

INPUTS = sorted((GOLDENS / "model").glob("*/input-*.npz"))


@pytest.fixture(scope="module", params=INPUTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param.parent, dict(np.load(request.param)))


@pytest.fixture(scope="module")
def golden_session(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> OnnxSession:
    output = tmp_path_factory.mktemp("golden") / "bundle"
    return OnnxSession(export(ExportRecipe(golden.folder, output, layer=int(golden.data["ivcp_k"]))))


def ratio(golden: Golden, kind: str) -> float:
    """The ratio that keeps as many visual tokens as the official code did."""
    return 1.0 if kind == "unpruned" else golden.kept / int(golden.data["visual_len"])


@pytest.mark.parametrize("capacity", [None, 840], ids=["exact-length", "fixed-capacity"])
@pytest.mark.parametrize("kind", ["pruned", "unpruned"])
def test_the_model_equals_the_official_code(
    golden: Golden, golden_session: OnnxSession, kind: str, capacity: int | None
) -> None:
    conversation = HostConversation(golden_session, ratio(golden, kind), capacity)
    step = conversation.run(golden.tokens, [golden.picture])
    np.testing.assert_array_equal(step.run.position_ids[:, 0], np.atleast_2d(golden.data["position_ids"]))
    rows = golden.data["keep_indices"] if kind == "pruned" else np.arange(len(golden.tokens))
    np.testing.assert_array_equal(step.keep_index, rows)
    assert conversation.cache.length == len(rows)
    for wanted, token in zip(golden.data[f"{kind}_step_logits"], golden.data[f"{kind}_tokens"], strict=True):
        assert np.abs(step.logits - wanted).max() < LOGIT_TOLERANCE
        assert step.logits.argmax() == token
        step = conversation.run([token])


def test_every_cache_holds_as_many_rows_as_the_official_ones(golden: Golden, golden_session: OnnxSession) -> None:
    conversation = HostConversation(golden_session, ratio(golden, "pruned"))
    conversation.run(golden.tokens, [golden.picture])
    assert len(golden.cache_lengths) == golden_session.bundle.manifest.decoder.layers
    for layer, rows in enumerate(golden.cache_lengths):
        for kind in ("key", "value"):
            assert conversation.cache[f"past_{kind}.{layer}"].shape[2] == rows


def test_greedy_generation_gives_the_official_tokens(golden: Golden, golden_session: OnnxSession) -> None:
    for kind in ("pruned", "unpruned"):
        drawn = generate(
            HostConversation(golden_session, ratio(golden, kind)),
            golden.tokens,
            [golden.picture],
            Sampling(max_tokens=16),
            stop=(),
        )
        assert list(drawn) == golden.data[f"{kind}_tokens"].tolist()


def test_scores_come_from_the_official_values(golden: Golden, golden_session: OnnxSession) -> None:
    step = HostConversation(golden_session).run(golden.tokens, [golden.picture])
    m = golden_session.bundle.manifest
    values = step.prefix[scored_name(m.selection, m.selection_layer)][0].transpose(1, 0, 2)
    assert np.abs(values - golden.data["critical_values"]).max() < LOGIT_TOLERANCE
