"""Builds an ONNX graph node by node, without tracing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from ivc_export.checkpoint.weights import Weights
from ivc_export.contract.manifest import GraphInfo
from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, IVC_VERSION, OPSET, GraphName
from ivc_export.contract.operators import verify_graph
from ivc_export.dtypes import DTYPES, FLOATS, FloatName
from ivc_export.graph.functions import function

FLOAT = ir.DataType.FLOAT
INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64


class Graph:
    """A graph under construction, in one floating-point dtype.

    Float values are of the graph's dtype, except between `to_float32` and `to_graph_dtype`. Both casts are always
    written, even if the graph is float32. So graphs of all dtypes have the same nodes.
    """

    def __init__(self, info: GraphInfo, dtype: FloatName, weights: Weights) -> None:
        self.info = info
        self.dtype = FLOATS[dtype].onnx
        self.weights = weights
        self.inputs = {t.name: ir.val(t.name, dtype=DTYPES[t.dtype].onnx, shape=t.shape) for t in info.inputs}
        self._outputs: dict[str, ir.Value] = {}
        self._tape = ir.tape.Tape()
        self._weights: dict[str, ir.Value] = {}
        self._constants: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
        self._functions: dict[str, ir.Function] = {}
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes made inside with `name/`."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def op(self, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output, and return this output."""
        return self.op_with_outputs(1, op_type, *inputs, domain=domain, **attributes)[0]

    def op_with_outputs(
        self, outputs: int, op_type: str, *inputs: ir.Value, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs, and return them."""
        name = self._unique("/".join([*self._scope, op_type]))
        values = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs, domain=domain, name=name)
        for i, value in enumerate(values):
            value.name = f"{name}:{i}" if outputs > 1 else name
        return values

    def call(self, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Call the `ivc` function `name`, which has one output, and return this output. Its body is added to the
        model."""
        return self.call_with_outputs(1, name, *inputs, **attributes)[0]

    def call_with_outputs(self, outputs: int, name: str, *inputs: ir.Value, **attributes: Any) -> Sequence[ir.Value]:
        """Call the `ivc` function `name`, and return its outputs."""
        self._functions[name] = function(name)
        return self.op_with_outputs(outputs, name, *inputs, domain=IVC_DOMAIN, **attributes)

    def last_call(self, name: str) -> ir.Node:
        """The newest call of the `ivc` function `name`."""
        return next(node for node in reversed(self._tape.nodes) if (node.domain, node.op_type) == (IVC_DOMAIN, name))

    def _unique(self, stem: str) -> str:
        """`stem`, with a number if it was given before."""
        number = self._counts[stem] = self._counts.get(stem, -1) + 1
        return f"{stem}_{number}" if number else stem

    def output(self, name: str, value: ir.Value) -> None:
        """Make `value` the graph's output `name`."""
        info = next(t for t in self.info.outputs if t.name == name)
        value.name, value.dtype, value.shape = name, DTYPES[info.dtype].onnx, ir.Shape(info.shape)
        self._outputs[name] = value

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """A small constant, stored in the graph. Equal values are stored once."""
        array = np.asarray(value, dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            text = ",".join(f"{x:.9g}" if dtype.is_floating_point() else str(x) for x in array.ravel()[:4].tolist())
            stem = f"{dtype.name.lower()}[{'x'.join(map(str, array.shape))}]({text}{',...' if array.size > 4 else ''})"
            name = self._unique(stem)
            self._constants[key] = ir.val(name, const_value=ir.Tensor(array, dtype=dtype, name=name))
        return self._constants[key]

    def scalar(self, value: float) -> ir.Value:
        """A constant without axes, stored in float32 and cast. So a graph cast to another dtype has its exact value."""
        return self.to_graph_dtype(self.constant(value, FLOAT))

    def ints(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant, for shapes and axes."""
        return self.constant(values, INT64)

    def weight(
        self, name: str, shape: Sequence[int], stored_shape: Sequence[int] | None = None, dtype: str | None = None
    ) -> ir.Value:
        """A tensor of the checkpoint, which stays in its file.

        stored_shape: its shape in the file, if that is another. dtype: a key of STORED; None for the graph's.
        """
        if name not in self._weights:
            self._weights[name] = ir.val(name, const_value=self.weights.external(name, shape, stored_shape, dtype))
        return self._weights[name]

    def linear(self, x: ir.Value, name: str, out: int, features: int, bias: bool) -> ir.Value:
        """`x W^T + b`, by the format of the layer's weights. x: [rows, features]; W: [out, features]; returns [rows,
        out].

        Rows are two-dimensional, so that a layer of floats is one Gemm.
        """
        return self.weights.format_of(name).linear(self, x, name, out, features, bias)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Cast `x` to `dtype`."""
        return self.op("Cast", x, to=int(dtype))

    def to_float32(self, x: ir.Value) -> ir.Value:
        """Begin a stretch in float32."""
        return self.cast(x, FLOAT)

    def to_graph_dtype(self, x: ir.Value) -> ir.Value:
        """End a stretch in float32."""
        return self.cast(x, self.dtype)

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape to constant sizes; -1 is inferred and 0 copies the axis."""
        return self.op("Reshape", x, self.ints(*shape))

    def transpose(self, x: ir.Value, *permutation: int) -> ir.Value:
        """Permute the axes."""
        return self.op("Transpose", x, perm=list(permutation))

    def extent(self, x: ir.Value, axis: int) -> ir.Value:
        """The size of one axis, int64 [1]. It uses Gather, because TensorRT 8.6 ignores Shape's start and end."""
        return self.op("Gather", self.op("Shape", x), self.ints(axis), axis=0)

    def model(self, name: GraphName) -> ir.Model:
        """Finish the graph: a model with the contract's inputs and outputs, checked against the contract."""
        functions = [self._functions[key].clone() for key in sorted(self._functions)]
        graph = ir.Graph(
            list(self.inputs.values()),
            [self._outputs[t.name] for t in self.info.outputs],
            nodes=self._tape.nodes,
            initializers=[*self._weights.values(), *self._constants.values()],
            opset_imports={"": OPSET} | ({IVC_DOMAIN: IVC_VERSION} if functions else {}),
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="ivc-export", functions=functions)
        verify_graph(name, model, self.info)
        return model
