"""Names of our libraries' operators, read from their sources: a kernel with another signature has another name.

onnxruntime prefers a registered operator to a function's body of that name, so that a portable graph, which calls
functions, would not open, or compute something else, where our library is loaded.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from ivc_export.graph.functions import RESULTS, function
from ivc_export.lowering.onnxruntime.custom_operators import LIBRARY
from ivc_export.lowering.tensorrt.plugin import KERNELS
from tests.native.kernels import PLUGIN

ONNXRUNTIME = "".join(path.read_text(encoding="utf-8") for path in sorted((PLUGIN / "onnxruntime").iterdir()))
TENSORRT = "".join(
    (PLUGIN / "tensorrt" / f"{name}.h").read_text(encoding="utf-8")
    for name in ("operators", "attention", "joined", "products")
)
SHARED = {"SelectTokens"}
"""Functions that have a kernel of the same signature."""


def descriptions() -> dict[str, str]:
    """What the library for onnxruntime says of each operator, by its name. A template describes several."""
    found = re.findall(r"struct \w+Operator : .*?\n\};", ONNXRUNTIME, re.DOTALL)
    told = [(re.findall(r"GetName\(\) const \{ return (.*?); \}", text)[0], text) for text in found]
    return {name: text for names, text in told for name in re.findall(r'"(\w+)"', names)}


def plugins() -> set[str]:
    """Names of the TensorRT plugin's operators."""
    return {name for names in re.findall(r"kName = (.*?);", TENSORRT) for name in re.findall(r'"(\w+)"', names)}


def returned(text: str, method: str) -> int:
    """The number that a method returns."""
    return int(re.findall(rf"{method}\(\) const \{{ return (\d+); \}}", text)[0])


def test_both_libraries_have_the_operators_of_the_contract() -> None:
    assert descriptions().keys() == LIBRARY
    assert plugins() == KERNELS


def test_no_other_function_has_an_operators_name() -> None:
    registered = {*descriptions(), *plugins()}
    assert registered & set(RESULTS) == SHARED


def test_kernels_of_a_functions_name_have_its_signature() -> None:
    for name in SHARED:
        text, body, types = descriptions()[name], function(name), RESULTS[name]
        assert returned(text, "GetInputTypeCount") == len(body.inputs)
        assert returned(text, "GetOutputTypeCount") == len(body.outputs)
        assert isinstance(types, tuple)
        (floats,) = re.findall(r"GetOutputType\(size_t i\) const \{ return i == (\d+) \? kFloat32 : kInt32; \}", text)
        assert [t == ir.DataType.FLOAT for t in types] == [i == int(floats) for i in range(len(types))]
        (kernel,) = re.findall(rf"\n(?:class|struct) {name} \{{.*?\n\}};", ONNXRUNTIME, re.DOTALL)
        read = set(re.findall(r'GetAttribute<[^>]*>\("(\w+)"\)', kernel))
        assert read == set(body.attributes)
