"""Quantised checkpoints are read as they are: values bit for bit, and whole models against PyTorch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import ivc_check, ivc_export
from ivc_export.contract.manifest import SelectionRule
from ivc_export.errors import UserError
from ivc_export.exporter.estimate import Size, estimate_bundle, estimate_recipe
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.verify.reference import Reference
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.checkpoint.quantised import LAYOUTS, Layout, edit_config, is_packed, write
from tests.checkpoint.test_toy_format import answers, largest
from tests.conftest import LOGIT_TOLERANCE
from tests.families.family_cases import changed

Array = npt.NDArray[np.float32]
Change = Callable[[dict[str, Any], dict[str, Any]], object]
"""Makes a checkpoint's tensors, or its settings of the quantisation, bad."""


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="module")
def checkpoints(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    return write(make_checkpoint(folder / "plain"), folder, layout)


@pytest.fixture(scope="module")
def bundles(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """In float32: of the format, and of floats that mean the same."""
    folder = tmp_path_factory.mktemp("bundles")
    found, wanted = (export(ExportRecipe(one, folder / one.name, layer=2, dtype="float32")) for one in checkpoints)
    return found, wanted


def tensors_of(bundle: Bundle) -> dict[str, Array]:
    files = (load_file(bundle.folder / file.file) for file in bundle.manifest.weights)
    return {name: array for tensors in files for name, array in tensors.items()}


def meaning(tensors: dict[str, Array], layer: str, bits: int, features: int) -> Array:
    """What a bundle's tensors of a layer mean, by nothing but what docs say of them: number by number."""
    packed, scales = tensors[f"{layer}.weight.packed"], tensors[f"{layer}.weight.scales"]
    out, blocks, size = packed.shape
    block = size * 8 // bits
    q = [[int(b) >> s & (1 << bits) - 1 for b in row.ravel() for s in range(0, 8, bits)] for row in packed]
    zero = np.full((out, blocks), 1 << (bits - 1))
    if f"{layer}.weight.zero_points" in tensors:
        stored = tensors[f"{layer}.weight.zero_points"]
        points = [[int(b) >> s & (1 << bits) - 1 for b in row for s in range(0, 8, bits)] for row in stored]
        zero = np.array(points)[:, :blocks]
    ordered = (np.array(q) - np.repeat(zero, block, 1)).astype(np.float32) * np.repeat(scales, block, 1)
    order = tensors.get(f"{layer}.weight.order", np.arange(features))
    weight = np.zeros((out, features), np.float32)
    weight[:, order] = ordered[:, :features]
    return weight


def test_values_are_kept_bit_for_bit(bundles: tuple[Bundle, Bundle], layout: Layout) -> None:
    found, meant = map(tensors_of, bundles)
    layers = [name.removesuffix(".weight") for name in meant if is_packed(name)]
    assert len(layers) == 28
    for layer in layers:
        wanted = meant[f"{layer}.weight"]
        np.testing.assert_array_equal(meaning(found, layer, layout.bits, wanted.shape[1]), wanted)
    others = [name for name in meant if not is_packed(name)]
    parts = ("packed", "scales", "zero_points", "order")
    assert {*others} == {name for name in found if name.rpartition(".")[2] not in parts}
    assert all(np.array_equal(found[name], meant[name]) for name in others)
    formats = {name: one.format for name, one in bundles[0].manifest.weight_formats.items()}
    assert formats == dict.fromkeys(layers, f"int{layout.bits}")


def test_the_model_equals_pytorch_on_dequantised_weights(
    bundles: tuple[Bundle, Bundle], checkpoints: tuple[Path, Path]
) -> None:
    m = bundles[0].manifest
    model = Reference(checkpoints[1], m.selection_layer, 0.5, m.selection)
    conversation = OnnxSession(bundles[0], threads=1).converse(0.5)
    for tokens in ([1, 2, 3, 4], [5]):
        found, wanted = conversation.run(tokens), model.run(tokens)
        assert np.abs(found.logits - wanted.logits.numpy()).max() < LOGIT_TOLERANCE
    turns = [answers(OnnxSession(one, threads=1)) for one in bundles]
    assert largest(*turns) < LOGIT_TOLERANCE


def test_native_graphs_hold_the_same_as_floats(
    bundles: tuple[Bundle, Bundle], checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = ExportRecipe(checkpoints[0], tmp_path / "bundle", layer=2, dtype="float32", lowering="native")
    bundle = export(recipe)
    found, meant = tensors_of(bundle), tensors_of(bundles[1])
    assert found.keys() == meant.keys() and all(np.array_equal(found[name], meant[name]) for name in found)
    assert not bundle.manifest.weight_formats
    assert any("they become floats, because these graphs hold only floats" in note for note in bundle.notes)
    before = estimate_recipe(recipe, [Size(140, 196)])
    assert before.weight_bytes == sum(array.nbytes for array in found.values())


def test_estimates_know_packed_sizes(
    bundles: tuple[Bundle, Bundle], checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    sizes = [Size(140, 196)]
    stored = tensors_of(bundles[0])
    before = estimate_recipe(ExportRecipe(checkpoints[0], tmp_path, layer=2, dtype="float32"), sizes)
    after, plain = (estimate_bundle(bundle, sizes) for bundle in bundles)
    assert before.weight_bytes == after.weight_bytes == sum(array.nbytes for array in stored.values())
    assert before.parameters == after.parameters == plain.parameters
    assert plain.parameters == sum(array.size for array in tensors_of(bundles[1]).values())
    assert before.pictures[0].pruned.flops == plain.pictures[0].pruned.flops
    assert "quantised (" in before.quantisation and not plain.quantisation


def test_pytorch_reads_the_same_by_code_of_its_own(layout: Layout, checkpoints: tuple[Path, Path]) -> None:
    rule = SelectionRule(ivc_fraction=0.1, seed_divisor=100, query_offset=2)
    found, wanted = (dict(Reference(one, 1, 1.0, rule).model.state_dict()) for one in checkpoints)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        ("qwen2_vl", "GPTQ, 8 bits, activations ordered", []),
        ("internvl_chat", "compressed-tensors", ["--dtype", "float32"]),
        ("llava", "AWQ", ["--lowering", "native"]),
        ("qwen2_5_vl", "fp8", []),
    ],
)
def test_bundles_are_checked_against_their_checkpoint(
    family: str, layout: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float16 where the checkpoint is, whose scales are then, and not the weights, rounded."""
    stored, _ = write(
        make_checkpoint(tmp_path / "plain", TINY[family]), tmp_path, LAYOUTS.get(layout) or Layout(layout)
    )
    bundle = str(tmp_path / "bundle")
    assert ivc_export(["--model", str(stored), "--output", bundle, *options]) == 0
    assert ivc_check([bundle, "--against", str(stored), "--steps", "3"]) == 0, capsys.readouterr()
    shutil.rmtree(stored)
    assert ivc_check([bundle, "--onnx-only"]) == 0


EXPERTS = [name for name, config in TINY.items() if families.of(config["model_type"]).read(config, None).stacks]


@pytest.mark.parametrize("family", EXPERTS)
def test_packed_experts_are_refused(family: str, tmp_path: Path) -> None:
    config = changed(family, {"language_config": {"moe_intermediate_size": 32, "v_head_dim": 16}})  # that groups divide
    stored, _ = write(make_checkpoint(tmp_path / "plain", config), tmp_path, LAYOUTS["AWQ"])
    with pytest.raises(UserError, match=r"stores experts as awq .*: give the same model with experts in floats"):
        export(ExportRecipe(stored, tmp_path / "bundle"))


@pytest.mark.parametrize("family", [name for name in TINY if name not in EXPERTS])
def test_every_family_reads_them(family: str, tmp_path: Path) -> None:
    checkpoints = write(make_checkpoint(tmp_path / "plain", TINY[family]), tmp_path, LAYOUTS["AWQ"])
    found, wanted = (export(ExportRecipe(one, tmp_path / f"{one.name}-ivc", dtype="float32")) for one in checkpoints)
    assert found.manifest.weight_formats and not wanted.manifest.weight_formats
    turns = []
    for bundle in (found, wanted):
        conversation = OnnxSession(bundle, threads=1).converse(0.5)
        turns.append([conversation.run(tokens).logits for tokens in ([1, 2, 3, 4], [5])])
    assert largest(*turns) < LOGIT_TOLERANCE


@pytest.mark.parametrize("kind", ["fp8", "float-quantized"])
def test_eight_bit_floats_become_float16(kind: str, tmp_path: Path) -> None:
    """Or float32, in which they are exact."""
    stored, wanted = write(make_checkpoint(tmp_path / "plain"), tmp_path, Layout(kind))
    meant, said = load_file(wanted / "model.safetensors"), "weights are FP8 and become float16"
    recipes = {name: ExportRecipe(stored, tmp_path / name, dtype=name) for name in ("checkpoint", "float32")}
    for name, kept in (("checkpoint", "float16"), ("float32", "float32")):
        before, bundle = estimate_recipe(recipes[name], [Size(140, 196)]), export(recipes[name])
        assert before.dtype == bundle.manifest.dtype == kept and not bundle.manifest.weight_formats
        assert said in before.quantisation and any(said in note for note in bundle.notes)
        found = tensors_of(bundle)
        assert found.keys() == meant.keys() and before.weight_bytes == sum(array.nbytes for array in found.values())
        assert all(np.array_equal(found[name], meant[name].astype(kept)) for name in found)


def test_a_layer_may_lie_in_several_files(tmp_path: Path) -> None:
    """As shards have it; the dry run takes the layers that their index names, and not config.json's word."""
    plain, layout = make_checkpoint(tmp_path / "plain"), LAYOUTS["GPTQ, zero points, activations ordered"]
    one, many = (write(plain, tmp_path / str(shards), layout, shards)[0] for shards in (False, True))
    found, wanted = (export(ExportRecipe(c, tmp_path / f"{c.parent.name}-ivc")) for c in (many, one))
    arrays = tensors_of(wanted)
    assert tensors_of(found).keys() == arrays.keys()
    assert all(np.array_equal(array, arrays[name]) for name, array in tensors_of(found).items())
    edit_config(many, {"quantization_config": layout.settings | {"modules_in_block_to_quantize": ["nothing"]}})
    before = estimate_recipe(ExportRecipe(many, tmp_path), [Size(140, 196)])
    assert before.weight_bytes == sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize(("value", "refused"), [(0, False), (1, True)])
def test_biases_that_quantisation_adds_are_zero(value: float, refused: bool, tmp_path: Path) -> None:
    """Those of other values belong to another model."""
    stored, _ = write(make_checkpoint(tmp_path / "plain"), tmp_path, LAYOUTS["GPTQ"])
    tensors = load_file(stored / "model.safetensors")
    bias = np.full(64, value, np.float16)
    save_file(tensors | {"model.layers.1.self_attn.o_proj.bias": bias}, stored / "model.safetensors")
    recipe = ExportRecipe(stored, tmp_path / "bundle")
    if refused:
        with pytest.raises(UserError, match=r"config.json does not describe 1 tensors of the checkpoint"):
            export(recipe)
    else:
        export(recipe)


def change(name: str, to: Callable[[Any], Any]) -> Change:
    """A tensor of one layer made another, or taken away where `to` gives None."""

    def changed(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        key = f"model.layers.1.mlp.down_proj.{name}"
        array = to(tensors.pop(key))
        if array is not None:
            tensors[key] = array

    return changed


def state(**changes: Any) -> Change:
    """Settings of quantization_config."""

    def changed(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        settings.update(changes)

    return changed


def weights_of(**changes: Any) -> Change:
    """What compressed-tensors says of weights."""

    def changed(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["config_groups"]["group_0"]["weights"].update(changes)

    return changed


def set_first(array: Any, value: float) -> Any:
    array.ravel()[0] = value
    return array


def everywhere(end: str) -> Change:
    """No layer has such a tensor."""

    def changed(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(end)]:
            del tensors[name]

    return changed


def second_group(tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    weights = settings["config_groups"]["group_0"]["weights"]
    settings["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": weights | {"num_bits": 8}}


ORDERED = "GPTQ, zero points, activations ordered"
BAD: dict[str, tuple[str, Change, str]] = {
    "truncated qweight": (
        "GPTQ",
        change("qweight", lambda a: a[:-4]),
        "scales .* has shape .*, but its layer needs",
    ),
    "qweight one word short": ("AWQ", change("qweight", lambda a: a[:, :-1]), "has shape .*, but its layer needs"),
    "qweight of another model": (
        "AWQ",
        lambda t, s: t.update({k: np.concatenate([v, v], 1) for k, v in t.items() if "1.mlp.down_proj." in k}),
        r"down_proj.weight.packed in model.safetensors has shape \[128, 3, 16\], but config.json says",
    ),
    "wrong group size": ("GPTQ", state(group_size=64), "scales in model.safetensors has shape .* its layer needs"),
    "a group of no blocks": ("GPTQ", state(group_size=24), "weights in groups of 24 cannot be packed: this version"),
    "a group of zero": ("GPTQ", state(group_size=0), "with group_size 0.*reads GPTQ with a group_size of 16 and more"),
    "3 bits": (
        "GPTQ",
        state(bits=3),
        r"is quantised \(GPTQ, with bits 3\), but this version reads GPTQ with bits 4",
    ),
    "2 bits": ("compressed-tensors", weights_of(num_bits=2), "with num_bits 2.*with num_bits 4 or 8"),
    "bits as a text": ("AWQ", state(bits="4"), "with bits '4'.*reads AWQ with bits 4"),
    "qweight of another dtype": (
        "GPTQ",
        change("qweight", lambda a: a.astype(np.int64)),
        "is I64, but its format needs I32",
    ),
    "scales of integers": ("AWQ", change("scales", lambda a: a.astype(np.int16)), "is I16, but scales are floats"),
    "scales of another dtype": (
        "GPTQ",
        change("scales", lambda a: a.astype(np.float32)),
        "is float32, but other tensors are float16: convert them all with --dtype",
    ),
    "no scales": (
        "GPTQ",
        change("scales", lambda a: None),
        "has no tensor model.layers.1.mlp.down_proj.scales:",
    ),
    "no qzeros": (
        "AWQ",
        change("qzeros", lambda a: None),
        "has no tensor model.layers.1.mlp.down_proj.qzeros:",
    ),
    "no qzeros of zero points": (
        ORDERED,
        change("qzeros", lambda a: None),
        "has no tensor model.layers.1.mlp.down_proj.qzeros",
    ),
    "qzeros of a layer said to be symmetric": (
        "GPTQ",
        change("qzeros", lambda a: set_first(a, 0)),
        "qzeros .* has zero points other than 8, but config.json says sym",
    ),
    "a zero point of 16": (
        ORDERED,
        change("qzeros", lambda a: set_first(a, -1)),
        "has a zero point of 15, which means 16 and does not fit into 4 bits: give a checkpoint of the model in GPTQ's",
    ),
    "g_idx beyond the groups": (ORDERED, change("g_idx", lambda a: set_first(a, 3)), "names group 3, .* groups 0 to 2"),
    "g_idx below zero": (ORDERED, change("g_idx", lambda a: set_first(a, -1)), "names group -1, but the layer has"),
    "groups of several sizes": (
        ORDERED,
        change("g_idx", lambda a: np.minimum(a, 1)),
        "has groups of sizes other than 32: give another checkpoint",
    ),
    "no g_idx": (
        ORDERED,
        change("g_idx", lambda a: None),
        "has no tensor model.layers.1.mlp.down_proj.g_idx:",
    ),
    "an order without desc_act": (ORDERED, state(desc_act=False), "orders values by activations, but config.json says"),
    "a scale of zero": ("AWQ", change("scales", lambda a: set_first(a, 0)), "has scales that are zero: download the"),
    "a scale that is no number": (
        "compressed-tensors",
        change("weight_scale", lambda a: set_first(a, np.nan)),
        "has scales that are infinite or NaN: download",
    ),
    "an infinite scale": ("GPTQ", change("scales", lambda a: set_first(a, np.inf)), "that are infinite or NaN"),
    "no weight_shape": ("compressed-tensors", change("weight_shape", lambda a: None), "has no tensor .*weight_shape"),
    "another weight_shape": (
        "compressed-tensors",
        change("weight_shape", lambda a: a + 8),
        r"has shape \[64, 12\], but .*weight_shape says \[72, 104\]",
    ),
    "no weight_zero_point": (
        "compressed-tensors, zero points, activations ordered",
        change("weight_zero_point", lambda a: None),
        "has no tensor .*weight_zero_point: download",
    ),
    "an unknown order": ("compressed-tensors", weights_of(actorder="later"), "with actorder 'later'.*reads compressed"),
    "an unknown strategy": ("compressed-tensors", weights_of(strategy="tensor"), "with strategy 'tensor'.*'group' or"),
    "groups of several kinds": (
        "compressed-tensors",
        second_group,
        "with weights of one kind: give another",
    ),
    "layers of another format": (
        "GPTQ",
        change("qweight", lambda a: None),
        "has no tensor model.layers.1.mlp.down_proj.weight: download it again|does not describe",
    ),
    "formats mixed": (
        "GPTQ",
        lambda t, s: t.update({"model.layers.2.mlp.down_proj.weight_packed": np.zeros((8, 8), np.int32)}),
        r"is quantised \(compressed-tensors, by the tensor|account for 1 tensors",
    ),
    "no packed layer at all": ("GPTQ", everywhere(".qweight"), r"holds no tensor \*.qweight, but its config.json says"),
    "another method than the tensors'": (
        "AWQ",
        lambda t, s: s.update({"quant_method": "bitsandbytes"}),
        r"is quantised \(bitsandbytes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_damaged_is_refused_in_a_sentence(
    name: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, make_bad, sentence = BAD[name]
    stored, _ = write(plain, tmp_path, LAYOUTS[layout])
    tensors, settings = load_file(stored / "model.safetensors"), json.loads(json.dumps(LAYOUTS[layout].settings))
    make_bad(tensors, settings)
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, stored / "model.safetensors")
    edit_config(stored, {"quantization_config": settings})
    assert ivc_export(["--model", str(stored), "--output", str(tmp_path / "bundle"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said) and said.count("\n") == 1, said
    assert {path.name for path in tmp_path.iterdir()} == {"stored", "dequantised"}


def test_a_shard_that_is_missing_is_told(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, _ = write(plain, tmp_path, LAYOUTS["GPTQ"], shards=True)
    (stored / "model-00002-of-00002.safetensors").unlink()
    assert ivc_export(["--model", str(stored), "--output", str(tmp_path / "bundle"), "--quiet"]) == 2
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().err
