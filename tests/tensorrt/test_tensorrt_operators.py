"""Every operator, dtype and opset of the graphs against what the parsers of TensorRT 8.6 and 10.3 say they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ivc_export import families
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.contract.operators import OPERATORS
from ivc_export.dtypes import FLOATS, FloatName
from ivc_export.lowering import lower
from ivc_export.lowering.precision.scale_residuals import ScaleResidualsPass
from ivc_export.lowering.precision.widen_residuals import WidenResidualsPass
from ivc_export.lowering.tensorrt.plugin import KERNELS
from tests.lowering.test_tensorrt_passes import tiny_graphs

TABLE = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_operators.json").read_text(encoding="utf-8"))
NAMES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}
DTYPES = [("8.6", "float32"), ("8.6", "float16"), *(("10.3", dtype) for dtype in FLOATS)]


def data(node: ir.Node) -> list[ir.Value]:
    """Inputs and outputs of a node that are its data, not indices, shapes or conditions, by the schema's types."""
    schema = onnx.defs.get_schema(node.op_type, 17, "")
    first = schema.inputs[0].type_str if schema.inputs else schema.outputs[0].type_str
    kinds = {"Where": {"T"}, "Cast": {"T1", "T2"}}.get(node.op_type, {first})
    found = []
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        kept = [v for i, v in enumerate(values) if formal[min(i, len(formal) - 1)].type_str in kinds]
        found += [value for value in kept if value is not None]
    return found


def type_name(value: ir.Value, table: dict[str, Any]) -> str:
    assert value.dtype is not None, f"{value.name} has no type"
    name = value.dtype.name
    if name == "INT64" and table["int64"] != "read as it is":
        if value.const_value is not None:
            assert np.abs(value.const_value.numpy()).max(initial=0) < 2**31, value.name
        return "INT32"
    return NAMES.get(name, name)


def typed(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True, data_prop=True))


def check(model: ir.Model, table: dict[str, Any]) -> None:
    assert model.opset_imports[""] <= table["opset"]
    for node in model.graph.all_nodes():
        if node.domain == IVC_DOMAIN:
            assert node.op_type in KERNELS
            continue
        assert node.op_type in table["operators"], f"{node.name}: {node.op_type}"
        assert not set(node.attributes) & set(table["ignored_attributes"].get(node.op_type, ())), node.name
        for index in table["constant_inputs"].get(node.op_type, ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            producer = value.producer() if value is not None else None
            assert value is None or value.const_value is not None or (producer and producer.op_type == "Constant")
        for value in data(node):
            supported = table["operators"][node.op_type]
            assert type_name(value, table) in supported, f"{node.name}: {value.name} is {value.dtype}"


def test_the_table_knows_every_operator_of_the_contract() -> None:
    for version in ("8.6", "10.3"):
        assert set(TABLE[version]["operators"]) >= OPERATORS


@pytest.mark.parametrize(("version", "dtype"), DTYPES)
@pytest.mark.parametrize("family", families.names())
def test_native_graphs_are_read(family: str, version: str, dtype: FloatName) -> None:
    for graph in tiny_graphs(dtype, family):
        check(typed(lower(graph, "native")), TABLE[version])


@pytest.mark.parametrize("family", families.names())
def test_plugin_graphs_are_read_but_for_the_plugin(family: str) -> None:
    for graph in tiny_graphs("float16", family):
        wanted = {node.op_type for node in lower(graph.clone(), "native").graph.all_nodes()} | {
            "Expand",
            "Cast",
            "Split",
        }
        lowered = lower(graph, "plugin")
        assert {n.op_type for n in lowered.graph.all_nodes() if n.domain != IVC_DOMAIN} <= wanted
        assert {n.op_type for n in lowered.graph.all_nodes() if n.domain == IVC_DOMAIN} <= KERNELS


@pytest.mark.parametrize("family", families.names())
def test_graphs_with_wide_residuals_are_read(family: str) -> None:
    for graph in tiny_graphs("float16", family):
        widened = WidenResidualsPass()(ScaleResidualsPass()(graph).model).model
        check(typed(lower(widened, "native")), TABLE["8.6"])


@pytest.mark.parametrize(
    ("operator", "dtype"), [("Gelu", ir.DataType.FLOAT), ("Add", ir.DataType.BFLOAT16), ("And", ir.DataType.INT32)]
)
def test_what_a_parser_lacks_is_found(operator: str, dtype: ir.DataType) -> None:
    x = ir.val("x", dtype=dtype, shape=(1,))
    node = ir.node(operator, [x] * (1 + (operator != "Gelu")))
    node.outputs[0].dtype = dtype
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17})
    with pytest.raises(AssertionError, match=rf"{operator}|{x.name} is"):
        check(ir.Model(graph, ir_version=8), TABLE["8.6"])
