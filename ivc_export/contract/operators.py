"""The operators that a graph may use, and the check that a graph keeps the contract."""

from __future__ import annotations

import onnx_ir as ir

from ivc_export.contract.manifest import GraphInfo
from ivc_export.contract.names import IR_VERSION, OPSET, AnyGraphName
from ivc_export.dtypes import DTYPES

OPERATORS = frozenset(
    (
        *("Add", "And", "Cast", "Concat", "Constant", "Cos", "Div", "Equal", "Erf", "Expand", "Gather", "Gemm"),
        *(
            "Greater",
            "GreaterOrEqual",
            "LayerNormalization",
            "Less",
            "MatMul",
            "Max",
            "Min",
            "Mul",
            "Not",
            "Or",
            "Range",
        ),
        *("ReduceMean", "ReduceSum", "Reshape", "ScatterElements", "Shape", "Sigmoid", "Sin", "Slice", "Softmax"),
        *("Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
    )
)
"""Operators of the default domain that a portable or native graph may use: opset 17, read by TensorRT 8.6 and later."""

BODY_OPERATORS = OPERATORS | {"CastLike"}
"""Operators of the default domain that the bodies of the `ivc` functions may use; inlining leaves no CastLike."""

BODY_CONTRIB = frozenset((("com.microsoft", "MatMulNBits"),))
"""onnxruntime's own operators that bodies may use, by domain and name. Other lowerings replace the calls."""

PLUGIN_OPERATORS = frozenset(("SelectTokens", "CompactGatherN"))
"""Operators of domain `ivc` without a body. `plugin` leaves them to our TensorRT plugin, and `ort-cuda-ops` to our
library of custom operators for onnxruntime."""

CACHES = frozenset(("CacheIndex",))
"""Such operators of our library for onnxruntime for whole caches."""

ATTENDING = frozenset(("AttendInPlace", "EncodeAttend"))
"""Such operators for attention. Query, key and value are their first inputs. The library for onnxruntime has only
EncodeAttend, in another form than the plugin's."""

HOST_STEPS = frozenset(("GiveAnswer", "TakeStep"))
"""Such operators of our library for onnxruntime between the host and a decode step."""

JOINED = frozenset(("AttendJoined", "TurnHeads"))
"""Such operators of our library for onnxruntime over rows with query, key and value side by side."""

ATTENTION_OPERATORS = ATTENDING | {"AttendJoined", "CompactIntoCaches", "TurnHeads"}
"""The plugin's operators for attention, for the steps before it, and for caches that it writes in place."""

LINEAR_OPERATORS = frozenset(("FusedLinear", "FusedLinearInt4", "FusedLinearInt8", "FusedLinearWide"))
"""Such operators for products with the operators around them. The plugin has none for weights in 8 bits."""

ATTENDED_SIZES = (64, 128)
"""Sizes of a decoder layer's keys and values that AttendInPlace takes."""

ENCODED_SIZES = (64, 72, 80, 128)
"""Sizes of an encoder's heads that EncodeAttend takes."""


def verify_graph(
    name: AnyGraphName,
    model: ir.Model,
    info: GraphInfo,
    lowered: frozenset[tuple[str, str]] = frozenset(),
    opset: int = OPSET,
) -> None:
    """Check a graph against the contract: inputs and outputs, operators, functions, versions.

    lowered: operators that it may have in addition to the contract's, by domain and name.

    Raises:
        AssertionError: the graph breaks the contract. This is a bug of the builder, not of the user.
    """
    for kind, values, tensors in (
        ("input", model.graph.inputs, info.inputs),
        ("output", model.graph.outputs, info.outputs),
    ):
        found = [
            (v.name, v.dtype, [d.value if isinstance(d, ir.SymbolicDim) else d for d in v.shape or ()]) for v in values
        ]
        wanted = [(t.name, DTYPES[t.dtype].onnx, list(t.shape)) for t in tensors]
        if found != wanted:
            raise AssertionError(f"{name}: the {kind}s are {found}, the contract says {wanted}")
    functions = {identifier[:2] for identifier in model.functions} | lowered
    own = [(node, OPERATORS, functions) for node in model.graph.all_nodes()]
    bodies = [
        (node, BODY_OPERATORS, functions | BODY_CONTRIB) for f in model.functions.values() for node in f.all_nodes()
    ]
    for node, operators, more in own + bodies:
        if (node.domain or node.op_type not in operators) and (node.domain, node.op_type) not in more:
            raise AssertionError(
                f"{name}: {node.domain or 'ai.onnx'}::{node.op_type} is not an operator of the contract"
            )
    if model.opset_imports.get("") != opset or model.ir_version != IR_VERSION:
        raise AssertionError(f"{name}: opset {model.opset_imports.get('')} and IR version {model.ir_version}")
