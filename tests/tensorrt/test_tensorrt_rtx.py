"""TensorRT-RTX parses and compiles the native graphs, on a machine without a GPU. It does not run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tensorrt_rtx as trt

from ivc_export import families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.lowering import lower
from ivc_export.tensorrt.graphs import typed
from samples.make_sample import make_checkpoint
from samples.tiny import TINY

Extents = dict[str, tuple[int, int, int]]
PREFILL: Extents = {  # minimum, optimum, maximum of each symbolic axis
    "B": (1, 1, 4),
    "patches": (4, 768, 5120),
    "visual": (1, 192, 1280),
    "L": (1, 192, 1280),
    "T": (0, 40, 512),
    "H": (1, 16, 1280),
    "V": (1, 16, 1280),
    "S": (1, 232, 1792),
    "Q": (1, 20, 512),
    "M": (1, 136, 1792),
    "P": (0, 0, 1024),
    "W": (0, 0, 1024),
    "R": (1, 1, 1),
    "keep_count": (1, 96, 1280),
}
DECODE: Extents = dict.fromkeys(PREFILL, (1, 1, 1)) | {"T": (0, 0, 0), "P": (1024, 1024, 1024), "W": (1024, 1024, 1024)}


def profile(builder: Any, model: ir.Model, extents: Extents) -> Any:
    found = builder.create_optimization_profile()
    for value in model.graph.inputs:
        axes = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape or ()]
        if value.name == "keep_count":
            found.set_shape_input(value.name, *[[extent] for extent in extents["keep_count"]])
        else:
            shapes = [[axis if isinstance(axis, int) else extents[axis][i] for axis in axes] for i in range(3)]
            found.set_shape(value.name, *shapes)
    return found


@pytest.fixture(scope="module", params=[*families.names(), "internvl3_5"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "checkpoint", TINY[request.param])
    return export(ExportRecipe(checkpoint, folder / "bundle"))


def compiled(model: ir.Model, folder: Path, name: GraphName, architecture: str) -> Any:
    """A serialised engine."""
    path: Path = folder / f"{name}.{architecture}.onnx"
    weights: Path = folder / f"{name}.{architecture}.data"
    converted = any(isinstance(value.const_value, ir.LazyTensor) for value in model.graph.initializers.values())
    ir.save(model, path, external_data=weights.name if converted else None)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    try:
        parsed = parser.parse_from_file(str(path))
    finally:
        path.unlink()
        weights.unlink(missing_ok=True)
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, architecture), 0)
    for extents in (PREFILL,) if name == "vision" else (PREFILL, DECODE):
        config.add_optimization_profile(profile(builder, model, extents))
    return builder.build_serialized_network(network, config)


@pytest.mark.parametrize("architecture", ["SM86", "SM89", "SM120"])
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_native_graphs_compile(bundle: Bundle, name: GraphName, architecture: str) -> None:
    engine = compiled(lower(bundle.graph(name), "native"), bundle.folder, name, architecture)
    assert engine is not None and engine.nbytes > 0


@pytest.mark.parametrize("bundle", ["qwen2_5_vl", "qwen3_vl"], indirect=True)  # all functions but SelectTileTokens
@pytest.mark.parametrize("name", ["vision", "prefix"])
def test_graphs_in_float16_compile(bundle: Bundle, name: GraphName) -> None:
    """With residual sums in scale and in float32, as ivc-build gives them to it."""
    model = lower(typed(bundle, name, "float16"), "native")
    engine = compiled(model, bundle.folder, name, "SM120")
    assert engine is not None and engine.nbytes > 0
