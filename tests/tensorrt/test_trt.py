"""What TensorRT 8.6 is told about precisions, on a network that only records it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx_ir as ir

from ivc_export.tensorrt.compile import fix_precisions


class Kind:
    """A stand-in for TensorRT's enumerations: any name is a member."""

    def __getattr__(self, name: str) -> str:
        return name


class Layer:
    """A layer of a network that is being built."""

    def __init__(self, kind: str, inputs: list[Any], outputs: list[Any]) -> None:
        self.type, self.inputs, self.outputs = kind, inputs, outputs
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)
        self.precision: str | None = None
        self.types: dict[int, str] = {}

    def get_input(self, i: int) -> Any:
        return self.inputs[i]

    def get_output(self, i: int) -> Any:
        return self.outputs[i]

    def set_output_type(self, i: int, dtype: str) -> None:
        self.types[i] = dtype


def test_what_is_float32_stays_so_in_a_weakly_typed_network() -> None:
    def tensor(name: str, dtype: str = "FLOAT") -> Any:
        return SimpleNamespace(name=name, dtype=dtype, allowed_formats=None)

    x, wide, helper, product, flag, narrow = (
        tensor(n) for n in ("x", "wide", "(Unnamed)", "product", "flag", "narrow")
    )
    flag.dtype = "BOOL"  # comparisons read floats
    constant, index = tensor("constant"), tensor("index", "INT32")
    layers = {
        "cast": Layer("CAST", [x], [wide]),
        "shuffle": Layer("SHUFFLE", [wide], [helper]),
        "constant": Layer("CONSTANT", [], [constant]),
        "multiply": Layer("ELEMENTWISE", [helper, constant], [product]),
        "softmax": Layer("SOFTMAX", [product], [tensor("(Unnamed 2)")]),
        "greater": Layer("ELEMENTWISE", [product, helper], [flag]),
        "narrow": Layer("ELEMENTWISE", [x, x], [narrow]),
        "gather": Layer("GATHER", [product, index], [tensor("gathered")]),
        "norm": Layer("NORMALIZATION", [wide], [tensor("normed")]),
        "gather index": Layer("GATHER", [index, index], [index]),
    }
    network = SimpleNamespace(
        num_inputs=1, num_outputs=1, num_layers=len(layers), get_input=lambda i: x, get_output=lambda i: narrow
    )
    network.get_layer = lambda i: list(layers.values())[i]
    trt = SimpleNamespace(DataType=Kind(), LayerType=Kind(), BuilderFlag=Kind(), TensorFormat=SimpleNamespace(LINEAR=0))
    flags: list[str] = []
    types = {"x": ir.DataType.FLOAT16, "wide": ir.DataType.FLOAT, "product": ir.DataType.FLOAT}
    fix_precisions(trt, network, SimpleNamespace(set_flag=flags.append), types | {"narrow": ir.DataType.FLOAT16})
    assert {name for name, layer in layers.items() if layer.precision == "FLOAT"} == {
        "multiply",
        "softmax",
        "greater",
        "norm",
    }
    assert layers["multiply"].types == {0: "FLOAT"} and layers["greater"].types == {}
    assert layers["narrow"].precision is None  # constraints on others contradict TensorRT's own
    assert (x.allowed_formats, narrow.allowed_formats) == (1, 1)
    assert set(flags) == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
