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
from ivc_export.contract import FLOATS
from ivc_export.decoder import decoder_graph
from ivc_export.passes import WidenResidualsPass, lower
from ivc_export.prefix import prefix_graph
from samples.make_sample import RecordingWeights
from tests.test_tensorrt_rtx import DECODE, PREFILL, profile

SIZES = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


class ZeroWeights(RecordingWeights):
    """float16 weights, all in one file of zeros."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "dtype", "float16")
        self.size = 0

    def external(self, name: str, shape: Sequence[int], stored_shape: Sequence[int] | None = None) -> ir.ExternalTensor:
        offset, length = self.size, 2 * int(np.prod(shape))
        self.size += -(-length // 256) * 256
        return ir.ExternalTensor("zeros", offset, length, FLOATS["float16"], shape=ir.Shape(shape), name=name)


@pytest.fixture(scope="module")
def layer_pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layers")
    family, weights = families.of("qwen2_vl"), ZeroWeights()
    model = family.read({**family.tiny, **SIZES}, None)
    paths = {}
    for graph in (prefix_graph(model, weights, 1), decoder_graph(model, weights, 1)):
        for variant, lowered in (
            ("float16", lower(graph.clone(), "native")),
            ("wide residuals", lower(WidenResidualsPass()(graph).model, "native")),
        ):
            path = paths[f"{graph.graph.name} {variant}"] = folder / f"{graph.graph.name}.{variant}.onnx"
            ir.save(lowered, path)
    with (folder / "zeros").open("wb") as file:
        file.truncate(weights.size)
    return paths


@pytest.mark.parametrize(
    ("graph", "architecture"),
    [
        *((f"{name} float16", sm) for name in ("prefix", "decoder") for sm in ("SM86", "SM89", "SM120")),
        *((f"{name} wide residuals", "SM86") for name in ("prefix", "decoder")),
    ],
)
def test_layers_of_true_size_compile(layer_pair: dict[str, Path], graph: str, architecture: str) -> None:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(layer_pair[graph])), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, architecture), 0)
    for extents in (PREFILL, DECODE):
        config.add_optimization_profile(profile(builder, ir.load(layer_pair[graph]), extents))
    engine = builder.build_serialized_network(network, config)
    assert engine is not None and engine.nbytes > 50e6  # one layer's weights at least
