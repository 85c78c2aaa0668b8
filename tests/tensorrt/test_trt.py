"""What TensorRT 8.6 is told about precisions, on a network that only records it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from ivc_export.tensorrt.compile import choices, fix_precisions
from ivc_export.tensorrt.loading import Target
from ivc_export.tensorrt.recipe import Options


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
    trt = SimpleNamespace(DataType=Kind(), LayerType=Kind(), TensorFormat=SimpleNamespace(LINEAR=0))
    types = {"x": ir.DataType.FLOAT16, "wide": ir.DataType.FLOAT, "product": ir.DataType.FLOAT}
    fix_precisions(trt, network, types | {"narrow": ir.DataType.FLOAT16})
    assert {name for name, layer in layers.items() if layer.precision == "FLOAT"} == {
        "multiply",
        "softmax",
        "greater",
        "norm",
    }
    assert layers["multiply"].types == {0: "FLOAT"} and layers["greater"].types == {}
    assert layers["narrow"].precision is None  # constraints on others contradict TensorRT's own
    assert (x.allowed_formats, narrow.allowed_formats) == (1, 1)


@pytest.mark.parametrize(
    ("version", "target", "reduced", "told"),
    [
        ("8.6.0", "tensorrt", True, True),
        ("8.6.0", "tensorrt", False, False),
        ("10.3.0", "tensorrt", True, False),
        ("1.7.1", "tensorrt-rtx", True, False),
    ],
)
def test_weakly_typed_networks_alone_are_told_to_obey(version: str, target: Target, reduced: bool, told: bool) -> None:
    trt = SimpleNamespace(__version__=version, ProfilingVerbosity=Kind())
    found = choices(trt, Options(target, "8.6", reduced=reduced))
    assert (found.get("fp16"), found.get("precision_constraints")) == ((True, "obey") if told else (None, None))
