"""The plugin's nodes as what they mean, so that onnxruntime runs graphs of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.graph.functions import function as function_body
from ivc_export.lowering.edit import Editor, numbers
from ivc_export.lowering.tensorrt.linears import ACTIVATIONS, OPTIONAL
from ivc_export.lowering.tensorrt.plugin import KERNELS

PLUGIN = ("plugin_namespace", "plugin_version")


def spell_out(model: ir.Model) -> ir.Model:
    """Replace the plugin's nodes by standard operators and by bodies of portable functions, in place."""
    edit = Editor(model.graph)
    for node in list(model.graph):
        if node.domain == IVC_DOMAIN and node.op_type in KERNELS:
            for name in PLUGIN:
                node.attributes.pop(name, None)
            SPELLED[node.op_type](edit, node)
    for node in model.graph:
        if node.domain == IVC_DOMAIN:
            function = function_body(node.op_type).clone()
            model.functions[function.identifier()] = function
            model.graph.opset_imports[IVC_DOMAIN] = 1
    return model


def select_tokens(edit: Editor, node: ir.Node) -> None:
    (shape,) = edit.op(node, "Shape", node.inputs[5])
    (count,) = edit.op(node, "Cast", shape, to=int(ir.DataType.INT32))
    node.replace_input_with(5, count)


def compact_gather(edit: Editor, node: ir.Node) -> None:
    for source, old, axis in zip(node.inputs[1:], node.outputs, node.attributes["axes"].as_ints(), strict=True):
        edit.replace(old, edit.op(node, "Gather", source, node.inputs[0], axis=axis)[0])
    edit.graph.remove(node, safe=True)


def compact_into_caches(edit: Editor, node: ir.Node) -> None:
    keep, length, *tensors = node.inputs
    count = node.attributes["caches"].as_int()
    for x, past, old in zip(tensors[:count], tensors[count:], node.outputs, strict=True):
        (kept,) = edit.op(node, "Gather", x, keep, axis=2)
        edit.replace(old, written(edit, node, past, kept, length))
    edit.graph.remove(node, safe=True)


def attend_in_place(edit: Editor, node: ir.Node) -> None:
    q, k, v, past_key, past_value, length = node.inputs
    assert q is not None and k is not None and v is not None and past_key is not None and past_key.shape is not None
    v = heads_of(edit, node, v, k)
    (visible,) = edit.op(node, "CausalMask", q, past_key, length, domain=IVC_DOMAIN)
    kv_heads, size = (past_key.shape[axis] for axis in (1, 3))
    scale = node.attributes["scale"].as_float()
    sizes: dict[str, Any] = {"scale": scale, "heads": 0, "kv_heads": kv_heads, "head_dim": size}
    (y,) = edit.op(node, "Attention", q, k, v, past_key, past_value, visible, domain=IVC_DOMAIN, **sizes)
    edit.replace(node.outputs[0], y)
    for fresh, past, old in zip((k, v), (past_key, past_value), node.outputs[1:], strict=False):
        edit.replace(old, written(edit, node, past, fresh, length))
    edit.graph.remove(node, safe=True)


def turn_heads(edit: Editor, node: ir.Node) -> None:
    for old, new in zip(node.outputs, turned(edit, node)[: 2 + node.attributes["values"].as_int()], strict=True):
        edit.replace(old, new)
    edit.graph.remove(node, safe=True)


def turned(edit: Editor, node: ir.Node) -> list[ir.Value]:
    """Query, key and value by head."""
    rows, *tables = node.inputs[: 5 if node.attributes["normed"].as_int() else 3]
    heads, kv_heads, size = (node.attributes[name].as_int() for name in ("heads", "kv_heads", "head_dim"))
    counts = (heads, kv_heads, kv_heads)
    if node.attributes["grouped"].as_int():
        (rows,) = edit.op(node, "Reshape", rows, edit.ints(-1, kv_heads, heads // kv_heads + 2, size))
        parts = edit.op(node, "Split", rows, edit.ints(heads // kv_heads, 1, 1), outputs=3, axis=2)
    else:
        parts = edit.op(node, "Split", rows, edit.ints(*(size * count for count in counts)), outputs=3, axis=-1)
    found = []
    (shape,) = edit.op(node, "Shape", tables[0])
    (length,) = edit.op(node, "Gather", shape, edit.ints(0), axis=0)
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        (shape,) = edit.op(node, "Concat", edit.ints(-1), length, edit.ints(count, size), axis=0)
        (x,) = edit.op(node, "Reshape", part, shape)
        (x,) = edit.op(node, "Transpose", x, perm=[0, 2, 1, 3])
        if number < 2 and len(tables) == 4:
            epsilon = node.attributes["epsilon"].as_float()
            (x,) = edit.op(node, "RMSNorm", x, tables[2 + number], domain=IVC_DOMAIN, epsilon=epsilon)
        if number < 2:
            (x,) = edit.op(node, "Rotate", x, *tables[:2], domain=IVC_DOMAIN)
        edit.types[x] = edit.types[node.inputs[0]]  # type: ignore[index]
        found.append(x)
    return found


def attend_joined(edit: Editor, node: ir.Node) -> None:
    past_key, past_value, length = node.inputs[-3:]
    heads = turned(edit, node)
    (visible,) = edit.op(node, "CausalMask", heads[0], past_key, length, domain=IVC_DOMAIN)
    sizes: dict[str, Any] = {name: node.attributes[name].as_int() for name in ("heads", "kv_heads", "head_dim")}
    sizes["scale"] = node.attributes["scale"].as_float()
    (y,) = edit.op(node, "Attention", *heads, past_key, past_value, visible, domain=IVC_DOMAIN, **sizes)
    edit.replace(node.outputs[0], y)
    for fresh, past, old in zip(heads[1:], (past_key, past_value), node.outputs[1:], strict=True):
        edit.replace(old, written(edit, node, past, fresh, length))
    edit.graph.remove(node, safe=True)


def encode_attend(edit: Editor, node: ir.Node) -> None:
    q, k, v, *windows = node.inputs
    assert q is not None and k is not None and v is not None
    block = node.attributes["block_size"].as_int()
    (scaled,) = edit.op(node, "Mul", q, edit.scalar(node.attributes["scale"].as_float(), edit.types[q]))
    (turned,) = edit.op(node, "Transpose", k, perm=[0, 1, 3, 2])
    (score,) = edit.op(node, "MatMul", scaled, turned)
    (score,) = edit.op(node, "Cast", score, to=int(ir.DataType.FLOAT))
    if windows:
        (row,) = edit.op(node, "Unsqueeze", windows[0], edit.ints(0))
        (column,) = edit.op(node, "Unsqueeze", windows[0], edit.ints(1))
        (same,) = edit.op(node, "Equal", row, column)
        (bias,) = edit.op(node, "Where", same, *(edit.scalar(x, ir.DataType.FLOAT) for x in (0.0, -3e4)))
        (score,) = edit.op(node, "Add", score, bias)
    (weights,) = edit.op(node, "Softmax", score, axis=-1)
    (weights,) = edit.op(node, "Cast", weights, to=int(edit.types[q]))
    (y,) = edit.op(node, "MatMul", weights, heads_of(edit, node, v, q))
    (y,) = edit.op(node, "Transpose", y, perm=[0, 2, 1, 3])
    if windows:
        (y,) = edit.op(node, "Slice", y, edit.ints(block), edit.ints(-block), edit.ints(1))
        (y,) = edit.op(node, "Reshape", y, edit.ints(0, 0, -1))
    else:
        (y,) = edit.op(node, "Flatten", y, axis=2)
    edit.replace(node.outputs[0], y)
    edit.graph.remove(node, safe=True)


def heads_of(edit: Editor, node: ir.Node, x: ir.Value, like: ir.Value) -> ir.Value:
    """Rows by head, if they are not that yet: products of weights, and their parts, are whole rows. The last columns
    count."""
    producer = x.producer()
    assert producer is not None
    flat = producer.op_type == "Reshape" and len(numbers(producer.inputs[1])) == 2
    if not flat and producer.op_type not in ("Add", "FusedLinear", "FusedLinearInt4", "Gemm", "MatMul", "Split"):
        return x
    (shape,) = edit.op(node, "Shape", like)
    frames, heads, size = (edit.op(node, "Gather", shape, edit.ints(axis), axis=0)[0] for axis in (0, 1, 3))
    (width,) = edit.op(node, "Mul", heads, size)
    (first,) = edit.op(node, "Neg", width)
    (x,) = edit.op(node, "Slice", x, first, edit.ints(2**31 - 1), edit.ints(1))
    (shape,) = edit.op(node, "Concat", frames, edit.ints(-1), heads, size, axis=0)
    (x,) = edit.op(node, "Reshape", x, shape)
    return edit.op(node, "Transpose", x, perm=[0, 2, 1, 3])[0]


def written(edit: Editor, node: ir.Node, past: ir.Value | None, rows: ir.Value, length: ir.Value | None) -> ir.Value:
    """A cache with `rows` from row `length` on."""
    count = edit.extent(node, rows, 2)
    (places,) = edit.op(node, "Add", edit.counting(node, count), length)
    (places,) = edit.op(node, "Reshape", places, edit.ints(1, 1, -1, 1))
    (shape,) = edit.op(node, "Shape", rows)
    (places,) = edit.op(node, "Expand", places, shape)
    return edit.op(node, "ScatterElements", past, places, rows, axis=2)[0]


def fused_linear(edit: Editor, node: ir.Node) -> None:
    x, *rest = (value for value in node.inputs if value is not None)
    names = [name for name in OPTIONAL[node.op_type].values() if node.attributes[name].as_int()]
    more = names if "zero_points" not in names else names[1:]
    given = dict.fromkeys(("normed", "biased", "summed")) | dict(zip(more, rest[len(rest) - len(more) :], strict=True))
    weights = rest[: len(rest) - len(more)]
    real = {name: node.attributes[name].as_float() for name in ("slope", "scale", "epsilon")}
    dtype, kind = (
        edit.types[weights[1 if node.op_type == "FusedLinearInt4" else -1]],
        ACTIVATIONS[node.attributes["activation"].as_int()],
    )

    def op(name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return edit.op(node, name, *inputs, **attributes)[0]

    norm = given["normed"]
    if norm is not None and node.op_type != "FusedLinearInt4" and extent(norm, 0) == 2 * extent(weights[0], 1):
        halves = edit.op(node, "Split", norm, outputs=2, axis=0)
        x = op("LayerNormalization", x, *halves, axis=-1, epsilon=real["epsilon"])
    elif norm is not None:
        (x,) = edit.op(node, "RMSNorm", x, norm, domain=IVC_DOMAIN, epsilon=real["epsilon"])
    y = op("Mul", product(edit, node, x, weights), edit.scalar(real["scale"], dtype))
    if given["biased"] is not None:
        y = op("Add", y, given["biased"])
    parts = edit.op(node, "Split", y, outputs=2, axis=-1) if node.attributes["gated"].as_int() else [y]
    if kind == "swish":
        y = op("Mul", parts[0], op("Sigmoid", op("Mul", parts[0], edit.scalar(real["slope"], dtype))))
    elif kind == "gelu":
        half, root, one = (edit.scalar(number, dtype) for number in (0.5, 2**-0.5, 1.0))
        y = op("Mul", op("Mul", parts[0], half), op("Add", op("Erf", op("Mul", parts[0], root)), one))
    elif kind == "gelu_tanh":
        half, cubic, root, one = (edit.scalar(number, dtype) for number in (0.5, 0.044715, 0.79788456, 1.0))
        cube = op("Mul", op("Mul", parts[0], parts[0]), op("Mul", parts[0], cubic))
        inner = op("Tanh", op("Mul", op("Add", parts[0], cube), root))
        y = op("Mul", op("Mul", parts[0], half), op("Add", inner, one))
    else:
        y = parts[0]
    if len(parts) > 1:
        y = op("Mul", y, parts[1])
    if given["summed"] is not None:
        y = op("Add", y, given["summed"])
    edit.types[y] = dtype
    if node.op_type == "FusedLinearWide":
        y = op("Cast", y, to=int(ir.DataType.FLOAT))
    edit.replace(node.outputs[0], y)
    edit.graph.remove(node, safe=True)


def extent(weight: ir.Value, axis: int) -> int:
    assert weight.shape is not None
    size = weight.shape[axis]
    assert isinstance(size, int)
    return size


def product(edit: Editor, node: ir.Node, x: ir.Value, weights: list[ir.Value]) -> ir.Value:
    """Of floats, or of int32 that are packed bytes."""
    if node.op_type != "FusedLinearInt4":
        return edit.op(node, "Gemm", x, weights[0], transB=1)[0]
    words, scales, *points = weights
    assert words.const_value is not None
    block, packed = node.attributes["block_size"].as_int(), words.const_value.numpy()
    (out, blocks, _), features = packed.shape, x.shape[1] if x.shape is not None else None
    arrays = [packed.view(np.uint8)]
    for value in points:
        assert value.const_value is not None
        arrays.append(value.const_value.numpy().view(np.uint8)[: out * -(-blocks // 2)].reshape(out, -1))
    given = [
        ir.val(f"{node.name}.{i}", const_value=ir.tensor(a, name=f"{node.name}.{i}")) for i, a in enumerate(arrays)
    ]
    for value in given:
        edit.graph.initializers[str(value.name)] = value
    sizes = {"bits": 4, "block_size": block, "N": out, "K": features or blocks * block}
    return edit.op(node, "MatMulNBits", x, given[0], scales, *given[1:], domain="com.microsoft", **sizes)[0]


SPELLED = {
    "FusedLinear": fused_linear,
    "FusedLinearInt4": fused_linear,
    "FusedLinearWide": fused_linear,
    "SelectTokens": select_tokens,
    "CompactGatherN": compact_gather,
    "CompactIntoCaches": compact_into_caches,
    "AttendInPlace": attend_in_place,
    "AttendJoined": attend_joined,
    "TurnHeads": turn_heads,
    "EncodeAttend": encode_attend,
}
