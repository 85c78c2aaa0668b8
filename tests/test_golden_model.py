from __future__ import annotations

import numpy as np
import pytest

from ivc_export.runtime.conversation import Conversation
from ivc_export.runtime.generate import Sampling, generate
from ivc_export.runtime.session import OnnxSession
from tests.conftest import LOGIT_TOLERANCE, Golden


@pytest.mark.parametrize("capacity", [None, 192], ids=["exact-length", "fixed-capacity"])
@pytest.mark.parametrize(("kind", "ratio"), [("pruned", 0.5), ("unpruned", 1.0)])
def test_the_model_equals_the_official_code(
    golden: Golden, golden_session: OnnxSession, kind: str, ratio: float, capacity: int | None
) -> None:
    conversation = Conversation(golden_session, ratio, capacity)
    step = conversation.run(golden.tokens, [golden.picture])
    np.testing.assert_array_equal(step.run.position_ids[:, 0], golden.data["position_ids"])
    rows = golden.data["keep_indices"] if kind == "pruned" else np.arange(len(golden.tokens))
    np.testing.assert_array_equal(step.keep_index, rows)
    assert conversation.cache.length == len(rows)
    for wanted, token in zip(golden.data[f"{kind}_step_logits"], golden.data[f"{kind}_tokens"], strict=True):
        assert np.abs(step.logits - wanted).max() < LOGIT_TOLERANCE
        assert step.logits.argmax() == token
        step = conversation.run([token])


def test_every_cache_holds_as_many_rows_as_the_official_ones(golden: Golden, golden_session: OnnxSession) -> None:
    conversation = Conversation(golden_session)
    conversation.run(golden.tokens, [golden.picture])
    for layer, rows in enumerate(golden.data["prefill_kv_lengths"]):
        for kind in ("key", "value"):
            assert conversation.cache[f"past_{kind}.{layer}"].shape[2] == rows


def test_greedy_generation_gives_the_official_tokens(golden: Golden, golden_session: OnnxSession) -> None:
    for kind, ratio in (("pruned", 0.5), ("unpruned", 1.0)):
        drawn = generate(
            Conversation(golden_session, ratio), golden.tokens, [golden.picture], Sampling(max_tokens=16), stop=()
        )
        assert list(drawn) == golden.data[f"{kind}_tokens"].tolist()


def test_scores_come_from_the_official_values(golden: Golden, golden_session: OnnxSession) -> None:
    step = Conversation(golden_session).run(golden.tokens, [golden.picture])
    cut = golden_session.bundle.manifest.selection_layer
    values = step.prefix[f"new_value.{cut - 1}"][0].transpose(1, 0, 2)
    assert np.abs(values - golden.data["critical_values"]).max() < LOGIT_TOLERANCE
