"""The plugin's nodes as what they mean, so that onnxruntime runs graphs of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ivc_export.contract.names import IVC_DOMAIN
from ivc_export.graph.functions import function as function_body
from ivc_export.lowering.edit import Editor
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
    """Rows by head, if they are not that yet: products of weights, and their parts, are whole rows."""
    producer = x.producer()
    assert producer is not None
    if producer.op_type not in ("Add", "Gemm", "MatMul", "Split"):
        return x
    (shape,) = edit.op(node, "Shape", like)
    frames, heads, size = (edit.op(node, "Gather", shape, edit.ints(axis), axis=0)[0] for axis in (0, 1, 3))
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


def matmul_int4(edit: Editor, node: ir.Node) -> None:
    x, words, scales, *points = node.inputs
    assert words is not None and words.const_value is not None
    block, packed = node.attributes["block_size"].as_int(), words.const_value.numpy()
    (out, blocks, _), features = packed.shape, x.shape[1] if x is not None and x.shape is not None else None
    arrays = [packed.view(np.uint8)]
    for value in points:
        assert value is not None and value.const_value is not None
        arrays.append(value.const_value.numpy().view(np.uint8)[: out * -(-blocks // 2)].reshape(out, -1))
    given = [
        ir.val(f"{node.name}.{i}", const_value=ir.tensor(a, name=f"{node.name}.{i}")) for i, a in enumerate(arrays)
    ]
    for value in given:
        edit.graph.initializers[str(value.name)] = value
    sizes = {"bits": 4, "block_size": block, "N": out, "K": features or blocks * block}
    (y,) = edit.op(node, "MatMulNBits", x, given[0], scales, *given[1:], domain="com.microsoft", **sizes)
    edit.replace(node.outputs[0], y)
    edit.graph.remove(node, safe=True)


SPELLED = {
    "MatMulInt4": matmul_int4,
    "SelectTokens": select_tokens,
    "CompactGatherN": compact_gather,
    "CompactIntoCaches": compact_into_caches,
    "AttendInPlace": attend_in_place,
    "EncodeAttend": encode_attend,
}
