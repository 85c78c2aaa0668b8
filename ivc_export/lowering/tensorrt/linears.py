"""Fuses products with the operators around them, in the form that TensorRT's parsers read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ivc_export.checkpoint.weights import read_values
from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.contract.operators import ATTENTION_OPERATORS
from ivc_export.lowering.fused.linears import ATTENTION, FuseLinearsPass, is_product
from ivc_export.lowering.tensorrt.attention import attended, encoded

ACTIVATIONS = ("none", "swish", "gelu", "gelu_tanh")
"""Activations of a product, by number."""
OPTIONAL = {
    "FusedLinear": {2: "normed", 3: "biased", 4: "summed"},
    "FusedLinearInt4": {3: "zero_points", 4: "normed", 5: "biased", 6: "summed"},
    "FusedLinearWide": {2: "normed", 3: "biased", 4: "summed"},
}
"""The plugin's products. For each, attributes that say whether it has an input, by the input's number."""
BYTES = {"FusedLinearInt4": (1, 3)}
"""Numbers of the inputs that are bytes."""
COMPUTING = ATTENTION_OPERATORS | OPTIONAL.keys()
"""If one of these is in a graph, our kernels compute its products."""
BITS = (4,)
"""Of packed weights that the plugin's kernels take."""


class FuseOwnLinearsPass(ir.passes.InPlacePass):
    """FuseLinearsPass for graphs in which products stand beside our kernels.

    TensorRT compiles a graph of standard operators as a whole. Plugin nodes cut it into pieces, and TensorRT tunes the
    operators between them one by one, which takes minutes.

    1. Needs: a portable graph, or one whose attention is replaced.
    2. Leaves: the result of FuseLinearsPass, if our kernels attend or weights are in 4 bits; else the graph is
       unchanged. Operators are in the form that parsers read. Parsers take no empty inputs, so attributes of OPTIONAL
       say which inputs there are, and `activation` is a number of ACTIVATIONS. Bytes are int32, four at a time, because
       TensorRT 8.6 has no constants of bytes: packed values are [N, blocks, block_size / 8], zero points are flat and
       filled up with zeros.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse, then write the inputs in the parsers' form."""
        changed = is_ours(model.graph) and FuseLinearsPass(BITS)(model).modified
        for node in model.graph:
            if node.domain == IVC_DOMAIN and node.op_type in OPTIONAL and "normed" not in node.attributes:
                say_inputs(model.graph, node)
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Check that no product is left that should be fused."""
        if is_ours(model.graph):
            FuseLinearsPass(BITS).ensures(model)


def is_ours(graph: ir.Graph) -> bool:
    """Whether our kernels compute a graph's products."""
    own = [node for node in graph if node.domain == IVC_DOMAIN]
    taken = {*attended(graph), *encoded(graph)}
    left = {node for node in own if node.op_type in ATTENTION} - taken
    return any(is_product(node, BITS) for node in own) or (
        not left and bool(taken or COMPUTING & {node.op_type for node in own})
    )


def say_inputs(graph: ir.Graph, node: ir.Node) -> None:
    """Leave out inputs that a product lacks, and set the attributes that say which it has."""
    given = [*node.inputs, None, None, None, None]
    for index in BYTES.get(node.op_type, ()):
        given[index] = None if given[index] is None else as_words(graph, given[index])  # type: ignore[arg-type]
    for index, name in OPTIONAL[node.op_type].items():
        node.attributes[name] = ir.AttrInt64(name, int(given[index] is not None))
    number = ACTIVATIONS.index(node.attributes["activation"].as_string())
    node.attributes["activation"] = ir.AttrInt64("activation", number)
    present = [value for value in given if value is not None]
    node.resize_inputs(len(present))
    for index, value in enumerate(present):
        node.replace_input_with(index, value)


def as_words(graph: ir.Graph, stored: ir.Value) -> ir.Value:
    """A constant of bytes as int32, added to the graph once: packed values [N, blocks, words], zero points flat."""
    tensor = stored.const_value
    assert tensor is not None
    name, sizes = f"{stored.name}.words", tensor.shape.numpy()
    shape = (*sizes[:-1], sizes[-1] // 4) if len(sizes) == 3 else (-(-tensor.size // 4),)

    def read() -> ir.TensorProtocol:
        data = read_values(tensor).ravel()
        words = np.pad(data, (0, -len(data) % 4)).view("<i4").reshape(shape)
        return ir.Tensor(words, dtype=ir.DataType.INT32, name=name)

    if name not in graph.initializers:
        lazy = ir.LazyTensor(read, dtype=ir.DataType.INT32, shape=ir.Shape(shape), name=name)
        kind = ir.TensorType(ir.DataType.INT32)
        graph.initializers[name] = ir.val(name, type=kind, shape=ir.Shape(shape), const_value=lazy)
    return graph.initializers[name]
