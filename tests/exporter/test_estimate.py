"""The dry run's figures against what onnxruntime computes, and against formulas."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import PIL.Image
import pytest
from onnx import TensorProto, helper

from ivc_export import cli, families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.exporter import estimate
from ivc_export.exporter.estimate import TEXT, Size, estimate_bundle, estimate_recipe
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.graph.counting import count
from ivc_export.lowering import exported
from ivc_export.lowering.inline import InlinePass
from ivc_export.runtime.host import HostConversation
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.selection.operators import SELECTIONS
from samples.make_sample import make_checkpoint, make_tokenizer
from samples.tiny import TINY, TOKENS

PICTURE = Size(300, 200)


class Feeds(OnnxSession):
    """Remembers what it was fed."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.fed: dict[str, Any] = {}

    def run(self, name: GraphName, feeds: Any) -> dict[str, Any]:
        self.fed[name] = dict(feeds)
        return super().run(name, feeds)


def flops_of_a_run(path: Path, feeds: Any) -> int:
    """Two for each multiply-add outside of the selection, by the shapes that onnxruntime's tensors really have."""
    model = InlinePass(kept=SELECTIONS)(ir.load(path)).model
    products = [node for node in model.graph if node.op_type in ("Gemm", "MatMul")]
    watched = {value.name: value for node in products for value in (node.inputs[0], node.outputs[0]) if value}
    known = {value.name for value in model.graph.outputs}
    for name, value in watched.items():
        if name not in known and not value.is_graph_input():
            value.dtype = ir.DataType.FLOAT
            model.graph.outputs.append(value)
    target = path.with_name("watched.onnx")
    ir.save(model, target)
    try:
        session = onnxruntime.InferenceSession(target)
    finally:
        target.unlink()
    names = [output.name for output in session.get_outputs()]
    shapes = {
        name: array.shape for name, array in (feeds | dict(zip(names, session.run(None, feeds), strict=True))).items()
    }
    return sum(
        2 * math.prod(shapes[node.outputs[0].name]) * shapes[node.inputs[0].name][-1]  # type: ignore[union-attr]
        for node in products
    )


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_flops_and_cache_are_those_of_a_run(sample_bundle: Bundle, ratio: float) -> None:
    manifest = sample_bundle.manifest.model_copy(update={"default_ratio": ratio})
    bundle = Bundle(sample_bundle.folder, manifest)
    (found,) = estimate_bundle(bundle, [PICTURE]).pictures
    picture = families.preparation(manifest).picture(PIL.Image.new("RGB", PICTURE), manifest.tokens.image)
    after = TEXT // 2 + manifest.selection.query_offset  # half of the text votes
    text = np.random.default_rng(0).integers(0, 400, TEXT).tolist()
    tokens = [*text[:-after], *picture.tokens, *text[-after:]]
    session = Feeds(bundle)
    conversation = HostConversation(session)
    conversation.run(tokens, [picture])
    for name in GRAPH_NAMES:
        assert found.pruned.flops[name] == flops_of_a_run(bundle.folder / f"{name}.onnx", session.fed[name]), name
    assert found.pruned.cache_bytes == conversation.cache.bytes_used
    assert (found.pruned == found.unpruned) == (ratio == 1.0)


@pytest.mark.parametrize("lowering", exported())
def test_a_bundle_is_counted_on_its_own_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowering: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "c")
    recipe = ExportRecipe(checkpoint, tmp_path / "b", lowering=lowering)
    planned, bundle = estimate_recipe(recipe, [PICTURE]), export(recipe)
    monkeypatch.setattr(estimate, "build_graphs", None)
    found = estimate_bundle(bundle, [PICTURE])
    assert replace(found, pictures=planned.pictures) == planned
    for name in GRAPH_NAMES:  # where it is lowered, the selection's votes count
        assert found.pictures[0].pruned.flops[name] == pytest.approx(planned.pictures[0].pruned.flops[name], rel=0.01)
    assert found.pictures[0].pruned.cache_bytes == planned.pictures[0].pruned.cache_bytes


def test_flops_are_the_textbooks(sample_bundle: Bundle) -> None:
    """2 rows parameters for the linear layers, 4 rows keys width for attention; Kaplan et al. 2020, section 2.1."""
    (found,) = estimate_bundle(sample_bundle, [PICTURE]).pictures
    m, d = sample_bundle.manifest, sample_bundle.manifest.decoder
    width, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    layer = d.hidden_size * (2 * width + 2 * kv + 3 * d.intermediate_size)
    below, above = m.selection_layer, d.layers - m.selection_layer
    rows, kept = found.visual_tokens + TEXT, found.kept_tokens + TEXT
    assert found.pruned.flops["prefix"] == below * (2 * rows * layer + 4 * rows**2 * width)
    head = 2 * d.hidden_size * d.vocab_size
    assert found.pruned.flops["decoder"] == above * (2 * kept * layer + 4 * kept**2 * width) + head
    assert found.unpruned.flops["decoder"] == above * (2 * rows * layer + 4 * rows**2 * width) + head
    assert found.pruned.cache_bytes == 2 * d.layers * kept * kv * 4
    assert (found.visual_tokens, found.kept_tokens) == (77, 38)


def test_peak_activations_are_the_tensors_alive_at_once() -> None:
    """x (40 B) stays, as inputs do; a and b overlap at b's node; c is a's memory under another name."""
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["c"]),
        helper.make_node("Concat", ["c", "c"], ["b"], axis=0),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["S"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            helper.make_tensor("shape", TensorProto.INT64, [2], [1, 10]),
            helper.make_tensor("w", TensorProto.FLOAT, [10, 1], [0.0] * 10),
        ],
    )
    found = count(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), {"S": 10})
    assert found.peak_bytes == 40 + 40 + 80
    assert found.flops == 2 * 2 * 10


@pytest.mark.parametrize("name", families.names())
def test_every_family_can_be_estimated(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY[name]))
    make_tokenizer(TOKENS[name]).save(
        str(tmp_path / "tokenizer.json")
    )  # which says the image token where no config does
    found = estimate_recipe(ExportRecipe(tmp_path, tmp_path / "b", ratio=0.25), [Size(448, 448), Size(200, 100)])
    for picture in found.pictures:
        assert picture.pruned.flops["vision"] == picture.unpruned.flops["vision"] > 0
        assert 0 < picture.pruned.flops["decoder"] < picture.unpruned.flops["decoder"]
        assert 0.2 < picture.saved_cache < 0.75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "tokenizer.json"]


def test_weights_dtype_and_cap_count(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", dtype="bfloat16")
    recipe = ExportRecipe(checkpoint, tmp_path / "b", max_visual=16)
    found = estimate_recipe(recipe, [PICTURE])
    assert found.dtype == "bfloat16" and found.pictures[0].visual_tokens <= 16
    assert found.weight_bytes == export(recipe).manifest.embedding.nbytes + rest(tmp_path / "b")
    wide = estimate_recipe(ExportRecipe(checkpoint, tmp_path / "w", dtype="float32"), [PICTURE])
    assert wide.weight_bytes == 2 * found.weight_bytes


def rest(folder: Path) -> int:
    """Bytes of all tensors but the embeddings."""
    from ivc_export.checkpoint.folder import read_index

    tensors = read_index(folder / "weights" / "model.safetensors")
    return sum(t.length for name, t in tensors.items() if name != "model.embed_tokens.weight")


def test_a_model_that_fits_nowhere_small(tmp_path: Path) -> None:
    """Qwen2-VL-2B's true sizes: 2.2 B parameters."""
    tiny = TINY["qwen2_vl"]
    sizes: dict[str, Any] = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    }
    sizes |= {"vocab_size": 151936, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {
        **tiny["vision_config"],
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "hidden_size": 1536,
    }
    config = {**tiny, **sizes, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = estimate_recipe(ExportRecipe(tmp_path, tmp_path / "b"), [Size(448, 448)])
    assert found.weight_bytes == 2 * 2_208_985_600
    assert not found.fits()["Jetson Orin Nano 4 GB"] and found.fits()["Jetson Orin Nano 8 GB"]


def test_the_dry_run_prints_tables_or_json_and_writes_nothing(
    sample_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dry = ["--model", str(sample_checkpoint), "--dry-run"]
    assert cli.ivc_export([*dry, "--picture", "448x336", "--picture", "56x56"]) == 0
    text = capsys.readouterr().out
    for part in ("448x336", "56x56", "96 of 192", "-50%", "KV cache", "peak activations", "Orin Nano 8 GB", "weights"):
        assert part in text, part
    assert cli.ivc_export([*dry, "--json", "--ratio", "0.25", "--layer", "3"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["ratio"], content["selection_layer"], len(content["pictures"])) == (0.25, 3, 3)
    assert cli.ivc_export([*dry, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--picture", "448x336"], "--picture works only with --dry-run"),
        (["--dry-run", "--picture", "big"], "is not a size such as 1024x768"),
        (["--dry-run", "--picture", "0x5"], "out of range"),
        (["--dry-run", "--picture", "99999x99999"], "out of range"),
        (["--dry-run", "--picture", "9999x10"], "too elongated"),
        (["--dry-run", "--layer", "9"], "--layer takes 1 to 3"),
    ],
)
def test_sizes_that_cannot_be(
    sample_checkpoint: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.ivc_export(["--model", str(sample_checkpoint), *options]) == 2
    message = capsys.readouterr().err
    assert sentence in message and len(message.splitlines()) == 1


def test_an_export_prints_one_object_or_nothing(
    sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", str(sample_checkpoint), "--output", str(tmp_path / "bundle"), "--force"]
    assert cli.ivc_export([*command, "--json", "--dtype", "bfloat16", "--lowering", "native"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert (content["dtype"], content["lowering"], content["bundle"]) == ("bfloat16", "native", command[3])
    assert content["weight_bytes"] == (tmp_path / "bundle" / "weights" / "model.safetensors").stat().st_size
    assert len(content["warnings"]) == 1 and "not calibrated" in content["warnings"][0] and err == ""
    assert content["estimate"]["pictures"][0]["visual_tokens"] == 999
    assert cli.ivc_export([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.ivc_export(["--model", "nowhere", "--quiet"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
