from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid, Visual
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.plan import plan_run
from ivc_export.verify.oracle import reference_picture
from ivc_export.verify.reference import Reference
from samples.make_sample import make_checkpoint
from tests.conftest import LOGIT_TOLERANCE, Golden, random_picture

IMAGE, START, END = 503, 500, 501
FIRST = random_picture(Grid(8, 10), 1)
SECOND = random_picture(Grid(11, 6), 2)


def text(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 490, length)]


def shown(picture: Visual) -> list[int]:
    return [START, *[IMAGE] * picture.grid.visual, END]


TURNS: list[tuple[list[int], list[Visual]]] = [
    ([*text(1, 12), *shown(FIRST), *text(2, 9)], [FIRST]),
    ([17], []),
    ([99], []),
    ([*text(3, 5), *shown(SECOND), *text(4, 14)], [SECOND]),
    ([3], []),
    ([*text(5, 6), *shown(SECOND), *text(6, 2), *shown(FIRST), *text(7, 8)], [SECOND, FIRST]),
    (text(8, 7), []),
    ([250], []),
]


def oracle(golden: Golden, session: OnnxSession, ratio: float) -> Reference:
    m = session.bundle.manifest
    return Reference(golden.folder, m.selection_layer, ratio, m.selection)


@pytest.mark.parametrize("capacity", [None, 512], ids=["exact-length", "fixed-capacity"])
@pytest.mark.parametrize("ratio", [0.5, 0.15, 1.0])
def test_turns_with_pictures_equal_the_reference(
    golden: Golden, golden_session: OnnxSession, ratio: float, capacity: int | None
) -> None:
    conversation, reference = HostConversation(golden_session, ratio, capacity), oracle(golden, golden_session, ratio)
    for tokens, pictures in TURNS:
        step = conversation.run(tokens, pictures)
        turn = reference.run(tokens, [reference_picture(golden_session.bundle, p) for p in pictures])
        np.testing.assert_array_equal(step.keep_index, turn.keep_index.numpy())
        assert np.abs(step.logits - turn.logits.numpy()).max() < LOGIT_TOLERANCE
        assert conversation.next_position == reference.next_position


def test_exact_and_fixed_caches_give_the_same_logits(golden_session: OnnxSession) -> None:
    exact, fixed = HostConversation(golden_session, 0.5), HostConversation(golden_session, 0.5, capacity=512)
    for tokens, pictures in TURNS:
        assert np.abs(exact.run(tokens, pictures).logits - fixed.run(tokens, pictures).logits).max() < LOGIT_TOLERANCE
    for name in ("past_key.0", "past_value.5"):
        assert np.abs(exact.cache[name] - fixed.cache[name][:, :, : fixed.cache.length]).max() < LOGIT_TOLERANCE


def test_weights_that_stay_in_the_memory_map_give_the_same_logits(golden_session: OnnxSession) -> None:
    mapped = HostConversation(OnnxSession(golden_session.bundle, prepacking=False), 0.5)
    packed = HostConversation(golden_session, 0.5)
    for tokens, pictures in TURNS[:3]:
        assert np.abs(mapped.run(tokens, pictures).logits - packed.run(tokens, pictures).logits).max() < LOGIT_TOLERANCE


def test_compaction_equals_masked_attention(golden: Golden, golden_session: OnnxSession) -> None:
    """One stock forward pass over all turns at once, no cache, a mask by layer: what is pruned is not seen later."""
    conversation = HostConversation(golden_session, 0.5)
    steps = [conversation.run(tokens, pictures) for tokens, pictures in TURNS]
    tokens = [token for turn, _ in TURNS for token in turn]
    kept = np.zeros(len(tokens), bool)
    lower = np.zeros((len(tokens), len(tokens)), bool)
    row = 0
    for step in steps:
        kept[row + step.keep_index] = True
        lower[row : row + step.run.rows, row : row + step.run.rows] = True
        row += step.run.rows
    causal = np.tri(len(tokens), dtype=bool)
    upper = causal & (kept[None, :] | np.eye(len(tokens), dtype=bool))
    lower = causal & (lower | kept[None, :])
    masks = [torch.where(torch.from_numpy(m), 0.0, torch.finfo(torch.float32).min)[None, None] for m in (lower, upper)]
    model = transformers.AutoModelForImageTextToText.from_pretrained(golden.folder, attn_implementation="eager").eval()
    cut = golden_session.bundle.manifest.selection_layer
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(with_mask(masks[number >= cut]), with_kwargs=True)
    pictures = [p for _, turn in TURNS for p in turn]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=torch.cat([torch.from_numpy(p.inputs["pixel_values"][0]) for p in pictures]),
            image_grid_thw=torch.tensor([(1, 2 * p.grid.rows, 2 * p.grid.columns) for p in pictures]),
            mm_token_type_ids=(ids == IMAGE).int(),
            use_cache=False,
        ).logits[0]
    ends = np.cumsum([step.run.rows for step in steps]) - 1
    for step, end in zip(steps, ends, strict=True):
        assert np.abs(step.logits - logits[end].numpy()).max() < LOGIT_TOLERANCE


def with_mask(mask: torch.Tensor) -> Any:
    def hook(module: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, keywords | {"attention_mask": mask}

    return hook


def planned(session: OnnxSession, tokens: Sequence[int], grids: Sequence[Grid] = ()) -> Any:
    return plan_run(session.bundle.manifest, np.array(tokens, np.int32), grids, 0, 0.5)


def test_a_run_is_planned_as_the_contract_says(golden_session: OnnxSession) -> None:
    run = planned(golden_session, [*text(1, 12), *shown(FIRST), *text(2, 9)], [FIRST.grid])
    assert run.visual_index.tolist() == list(range(13, 93))
    assert run.text_index.tolist() == [*range(13), *range(93, 103)]
    assert run.query_index.tolist() == list(range(95, 103))  # neither the end marker nor the token behind it votes
    assert run.keep_count == 40
    without = planned(golden_session, [5, 6, 7])
    assert (without.visual_index.tolist(), without.text_index.tolist(), without.keep_count) == ([0], [1, 2], 1)
    lone = planned(golden_session, [START, *[IMAGE] * 4, END, 5], [Grid(2, 2)])
    assert lone.query_index.tolist() == [6]  # nobody behind the picture may vote: the last token does


def test_a_drawn_image_token_is_a_row_like_any_other(golden: Golden, golden_session: OnnxSession) -> None:
    conversation, reference = HostConversation(golden_session), oracle(golden, golden_session, 0.5)
    for tokens in ([1, IMAGE, 2], [IMAGE]):
        step, turn = conversation.run(tokens), reference.run(tokens)
        assert np.abs(step.logits - turn.logits.numpy()).max() < LOGIT_TOLERANCE


def test_budgets_of_pictures_add_up(golden_session: OnnxSession) -> None:
    grids = [Grid(1, 5), Grid(1, 5)]  # round(2.5) is 2, twice; round(5.0) would be 5
    run = planned(golden_session, [*[IMAGE] * 5, END, *[IMAGE] * 5, END, 1, 2], grids)
    assert run.keep_count == 4


@pytest.mark.parametrize(
    ("tokens", "grids", "sentence"),
    [
        ([], [], "the prompt is empty"),
        ([1, 512], [], "beyond the vocabulary of 512"),
        ([1, -2], [], "token id -2"),
        ([1, IMAGE, 2], [Grid(2, 2)], "has 1 image tokens, but its pictures give 4"),
        ([IMAGE, IMAGE, 1, IMAGE, IMAGE], [Grid(2, 2)], "are not next to each other"),
        ([1] * 5000, [], "this model has 4,096 positions"),
    ],
)
def test_runs_that_cannot_be(golden_session: OnnxSession, tokens: list[int], grids: list[Grid], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        planned(golden_session, tokens, grids)


def test_a_full_cache_says_so(golden_session: OnnxSession) -> None:
    with pytest.raises(UserError, match="has 4 rows, but 5 are needed"):
        HostConversation(golden_session, capacity=4).run([1, 2, 3, 4, 5])


def test_frames_of_one_size_run_as_one_batch(golden_session: OnnxSession) -> None:
    pictures = [random_picture(Grid(6, 8), seed) for seed in (1, 2, 3)]
    pixels = np.concatenate([p.inputs["pixel_values"] for p in pictures])
    batch = golden_session.run("vision", {**pictures[0].inputs, "pixel_values": pixels})["image_embeds"]
    for picture, found in zip(pictures, batch, strict=True):
        alone: npt.NDArray[np.float32] = golden_session.run("vision", picture.inputs)["image_embeds"][0]
        assert np.abs(found - alone).max() < LOGIT_TOLERANCE


def test_what_float16_graphs_do_not_take_is_one_sentence(tmp_path: Path) -> None:
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "checkpoint", dtype="float16"), tmp_path / "bundle"))
    picture = random_picture(Grid(1, 1), 0)
    picture.inputs["pixel_values"][0, 0, 0] = -7e4
    OnnxSession(bundle).run("vision", picture.inputs)
    with pytest.raises(
        UserError, match=r"pixel_values has values up to 7e\+04, but the largest value of float16 is 65504: compute in"
    ):
        OnnxSession(bundle, dtype="float16").run("vision", picture.inputs)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(1, 30), Grid(40, 2), Grid(17, 13)], ids=str)
def test_the_vision_encoder_takes_every_grid(golden: Golden, golden_session: OnnxSession, grid: Grid) -> None:
    picture = random_picture(grid, 5)
    found = golden_session.run("vision", picture.inputs)["image_embeds"][0]
    given = reference_picture(golden_session.bundle, picture)
    model = oracle(golden, golden_session, 1.0).model.model
    with torch.no_grad():
        (wanted,) = model.get_image_features(**given.inputs).pooler_output
    assert np.abs(found - wanted.numpy()).max() < LOGIT_TOLERANCE


def test_threads_do_not_spin_between_runs(golden_bundle: Bundle) -> None:
    """Each graph has threads of its own, which would take time from another graph's."""
    conversation = HostConversation(OnnxSession(golden_bundle, threads=2))
    conversation.run([1, 2, 3])
    time.sleep(0.01)
    start = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - start < 0.05
