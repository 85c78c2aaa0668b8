"""A weight format is one record: with it, checkpoints are read, estimated, exported, opened, and run everywhere."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from ivc_export.bench.roofline import Workload
from ivc_export.bundle.bundle import Bundle
from ivc_export.checkpoint.formats import FORMATS
from ivc_export.cli import ivc_calibrate, ivc_check
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.exporter import placement
from ivc_export.exporter.estimate import Size, estimate_bundle, estimate_recipe
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.join_decode import join_decode
from ivc_export.runtime.interface import Session
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.verify.reference import Reference
from samples.make_sample import make_checkpoint
from tests.checkpoint.toy_format import HALVES, detect_toy, quantise
from tests.conftest import LOGIT_TOLERANCE, random_picture
from tests.runtime.test_tensorrt import opened

QUANTISED = 14
"""Layers 0 and 2 of 4, of seven linear layers each."""
HALF = 1e-2
"""Logits where weights and products are float16."""
Turns = list[npt.NDArray[np.float32]]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, "toy8", detect_toy)
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("toy")
    return quantise(make_checkpoint(folder / "plain"), folder)


@pytest.fixture(scope="module")
def bundles(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """Of the format, and of floats that mean the same."""
    folder = tmp_path_factory.mktemp("bundles")
    toy, wanted = (export(ExportRecipe(one, folder / one.name, layer=2)) for one in checkpoints)
    return toy, wanted


def answers(session: Session) -> Turns:
    """Logits of a prompt with a picture, of a decode step, and of a turn of text."""
    conversation = session.converse(0.5)
    picture = random_picture(Grid(4, 6), 1)
    first = [1, 2, 500, *[503] * picture.grid.visual, 501, 7, 8, 9]
    steps = [conversation.run(first, [picture]), conversation.run([20]), conversation.run([11, 12])]
    return [step.logits for step in steps]


def largest(found: Turns, wanted: Turns) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def wanted(bundles: tuple[Bundle, Bundle]) -> Turns:
    return answers(OnnxSession(bundles[1], threads=1))


def test_a_bundle_holds_the_derived_tensors_and_no_sources(bundles: tuple[Bundle, Bundle]) -> None:
    toy, plain = bundles
    (file,) = toy.manifest.weights
    assert file.sha256 == hashlib.sha256((toy.folder / file.file).read_bytes()).hexdigest()
    found, meant = load_file(toy.folder / file.file), load_file(plain.folder / file.file)
    layers = [name.removesuffix(".weight_q") for name in found if name.endswith(".weight_q")]
    assert len(layers) == QUANTISED and not [name for name in found if name.endswith(HALVES)]
    for layer in layers:
        q, scale = found[f"{layer}.weight_q"], found[f"{layer}.weight_scale"]
        assert q.dtype == np.int8
        np.testing.assert_array_equal(q * scale[:, None], meant[f"{layer}.weight"])
    assert {name: one.format for name, one in toy.manifest.weight_formats.items()} == dict.fromkeys(layers, "toy8")
    assert plain.manifest.weight_formats == {}


def test_the_cpu_provider_computes_with_it(bundles: tuple[Bundle, Bundle], wanted: Turns) -> None:
    assert largest(answers(OnnxSession(bundles[0], threads=1)), wanted) < LOGIT_TOLERANCE


def test_graphs_for_the_cuda_provider_compute_with_it(bundles: tuple[Bundle, Bundle], wanted: Turns) -> None:
    assert largest(answers(FusedSession(bundles[0], "cpu")), wanted) < LOGIT_TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", LOGIT_TOLERANCE), ("float16", HALF)])
def test_engines_compute_with_it(
    bundles: tuple[Bundle, Bundle],
    wanted: Turns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: FloatName,
    tolerance: float,
) -> None:
    """In float16 the graphs are retyped, and residual sums scaled and widened."""
    bundle = Bundle.load(shutil.copytree(bundles[0].folder, tmp_path / "bundle"))
    session, device = opened(bundle, monkeypatch, dtype=dtype)
    assert largest(answers(session), wanted) < tolerance
    device.check()


def test_it_equals_pytorch_on_dequantised_weights(
    bundles: tuple[Bundle, Bundle], checkpoints: tuple[Path, Path]
) -> None:
    m = bundles[0].manifest
    model = Reference(checkpoints[1], m.selection_layer, 0.5, m.selection)
    found = OnnxSession(bundles[0], threads=1).converse(0.5)
    for tokens in ([1, 2, 3, 4], [5]):
        assert np.abs(found.run(tokens).logits - model.run(tokens).logits.numpy()).max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_lowered_graphs_keep_the_contract(bundles: tuple[Bundle, Bundle], lowering: str) -> None:
    bundle, record = bundles[0], LOWERINGS[lowering]
    for name in GRAPH_NAMES:
        record.verify(name, lower(bundle.graph(name), lowering), bundle.manifest.graphs[name])


def test_projections_are_packed_in_layers_of_floats_alone(bundles: tuple[Bundle, Bundle]) -> None:
    decode = lower(join_decode(bundles[0].graph("prefix"), bundles[0].graph("decoder")), "ort-cuda")
    packed = [name for name in decode.graph.initializers if name.endswith("weight/packed")]
    assert len(packed) == 2
    kinds = [value.dtype for value in decode.graph.initializers.values()]
    assert kinds.count(ir.DataType.INT8) == QUANTISED


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_convert_floats_and_leave_integers(
    bundles: tuple[Bundle, Bundle], checkpoints: tuple[Path, Path], tmp_path: Path, wanted: Turns, dtype: FloatName
) -> None:
    bundle = export(ExportRecipe(checkpoints[0], tmp_path / "bundle", layer=2, dtype=dtype))
    (file,) = bundle.manifest.weights
    kinds = {str(array.dtype) for array in load_file(bundle.folder / file.file).values()}
    assert kinds == {"int8", dtype}
    found = answers(OnnxSession(bundle, threads=1))
    assert largest(found, answers(OnnxSession(bundles[0], threads=1))) < (HALF if dtype == "float16" else 8 * HALF)


def test_numbers_lie_at_multiples_of_their_size(bundles: tuple[Bundle, Bundle]) -> None:
    for name in GRAPH_NAMES:
        for value in bundles[0].graph(name).graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                assert (value.const_value.offset or 0) % value.const_value.dtype.itemsize == 0


def test_sources_in_several_files_are_read_together(
    bundles: tuple[Bundle, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that held nothing but sources is left out."""
    monkeypatch.setattr(placement, "_CHUNK", 4096)
    toy, _ = quantise(make_checkpoint(tmp_path / "plain"), tmp_path, shards=True)
    bundle = export(ExportRecipe(toy, tmp_path / "bundle", layer=2))
    assert [file.file for file in bundle.manifest.weights] == ["weights/model-00001-of-00002.safetensors"]
    found, wanted = (load_file(one.folder / one.manifest.weights[0].file) for one in (bundle, bundles[0]))
    assert {*found} == {*wanted} and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_estimates_count_its_bytes(bundles: tuple[Bundle, Bundle], checkpoints: tuple[Path, Path]) -> None:
    sizes = [Size(140, 196)]
    stored = load_file(bundles[0].folder / bundles[0].manifest.weights[0].file)
    before = estimate_recipe(ExportRecipe(checkpoints[0], Path("unused"), layer=2), sizes)
    after = estimate_bundle(bundles[0], sizes)
    assert before.weight_bytes == after.weight_bytes == sum(array.nbytes for array in stored.values())
    assert after.weight_bytes < estimate_bundle(bundles[1], sizes).weight_bytes
    assert before.pictures[0].pruned.flops == estimate_bundle(bundles[1], sizes).pictures[0].pruned.flops


def test_the_roofline_reads_its_bytes(bundles: tuple[Bundle, Bundle]) -> None:
    found, plain = (Workload(bundle) for bundle in bundles)
    stored = load_file(bundles[0].folder / bundles[0].manifest.weights[0].file)
    integers = sum(array.nbytes for array in stored.values() if array.dtype == np.int8)
    assert sum(found.integer_bytes.values()) == integers and not sum(plain.integer_bytes.values())
    floats = sum(array.size for name, array in stored.items() if array.dtype != np.int8 and "embed_tokens" not in name)
    assert sum(found.parameters.values()) == floats


def test_pytorch_takes_floats_alone(
    bundles: tuple[Bundle, Bundle], checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would draw the layers that it does not find at random."""
    sentence = "stores 14 layers as toy8 (such as model.layers.0."
    for command, arguments in (
        (ivc_check, [str(bundles[0].folder), "--against", str(checkpoints[0])]),
        (ivc_calibrate, ["--model", str(checkpoints[0])]),
    ):
        assert command(arguments) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_it_cannot_be_linked(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be converted and cannot be linked: leave out --weights link"):
        export(ExportRecipe(checkpoints[0], tmp_path / "bundle", weights="link"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight_scale": None}, "has no tensor model.layers.0.mlp.up_proj.weight_scale: download it again"),
        ({"weight_q.1": None}, "has no tensor model.layers.0.mlp.up_proj.weight_q.1: download it again"),
        ({"weight_scale": np.ones(96, np.int8)}, "but other tensors are float32: give one in float32"),
        (
            {"weight_q.1": np.ones((48, 64), np.int64)},
            r"weight_q.1 in model.safetensors is I64, but its format needs U8",
        ),
        ({"weight_scale": np.ones(3, np.float32)}, r"has shape \[3\]"),
        ({"weight_q.1": np.ones((3, 64), np.uint8)}, "has shape"),
    ],
)
def test_damaged_layers_are_refused(
    checkpoints: tuple[Path, Path], tmp_path: Path, change: dict[str, npt.NDArray[np.int8] | None], sentence: str
) -> None:
    checkpoint = Path(shutil.copytree(checkpoints[0], tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    for name, array in change.items():
        del tensors[f"model.layers.0.mlp.up_proj.{name}"]
        if array is not None:
            tensors[f"model.layers.0.mlp.up_proj.{name}"] = array
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        export(ExportRecipe(checkpoint, tmp_path / "bundle"))


def test_without_the_record_it_is_refused(
    bundles: tuple[Bundle, Bundle], checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FORMATS, "toy8")
    with pytest.raises(UserError, match=r"is quantised \(toy8"):
        export(ExportRecipe(checkpoints[0], tmp_path / "bundle"))
    with pytest.raises(UserError, match=r"made by a newer ivc-export \(weight_formats\..*: toy8 is unknown"):
        Bundle.load(bundles[0].folder)
