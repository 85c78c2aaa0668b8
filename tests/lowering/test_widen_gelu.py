"""GELU is computed in float32 and rounded once, by standard operators and by onnxruntime's own."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession

from ivc_export.lowering.onnxruntime.activations import FuseActivationsPass
from ivc_export.lowering.precision.widen_gelu import WidenGeluPass

GELU = """
    c = Cast <to = 10> (root) m = Mul (g, c) e = Erf (m) d = Cast <to = 10> (half) h = Mul (g, d)
    f = Cast <to = 10> (one) t = Add (e, f) y = Mul (h, t)
"""
"""GELU of g, as graph.activations writes it."""
CONSTANTS: dict[str, npt.NDArray[Any]] = {
    "root": np.array(0.5**0.5, np.float32),
    "half": np.array(0.5, np.float32),
    "one": np.array(1.0, np.float32),
    "w": np.eye(8, dtype=np.float16),
    "b": np.full(8, 1 / 1024, np.float16),
}


def graph(body: str, dtype: str = "float16") -> ir.Model:
    """Of rows x [S, 8], in a dtype."""
    head = f'<ir_version: 8, opset_import: ["" : 17]> g ({dtype}[S, 8] x) => ({dtype}[S, 8] y) {{'
    proto = onnx.parser.parse_model(head + body + "}")
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in CONSTANTS.items())
    for number, node in enumerate(proto.graph.node):
        node.name = f"node{number}"
    return ir.serde.deserialize_model(proto)


def units(found: npt.NDArray[Any], x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The distances of a result from GELU of x, in units of float16's last place."""
    wide = x.astype(np.float64)
    wanted = wide / 2 * (1 + np.vectorize(erf)(wide / np.sqrt(2)))
    distance: npt.NDArray[np.float64] = np.abs(found - wanted) / np.spacing(np.abs(wanted).astype(np.float16))
    return distance


def by_operator(model: ir.Model) -> npt.NDArray[Any]:
    """The result for ROWS, rounded behind each operator: onnxruntime's CPU provider leaves such roundings out."""
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": ROWS})
    assert isinstance(found, list)
    result: npt.NDArray[Any] = found[0]
    return result


def by_onnxruntime(model: ir.Model) -> npt.NDArray[Any]:
    content = ir.to_proto(model).SerializeToString()
    found: npt.NDArray[Any] = InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": ROWS})[0]
    return found


ROWS = np.linspace(-2.5, 4, 800).astype(np.float16).reshape(-1, 8)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Cast"]


def test_gelu_is_rounded_once() -> None:
    model = graph(GELU.replace("(g,", "(x,"))
    assert units(by_operator(model), ROWS).max() > 5
    assert WidenGeluPass()(model).modified
    assert units(by_operator(model), ROWS).max() < 0.51
    assert FuseActivationsPass()(model).modified
    assert operators(model) == ["Gelu"]
    assert units(by_onnxruntime(model), ROWS).max() < 0.51


def test_a_bias_before_gelu_is_not_rounded() -> None:
    model = graph(f"g = Gemm <transB = 1> (x, w, b) {GELU}")
    WidenGeluPass()(model)
    FuseActivationsPass()(model)
    assert operators(model) == ["Gemm", "BiasGelu"]
    assert units(by_onnxruntime(model), ROWS + np.float64(CONSTANTS["b"][0])).max() < 0.51


def test_a_product_that_something_else_reads_keeps_its_bias() -> None:
    model = graph(f"g = Gemm <transB = 1> (x, w, b) {GELU.replace('y =', 'z =')} y = Add (z, g)")
    WidenGeluPass()(model)
    FuseActivationsPass()(model)
    assert operators(model) == ["Gemm", "Gelu", "Add"]
    assert len(next(node for node in model.graph if node.op_type == "Gemm").inputs) == 3


def test_gelu_in_float32_stays() -> None:
    model = graph(GELU.replace("(g,", "(x,").replace("to = 10", "to = 1"), "float")
    assert not WidenGeluPass()(model).modified
    assert FuseActivationsPass()(model).modified
    assert operators(model) == ["Gelu"]
