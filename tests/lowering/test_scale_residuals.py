"""Residual streams in scale: hand-made graphs of each kind of layer, which any rewrite of the pass must hold, too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, OPSET
from ivc_export.errors import UserError
from ivc_export.graph.functions import function
from ivc_export.lowering.precision.scale_residuals import SCALE, ScaleResidualsPass

HIDDEN = 8
EPSILON = 0.1
"""Large, so that a norm with a wrong one gives numbers that are plainly wrong."""


class Hand:
    """A graph written node by node: values are named by what made them."""

    def __init__(self, graph: str, source: str) -> None:
        self.graph, self.source = graph, source
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, npt.NDArray[np.float32]] = {}
        self.outputs: list[str] = []
        self._random = np.random.default_rng(0)

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op_type}.{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"weight.{len(self.constants)}"
        self.constants[name] = self._random.standard_normal(shape).astype(np.float32)
        return name

    def linear(self, x: str, bias: bool = False, **attributes: float) -> str:
        biases = [self.weight(HIDDEN)] if bias else []
        return self.op("Gemm", x, self.weight(HIDDEN, HIDDEN), *biases, transB=1, **attributes)

    def norm(self, x: str) -> str:
        return self.op("RMSNorm", x, self.weight(HIDDEN), domain=IVC_DOMAIN, epsilon=EPSILON)

    def layer_norm(self, x: str) -> str:
        return self.op("LayerNormalization", x, self.weight(HIDDEN), self.weight(HIDDEN), axis=-1, epsilon=EPSILON)

    def layer(self, x: str) -> str:
        """A plain pre-norm layer's half."""
        return self.op("Add", x, self.linear(self.norm(x)))

    def output(self, name: str, value: str) -> None:
        for node in self.nodes:
            node.output[:] = [name if one == value else one for one in node.output]
            node.input[:] = [name if one == value else one for one in node.input]
        self.outputs.append(name)

    def model(self) -> onnx.ModelProto:
        def info(name: str, rows: str | int = "S") -> onnx.ValueInfoProto:
            return onnx.helper.make_tensor_value_info(name, 1, [1, rows, HIDDEN])

        used = {one for node in self.nodes for one in node.input}
        inputs = [info(self.source), *([info("extra")] if "extra" in used else [])]
        shapes: dict[str, list[str | int]] = {"hidden_states": [1, "S", HIDDEN]}
        outputs = [onnx.helper.make_tensor_value_info(n, 1, shapes.get(n, ["S", HIDDEN])) for n in self.outputs]
        constants = [onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = onnx.helper.make_graph(self.nodes, self.graph, inputs, outputs, constants)
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(IVC_DOMAIN, 1)]
        functions = [ir.to_proto(function("RMSNorm"))]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, functions=functions)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), "zero"))
        onnx.checker.check_model(model, full_check=True)
        return model


Block = Callable[[Hand, str], str]
"""Takes the stream [S, HIDDEN], and returns it after a layer."""


def prefix(block: Block) -> onnx.ModelProto:
    """inputs_embeds to hidden_states, with a plain layer before and behind `block`."""
    g = Hand("prefix", "inputs_embeds")
    x = g.layer(block(g, g.layer(g.op("Squeeze", "inputs_embeds", "zero"))))
    g.output("hidden_states", g.op("Unsqueeze", x, "zero"))
    return g.model()


def decoder(block: Block) -> onnx.ModelProto:
    """hidden_states, which come in scale, to logits, with a plain layer before and behind `block`."""
    g = Hand("decoder", "hidden_states")
    x = g.layer(block(g, g.layer(g.op("Squeeze", "hidden_states", "zero"))))
    g.output("logits", g.linear(g.norm(x)))
    return g.model()


def run(model: onnx.ModelProto, scale: float) -> dict[str, npt.NDArray[np.float32]]:
    """On small values, beside which EPSILON counts; hidden_states are given and given back at `scale`."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = np.random.default_rng(1).standard_normal((1, 5, HIDDEN)).astype(np.float32) / 4
    feeds = {one.name: values * (scale if one.name == "hidden_states" else 1) for one in session.get_inputs()}
    found = dict(zip([one.name for one in session.get_outputs()], session.run(None, feeds), strict=True))
    return {name: array / np.float32(scale if name == "hidden_states" else 1) for name, array in found.items()}


def scaled(model: onnx.ModelProto) -> onnx.ModelProto:
    return ir.to_proto(ScaleResidualsPass()(ir.from_proto(model)).model)


def normed_queries(g: Hand, x: str) -> str:
    """Norms of queries and keys, which are no part of the stream."""
    normed = g.norm(x)
    query, key = (g.norm(g.linear(normed)) for _ in range(2))
    return g.op("Add", x, g.linear(g.op("Mul", query, key)))


def sums_within(g: Hand, x: str) -> str:
    """A sum inside of a layer, of a product with a bias, of what was a product of the norm."""
    normed = g.norm(x)
    return g.op("Add", x, g.linear(g.op("Add", g.linear(normed), g.linear(normed, bias=True))))


def experts(g: Hand, x: str) -> str:
    """A mixture: each expert's product times its gate, summed."""
    normed = g.norm(x)
    gates = g.op("Softmax", g.linear(normed), axis=-1)
    parts = [g.op("Mul", g.linear(normed), gates) for _ in range(2)]
    return g.op("Add", x, g.op("Add", *parts))


def shared(g: Hand, x: str) -> str:
    """A product that is added, and read elsewhere in its own size."""
    product = g.linear(g.norm(x))
    return g.op("Add", g.op("Add", x, product), g.linear(g.op("Sigmoid", product)))


def given_out(g: Hand, x: str) -> str:
    """A product that is an output of the graph, too."""
    product = g.linear(g.norm(x))
    total = g.op("Add", x, product)
    g.output("logits" if g.graph == "prefix" else "other", product)
    return total


def selected(g: Hand, x: str) -> str:
    """A product with the stream itself that only the selection's output shows."""
    if g.graph == "prefix":
        g.output("scored_values", g.linear(x, bias=True, alpha=0.5))
    return g.layer(x)


SCALABLE: dict[str, Block] = {
    "a plain layer": Hand.layer,
    "norms of queries and keys": normed_queries,
    "sums within a layer": sums_within,
    "attention and MLP side by side": lambda g, x: g.op(
        "Add", g.op("Add", x, g.linear(g.norm(x))), g.linear(g.norm(x))
    ),
    "the product first": lambda g, x: g.op("Add", g.linear(g.norm(x)), x),
    "a product with a factor": lambda g, x: g.op("Add", x, g.linear(g.norm(x), alpha=0.25)),
    "the stream twice": lambda g, x: g.op("Add", x, x),
    "two streams": lambda g, x: g.op("Add", g.layer(x), g.layer(x)),
    "rows in another order": lambda g, x: g.op("Gather", x, "zero", axis=0),
    "a mixture of experts": experts,
    "a scale by layer": lambda g, x: g.op("Add", x, g.op("Mul", g.linear(g.norm(x)), g.weight(HIDDEN))),
    "a norm behind the layer": lambda g, x: g.op("Add", x, g.norm(g.linear(g.norm(x)))),
    "a layer norm": lambda g, x: g.op("Add", x, g.linear(g.layer_norm(x))),
    "a product with a bias": lambda g, x: g.op("Add", x, g.linear(g.norm(x), bias=True)),
    "features of another place": lambda g, x: g.op("Add", x, g.op("Squeeze", "extra", "zero")),
    "a product that is read twice": shared,
    "a product that is an output": given_out,
    "a product for the selection": selected,
}


@pytest.mark.parametrize("make", [prefix, decoder])
@pytest.mark.parametrize("name", SCALABLE)
def test_graphs_in_scale_give_the_same_numbers(name: str, make: Callable[[Block], onnx.ModelProto]) -> None:
    model = make(SCALABLE[name])
    wanted, found = run(model, 1.0), run(scaled(model), SCALE)
    assert wanted.keys() == found.keys()
    for key, array in wanted.items():
        assert np.abs(found[key] - array).max() < 1e-5 * np.abs(array).max(), key


REFUSED: dict[str, tuple[Block, str]] = {
    "a norm of the sum": (
        lambda g, x: g.norm(g.op("Add", x, g.linear(x))),
        "(Gemm) reads the residual stream",
    ),
    "a router on the stream itself": (
        lambda g, x: g.op("Add", x, g.linear(g.op("Sigmoid", x))),
        "(Sigmoid) reads the residual stream",
    ),
    "a factor on the stream": (
        lambda g, x: g.op("Mul", x, g.weight(HIDDEN)),
        "(Mul) reads the residual stream",
    ),
    "a difference": (
        lambda g, x: g.op("Sub", x, g.linear(g.norm(x))),
        "(Sub) reads the residual stream",
    ),
}


@pytest.mark.parametrize("make", [prefix, decoder])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_refused(name: str, make: Callable[[Block], onnx.ModelProto]) -> None:
    block, sentence = REFUSED[name]
    model = make(block)
    assert all(np.isfinite(array).all() for array in run(model, 1.0).values())
    with pytest.raises(UserError, match=re.escape(sentence) + ".*: build engines with ivc-build --dtype float32"):
        scaled(model)


def test_a_stream_that_ends_elsewhere_is_refused() -> None:
    """hidden_states behind a norm, or an output that shows the stream."""
    g = Hand("prefix", "inputs_embeds")
    x = g.norm(g.layer(g.op("Squeeze", "inputs_embeds", "zero")))
    g.output("hidden_states", g.op("Unsqueeze", x, "zero"))
    with pytest.raises(UserError, match="gives hidden_states, which is not the residual stream"):
        scaled(g.model())
    g = Hand("decoder", "hidden_states")
    g.output("logits", g.layer(g.op("Squeeze", "hidden_states", "zero")))
    with pytest.raises(UserError, match="gives logits, which is the residual stream"):
        scaled(g.model())


def test_vision_graphs_stay_as_they_are() -> None:
    g = Hand("vision", "pixel_values")
    g.output("image_embeds", g.layer(g.op("Squeeze", "pixel_values", "zero")))
    model = g.model()
    assert scaled(model).graph == ir.to_proto(ir.from_proto(model)).graph
