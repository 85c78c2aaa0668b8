"""Products with what surrounds them become one node, and only where that is what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from ivc_export.checkpoint.weights import Weights, read_values
from ivc_export.contract.manifest import GraphInfo, TensorInfo
from ivc_export.graph import activations
from ivc_export.graph.builder import Graph
from ivc_export.lowering.fused.activation import activation
from ivc_export.lowering.fused.linears import FuseLinearsPass, scaled_row

ROWS = '<ir_version: 8, opset_import: ["" : 17, "ivc" : 1]> g '
ROWS += "(float[S, 8] x, float[S, 8] r, float16[S, 8] hx) => (float[S, 8] y) {"
WEIGHTS = {"w": (8, 8), "u": (8, 8), "v": (8, 8), "b": (8,), "n": (8,), "k": (1, 8)}
WEIGHTS_OF = {name: number for number, name in enumerate(WEIGHTS)}
"""Each value of a weight."""
PACKED: dict[str, npt.NDArray[Any]] = {
    "p": np.zeros((8, 1, 8), np.uint8),
    "hs": np.ones((8, 1), np.float16),
    "z": np.zeros((8, 1), np.uint8),
    "hf": np.array(0.25, np.float16),
    "hb": np.ones(8, np.float16),
    "hn": np.ones(8, np.float16),
    "hw": np.ones((8, 8), np.float16),
    "axes": np.zeros(1, np.int64),
}


def fused(body: str, bits: tuple[int, ...] = (4, 8)) -> list[ir.Node]:
    """The nodes of a graph of x and r, weights w, u and v, a bias b and a norm n, after the pass,
    which changes it unless it must leave the only product, of 8 bits, as it is."""
    proto = onnx.parser.parse_model(ROWS + body + "}")
    for name, shape in WEIGHTS.items():
        array = np.full(shape, WEIGHTS_OF[name], np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for name, array in PACKED.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.serde.deserialize_model(proto)
    assert FuseLinearsPass(bits)(model).modified == (8 in bits)
    return list(model.graph)


def read(node: ir.Node) -> list[str | None]:
    return [None if value is None else value.name for value in node.inputs]


def test_a_whole_layer_is_two_nodes() -> None:
    one, two = fused("""
        m = ivc.RMSNorm <epsilon = 0.5> (x, n)
        g = Gemm <transB = 1> (m, w)
        h = Gemm <transB = 1> (m, u)
        s = Sigmoid (g)
        a = Mul (g, s)
        c = Mul (a, h)
        d = Gemm <transB = 1, alpha = 0.25, beta = 0.25> (c, w, b)
        y = Add (r, d)""")
    assert read(one) == ["x", "w+u/packed", "n"] and read(two) == [one.outputs[0].name, "w", None, "b/0.25", "r"]
    values = {name: attribute.value for name, attribute in one.attributes.items()}
    assert values == {"activation": "swish", "gated": 1, "slope": 1.0, "scale": 1.0, "epsilon": 0.5}
    assert two.attributes["scale"].as_float() == 0.25 and two.outputs[0].name == "y"


def test_a_layer_norm_is_its_weight_and_then_its_bias() -> None:
    (one,) = fused("m = LayerNormalization <epsilon = 0.5> (x, n, b) y = Gemm <transB = 1> (m, w)")
    assert read(one) == ["x", "w", "n+b/packed"] and one.attributes["epsilon"].as_float() == 0.5
    norm = one.inputs[2]
    assert norm is not None and norm.const_value is not None
    assert norm.const_value.numpy().tolist() == [WEIGHTS_OF["n"]] * 8 + [WEIGHTS_OF["b"]] * 8
    (plain,) = fused("m = LayerNormalization <axis = -1> (x, n, b) y = Gemm <transB = 1> (m, w)")
    assert plain.attributes["epsilon"].as_float() == np.float32(1e-5)  # what ONNX says where it is left out


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("m = ivc.RMSNorm <epsilon = 1.0> (x, n) g = Gemm <transB = 1> (m, w) y = Add (g, m)", ["RMSNorm"]),
        ("m = LayerNormalization (x, n, b) g = Gemm <transB = 1> (m, w) y = Add (g, m)", ["LayerNormalization"]),
        ("m = LayerNormalization (x, n) y = Gemm <transB = 1> (m, w)", ["LayerNormalization"]),
        ("m = LayerNormalization <axis = 0> (x, n, b) y = Gemm <transB = 1> (m, w)", ["LayerNormalization"]),
        ("m = LayerNormalization (x, n, r) y = Gemm <transB = 1> (m, w)", ["LayerNormalization"]),
        ("g = Gemm <transB = 1> (x, w) s = Sigmoid (g) a = Mul (g, s) y = Add (a, g)", ["Sigmoid", "Mul", "Add"]),
        ("g = Gemm <transB = 1> (x, w) y = Add (g, k)", ["Add"]),
        ("g = Gemm <transB = 1> (x, w) y = Add (g, g)", ["Add"]),
        ("g = Gemm <transB = 1> (x, w) t = Add (g, r) y = Mul (t, g)", ["Add", "Mul"]),
        (
            "g = Gemm <transB = 1> (x, w) s = Sigmoid (g) a = Mul (g, s) h = Gemm <transB = 1> (r, u) y = Mul (a, h)",
            ["Mul"],
        ),
    ],
    ids=[
        "norm read twice",
        "layer norm read twice",
        "layer norm without bias",
        "layer norm over rows too",
        "layer norm with a bias of rows",
        "product read twice",
        "constant",
        "itself",
        "sum and more",
        "gate of other rows",
    ],
)
def test_what_something_else_reads_stays(body: str, left: list[str]) -> None:
    assert [node.op_type for node in fused(body) if node.op_type != "FusedLinear"] == left


def test_joins_that_begin_alike_are_apart() -> None:
    nodes = fused("""
        g = Gemm <transB = 1> (x, w) h = Gemm <transB = 1> (x, u) s = Sigmoid (g) a = Mul (g, s) o = Mul (a, h)
        i = Gemm <transB = 1> (x, w) j = Gemm <transB = 1> (x, v) t = Sigmoid (i) c = Mul (i, t) d = Mul (c, j)
        y = Add (o, d)
    """)
    weights = [node.inputs[1] for node in nodes]
    found = {w.name: read_values(w.const_value)[:, 0].tolist() for w in weights if w is not None and w.const_value}
    assert found == {"w+u/packed": [0] * 8 + [1] * 8, "w+v/packed": [0] * 8 + [2] * 8}


def test_rows_times_factors_that_look_alike_are_apart() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=8)
    row = ir.val("b", const_value=ir.tensor(np.ones(2, np.float32), name="b"))
    one, two = (scaled_row(model.graph, row, factor) for factor in (0.12345678, 0.12345679))
    assert one.name != two.name


def test_a_constant_row_is_a_bias() -> None:
    (node,) = fused("g = Gemm <transB = 1> (x, w) h = Add (g, b) y = Add (h, r)")
    assert read(node) == ["x", "w", None, "b", "r"]


def test_a_product_that_is_an_output_keeps_its_name() -> None:
    (node,) = fused("y = Gemm <transB = 1> (x, w)")
    assert (node.op_type, node.outputs[0].name) == ("FusedLinear", "y")


@pytest.mark.parametrize(
    ("behind", "left"),
    [
        ("c = Cast <to = 1> (g) y = Unsqueeze (c, axes)", ["FusedLinearWide", "Unsqueeze"]),
        ("c = Cast <to = 1> (g) y = Sqrt (c)", ["FusedLinear", "Cast", "Sqrt"]),
        ("c = Cast <to = 1> (g) d = Neg (c) y = Unsqueeze (c, axes)", ["FusedLinear", "Cast", "Unsqueeze"]),
    ],
    ids=["logits", "no logits", "read twice"],
)
def test_logits_are_not_rounded(behind: str, left: list[str]) -> None:
    assert [node.op_type for node in fused(f"g = Gemm <transB = 1> (hx, hw) {behind}")] == left


def test_packed_products_are_one_node_too() -> None:
    """In scale, as ScaleResidualsPass leaves it: rows and bias are scaled, for a packed product has no alpha."""
    sizes = "bits = 4, block_size = 16, K = 8, N = 8"
    nodes = fused(
        f"""m = ivc.RMSNorm <epsilon = 0.5> (hx, hn)
        g = ivc.LinearNBits <{sizes}> (m, p, hs)
        h = ivc.LinearNBits <{sizes}> (m, p, hs)
        s = Sigmoid (g) a = Mul (g, s) c = Mul (a, h)
        e = Mul (c, hf) q = ivc.LinearNBitsZeroPoints <{sizes}> (e, p, hs, z)
        f = Mul (hb, hf) d = Add (q, f) t = Add (hx, d) y = Cast <to = 1> (t)""",
    )
    one, two = [node for node in nodes if node.op_type == "FusedLinearInt4"]
    assert read(one) == ["hx", "p+p/packed", "hs+hs/packed", None, "hn"]
    assert read(two) == [one.outputs[0].name, "p", "hs", "z", None, "hb/0.25", "hx"]
    assert (two.attributes["scale"].as_float(), two.attributes["block_size"].as_int()) == (0.25, 16)
    assert one.attributes["gated"].as_int() and [node.op_type for node in nodes][2:] == ["Cast"]


@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu_tanh", "gelu"])
def test_every_activation_of_portable_graphs_is_known(name: str) -> None:
    make: Callable[[Graph, ir.Value], ir.Value] = getattr(activations, name)
    x = TensorInfo(name="x", dtype="float32", shape=("S", 8))
    g = Graph(GraphInfo(file="g.onnx", inputs=(x,), outputs=()), "float32", Weights({}, "float32"))
    given = g.inputs["x"]
    found = activation(make(g, given).producer())
    assert found is not None and found.x is given
    known = {"silu": ("swish", 1.0), "quick_gelu": ("swish", 1.702)}
    wanted, slope = known.get(name, (name, 1.0))
    assert found.name == wanted and found.slope == pytest.approx(slope)


@pytest.mark.parametrize("bits", [(4, 8), (4,)])
def test_packed_products_are_fused_in_the_bits_that_a_kernel_takes(bits: tuple[int, ...]) -> None:
    sizes = "bits = 8, block_size = 16, K = 8, N = 8"
    body = f"m = ivc.RMSNorm <epsilon = 0.5> (hx, hn) g = ivc.LinearNBits <{sizes}> (m, p, hs) y = Cast <to = 1> (g)"
    nodes = fused(body, bits)
    assert ("FusedLinearInt8" in [node.op_type for node in nodes]) == (8 in bits)
    if 8 in bits:
        assert read(nodes[0]) == ["hx", "p", "hs", None, "hn"]
