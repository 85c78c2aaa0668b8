"""TensorRT-RTX compiles one layer below and one above the cut at Qwen2-VL-2B's sizes, in float16. It does not run them.

Weights are zeros, and the vocabulary is small: a layer is what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tensorrt_rtx as trt

from ivc_export import families
from ivc_export.checkpoint.weights import PlannedWeights
from ivc_export.dtypes import FLOATS
from ivc_export.exporter.graphs import decoder_graph, prefix_graph
from ivc_export.lowering import lower
from ivc_export.lowering.precision.widen_residuals import WidenResidualsPass
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.profiles import Extents
from ivc_export.tensorrt.recipe import Options
from samples.tiny import TINY

PREFILL: Extents = {  # minimum, optimum, maximum of each symbolic axis
    "L": (1, 576, 1280),
    "T": (0, 64, 512),
    "S": (1, 640, 1792),
    "Q": (1, 32, 512),
    "M": (1, 352, 1792),
    "P": (0, 0, 2304),
    "R": (1, 1, 1),
    "keep_count": (1, 288, 1280),
}
DECODE: Extents = dict.fromkeys(PREFILL, (1, 1, 1)) | {"T": (0, 0, 0), "P": (2304, 2304, 2304)}
EXTENTS = (PREFILL, DECODE)
SIZES = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


class ZeroWeights(PlannedWeights):
    """float16 weights, all in one file of zeros."""

    def __init__(self) -> None:
        super().__init__("float16")
        self.size = 0

    def external(
        self, name: str, shape: Sequence[int], stored_shape: Sequence[int] | None = None, dtype: str | None = None
    ) -> ir.ExternalTensor:
        offset, length = self.size, 2 * int(np.prod(shape))
        self.size += -(-length // 256) * 256
        return ir.ExternalTensor("zeros", offset, length, FLOATS["float16"].onnx, shape=ir.Shape(shape), name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def layer_pair(folder: Path) -> dict[str, ir.Model]:
    family, weights = families.of("qwen2_vl"), ZeroWeights()
    config = {**TINY[family.model_type], **SIZES}
    config["vision_config"] = {**config["vision_config"], "hidden_size": SIZES["hidden_size"]}
    model = family.read(config, None)
    models = {}
    for graph in (prefix_graph(model, weights, 1), decoder_graph(model, weights, 1)):
        models[f"{graph.graph.name} float16"] = lower(graph.clone(), "native")
        models[f"{graph.graph.name} wide residuals"] = lower(WidenResidualsPass()(graph).model, "native")
    with (folder / "zeros").open("wb") as file:
        file.truncate(weights.size)
    return models


@pytest.mark.parametrize(
    ("graph", "capability"),
    [
        *((f"{name} float16", sm) for name in ("prefix", "decoder") for sm in ("8.6", "8.9", "12.0")),
        *((f"{name} wide residuals", "8.6") for name in ("prefix", "decoder")),
    ],
)
def test_layers_of_true_size_compile(
    layer_pair: dict[str, ir.Model], folder: Path, graph: str, capability: str
) -> None:
    plan = compile_graph(trt, layer_pair[graph].clone(), EXTENTS, Options("tensorrt-rtx", capability), folder)
    assert len(plan) > 50e6  # one layer's weights at least
