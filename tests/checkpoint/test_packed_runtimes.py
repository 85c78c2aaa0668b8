"""Bundles of packed layers on every runtime, against the same values as floats."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ivc_export.bench.roofline import Workload
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.dtypes import FloatName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.lowering import LOWERINGS, lower
from ivc_export.lowering.join_decode import join_decode
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from samples.make_sample import make_checkpoint
from tests.checkpoint.quantised import LAYOUTS, write
from tests.checkpoint.test_toy_format import HALF, Turns, answers, largest
from tests.conftest import LOGIT_TOLERANCE
from tests.runtime.test_tensorrt import opened

PACKED = ("AWQ", "GPTQ, 8 bits, activations ordered", "compressed-tensors")


@pytest.fixture(scope="module", params=PACKED)
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """In float16, as the checkpoint is, and in float32 of floats that mean the same."""
    folder = tmp_path_factory.mktemp("packed")
    stored, wanted = write(make_checkpoint(folder / "plain"), folder, LAYOUTS[request.param])
    return export(ExportRecipe(stored, folder / "a", layer=2)), export(ExportRecipe(wanted, folder / "b", layer=2))


@pytest.fixture(scope="module")
def wanted(bundles: tuple[Bundle, Bundle]) -> Turns:
    return answers(OnnxSession(bundles[1], threads=1))


def test_the_cpu_provider_widens_scales_alone(bundles: tuple[Bundle, Bundle], wanted: Turns) -> None:
    assert largest(answers(OnnxSession(bundles[0], threads=1)), wanted) < LOGIT_TOLERANCE


def test_graphs_for_the_cuda_provider_compute_with_them(bundles: tuple[Bundle, Bundle], wanted: Turns) -> None:
    assert largest(answers(FusedSession(bundles[0], "cpu")), wanted) < LOGIT_TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", LOGIT_TOLERANCE), ("float16", HALF)])
def test_engines_compute_with_their_values(
    bundles: tuple[Bundle, Bundle],
    wanted: Turns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: FloatName,
    tolerance: float,
) -> None:
    bundle = Bundle.load(shutil.copytree(bundles[0].folder, tmp_path / "bundle"))
    session, device = opened(bundle, monkeypatch, dtype=dtype)
    assert largest(answers(session), wanted) < tolerance
    device.check()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_lowered_graphs_keep_the_contract(bundles: tuple[Bundle, Bundle], lowering: str) -> None:
    bundle, record = bundles[0], LOWERINGS[lowering]
    for name in GRAPH_NAMES:
        record.verify(name, lower(bundle.graph(name), lowering), bundle.manifest.graphs[name])


def test_the_roofline_reads_packed_bytes(bundles: tuple[Bundle, Bundle]) -> None:
    found, plain = (Workload(bundle) for bundle in bundles)
    assert sum(found.integer_bytes.values()) > 0 == sum(plain.integer_bytes.values())
    assert sum(found.parameters.values()) < sum(plain.parameters.values())


def test_projections_of_the_cuda_provider_are_one_product(bundles: tuple[Bundle, Bundle]) -> None:
    """Unless each gathers the columns of x in an order of its own."""
    decode = lower(join_decode(bundles[0].graph("prefix"), bundles[0].graph("decoder")), "ort-cuda")
    ordered = any(name.endswith(".order") for name in decode.graph.initializers)
    products = [node for node in decode.graph if node.op_type == "MatMulNBits"]
    assert len(products) == 4 * (7 if ordered else 5)
