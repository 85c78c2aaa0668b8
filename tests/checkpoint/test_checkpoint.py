from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.verify.parity import check
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import random_picture


def logits(bundle: Bundle) -> Any:
    tokens = [1, 2, 500, *[503] * 20, 501, 7, 8, 9, 10]
    return HostConversation(OnnxSession(bundle)).run(tokens, [random_picture(Grid(4, 5), 0)]).logits


def exported(checkpoint: Path) -> Bundle:
    return export(ExportRecipe(checkpoint, checkpoint.with_name(f"{checkpoint.name}-ivc")))


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_the_same_model(tmp_path: Path, tied: bool) -> None:
    """The layout of transformers 4.4x, saved again by transformers 5 (text_config, other names), whole and sharded."""
    config = {**TINY["qwen2_vl"], "tie_word_embeddings": tied, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
    old = make_checkpoint(tmp_path / "old", config)
    model = transformers.AutoModelForImageTextToText.from_pretrained(old, dtype=torch.float32)
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert "text_config" in json.loads((tmp_path / "new" / "config.json").read_text())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    wanted = logits(exported(old))
    for name in ("new", "sharded"):
        np.testing.assert_array_equal(logits(exported(tmp_path / name)), wanted)
    assert check(exported_bundle(tmp_path / "new"), tmp_path / "new", steps=1).passed


def exported_bundle(checkpoint: Path) -> Bundle:
    return Bundle.load(checkpoint.with_name(f"{checkpoint.name}-ivc"))


def new_prefix(match: re.Match[str]) -> str:
    return "model.language_model." if match[0] else "model."


def test_names_of_later_versions_are_known(tmp_path: Path) -> None:
    """transformers 4.52 and later: model.language_model.* and model.visual.*."""
    old = make_checkpoint(tmp_path / "old")
    new = make_checkpoint(tmp_path / "new")
    renamed = {
        name if name == "lm_head.weight" else re.sub("^model\\.|^(?=visual)", new_prefix, name): array
        for name, array in load_file(old / "model.safetensors").items()
    }
    save_file(renamed, new / "model.safetensors")
    assert "model.language_model.norm.weight" in renamed and "model.visual.merger.ln_q.bias" in renamed
    np.testing.assert_array_equal(logits(exported(new)), logits(exported(old)))


def rewrite(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_default_layer_is_in_proportion_and_uncalibrated(sample_bundle: Bundle) -> None:
    assert (sample_bundle.manifest.selection_layer, sample_bundle.manifest.calibrated) == (2, False)
    sizes = sample_bundle.manifest.decoder.model_copy(update={"layers": 28})
    assert families.of("qwen2_vl").default_layer(sizes).layer == 16


def test_a_stored_head_counts_whatever_config_says(tmp_path: Path) -> None:
    """As transformers 5 does; without one, tied embeddings serve as the head."""
    checkpoint = make_checkpoint(tmp_path / "c")  # untied: it stores a head
    rewrite(checkpoint, tie_word_embeddings=True)
    bundle = exported(checkpoint)
    assert not bundle.manifest.decoder.tied_embeddings
    assert check(bundle, checkpoint, steps=1).passed


def test_a_whole_file_counts_before_a_stale_index(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c")
    (checkpoint / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    assert [weights.file for weights in exported(checkpoint).manifest.weights] == ["weights/model.safetensors"]


def test_templates_and_settings_are_found_where_other_versions_keep_them(tmp_path: Path) -> None:
    own = families.of("qwen2_vl").chat_template.replace("You are a helpful assistant.", "Is there one?")
    for number, name in enumerate(("chat_template.json", "tokenizer_config.json")):
        checkpoint = make_checkpoint(tmp_path / str(number))
        (checkpoint / "chat_template.jinja").rename(checkpoint / "template")
        (checkpoint / "preprocessor_config.json").unlink()
        (checkpoint / name).write_text(json.dumps({"chat_template": own}))
        (checkpoint / "processor_config.json").write_text(
            '{"image_processor": {"size": {"shortest_edge": 6272, "longest_edge": 78400}}}'
        )
        bundle = exported(checkpoint)
        assert (bundle.folder / "chat_template.jinja").read_text() == own
        preprocessing = bundle.manifest.preprocessing.model_dump()
        assert (preprocessing["min_pixels"], preprocessing["max_pixels"]) == (6272, 78400)


def test_a_template_that_cannot_show_pictures_is_replaced_by_the_familys(tmp_path: Path) -> None:
    for number, content in enumerate(("{{ messages[0].content }}", None)):
        checkpoint = make_checkpoint(tmp_path / str(number))
        (checkpoint / "chat_template.jinja").unlink()
        if content is not None:
            (checkpoint / "chat_template.jinja").write_text(content)
        found = (exported(checkpoint).folder / "chat_template.jinja").read_text()
        assert found == families.of("qwen2_vl").chat_template


def test_stop_tokens_come_from_generation_config_or_else_config(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c")
    (checkpoint / "generation_config.json").unlink()
    assert exported(checkpoint).manifest.tokens.stop == (507,)
