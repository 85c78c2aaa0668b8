"""Every `ivc` function's body, in onnxruntime, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, OPSET
from ivc_export.contract.operators import BODY_CONTRIB, BODY_OPERATORS
from ivc_export.graph.functions import RESULTS, function
from ivc_export.lowering.inline import InlinePass
from ivc_export.lowering.spell import SpellPass, signature
from ivc_export.lowering.tensorrt.opset import RaiseOpsetPass
from ivc_export.lowering.types import types_of

Array = npt.NDArray[Any]
TOLERANCE = {"float32": 1e-5, "float16": 4e-3}
"""Largest error against float64, relative to the largest magnitude: order of summation, and rounding to 11 bits after
each operator; 8e-7 and 1e-3 measured."""


def model_of(name: str, inputs: Mapping[str, Array], outputs: int, **attributes: Any) -> ir.Model:
    """A graph of one call."""
    values = [ir.val(key, dtype=ir.DataType.from_numpy(a.dtype), shape=a.shape) for key, a in inputs.items()]
    node = ir.node(name, values, attributes, domain=IVC_DOMAIN, num_outputs=outputs, name=name)
    found = RESULTS[name]
    for number, value in enumerate(node.outputs):
        value.name = f"y{number}"
        dtype = found[number] if isinstance(found, tuple) else values[found].dtype
        value.type = ir.TensorType(dtype)  # type: ignore[arg-type]
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET, IVC_DOMAIN: 1}, name=name)
    return ir.Model(graph, ir_version=IR_VERSION, functions=[function(name).clone()])


def run(name: str, inputs: Mapping[str, Array], **attributes: Any) -> Array:
    """What the function gives: as it is, and inlined, which must be the same to the bit; other spellings nearly."""
    found = []
    for inlined in (False, True):
        model = model_of(name, inputs, 1, **attributes)
        if inlined:
            model = InlinePass()(model).model
            known = {("", op) for op in BODY_OPERATORS - {"CastLike"}} | BODY_CONTRIB
            assert not model.functions and all((node.domain, node.op_type) in known for node in model.graph)
            assert {node.domain for node in model.graph} <= model.opset_imports.keys()
        content = ir.to_proto(model).SerializeToString()
        onnx.shape_inference.infer_shapes(onnx.load_from_string(content), check_type=True, strict_mode=True)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found.append(session.run(None, dict(inputs))[0])
    np.testing.assert_array_equal(found[0], found[1])
    for spelling in (spelling for function_name, spelling in bodies() if function_name == name and spelling):
        spelled = InlinePass()(SpellPass({name: spelling})(model_of(name, inputs, 1, **attributes)).model).model
        if spelling == "standard":
            RaiseOpsetPass()(spelled)
        content = ir.to_proto(spelled).SerializeToString()
        onnx.shape_inference.infer_shapes(onnx.load_from_string(content), check_type=True, strict_mode=True)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        check(session.run(None, dict(inputs))[0], found[0].astype(np.float64), str(found[0].dtype))
    return found[0]  # type: ignore[no-any-return]


def check(found: Array, wanted: Array, dtype: str) -> None:
    assert (found.dtype, found.shape) == (np.dtype(dtype), wanted.shape)
    error = np.abs(found.astype(np.float64) - wanted).max() / max(1.0, np.abs(wanted).max())
    assert error < TOLERANCE[dtype]


def normal(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def attended(qkv: Sequence[Array], scale: float, visible: Array | None = None) -> Array:
    """Of one head: q [rows, D], k [keys, D], v [keys, E]."""
    q, k, v = (x.astype(np.float64) for x in qkv)
    score = scale * q @ k.T
    return softmax(score if visible is None else np.where(visible, score, -np.inf)) @ v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (2, 3, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: str) -> None:
    x, weight = normal(shape, dtype, 0, 3.0), normal(shape[-1:], dtype, 1)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-3) * weight.astype(np.float64)
    check(run("RMSNorm", {"x": x, "weight": weight}, epsilon=1e-3), wanted, dtype)


def test_rms_norm_takes_wider_rows_than_its_weight() -> None:
    """As residual sums are, which may leave float16's range."""
    x, weight = normal((4, 32), "float32", 0, 2e5), normal((32,), "float16", 1)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6) * weight.astype(np.float64)
    check(run("RMSNorm", {"x": x, "weight": weight}, epsilon=1e-6), wanted, "float16")


def test_rms_norm_rounds_once() -> None:
    """A weight that is applied to rounded rows would round twice."""
    x, weight = normal((64, 32), "float16", 0), normal((32,), "float16", 1)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6) * weight.astype(np.float64)
    found = run("RMSNorm", {"x": x, "weight": weight}, epsilon=1e-6)
    unit = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float64)
    assert (np.abs(found - wanted) <= 0.501 * unit).all()


@pytest.mark.parametrize(("dtype", "angles"), [("float32", "float32"), ("float16", "float16"), ("float16", "float32")])
def test_rotate(dtype: str, angles: str) -> None:
    x, turns = normal((2, 3, 5, 8), dtype, 0), normal((5, 4), "float64", 1, 10.0)
    cos, sin = np.cos(turns).astype(angles), np.sin(turns).astype(angles)
    pairs = x[..., :4].astype(np.float64) + 1j * x[..., 4:].astype(np.float64)
    turned = pairs * (cos.astype(np.float64) + 1j * sin.astype(np.float64))
    check(run("Rotate", {"x": x, "cos": cos, "sin": sin}), np.concatenate([turned.real, turned.imag], -1), dtype)


@pytest.mark.parametrize("frames", [1, 3])
def test_split_heads(frames: int) -> None:
    x = normal((frames * 4, 2 * 6), "float32", 0)
    found = run("SplitHeads", {"x": x, "frames": np.array([frames], np.int64)}, heads=2, head_dim=6)
    np.testing.assert_array_equal(found, x.reshape(frames, 4, 2, 6).transpose(0, 2, 1, 3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("index", [[0], [3], [1, 2, 4], [4, 0]])
def test_spread_rows(index: list[int], dtype: str) -> None:
    rows = normal((1, len(index), 6), dtype, 0)
    wanted = np.zeros((5, 6), dtype)
    wanted[index] = rows[0]
    inputs = {"rows": rows, "index": np.array(index, np.int32), "position_ids": np.zeros((3, 1, 5), np.int32)}
    np.testing.assert_array_equal(run("SpreadRows", inputs), wanted)


@pytest.mark.parametrize(("rows", "past", "length"), [(1, 0, 0), (4, 0, 0), (4, 6, 6), (3, 8, 5), (1, 8, 0), (1, 8, 8)])
def test_causal_mask(rows: int, past: int, length: int) -> None:
    """Rows see the cache's valid rows, and themselves and those before; positions do not count."""
    inputs = {
        "position_ids": np.full((3, 1, rows), 7, np.int32),
        "past_key": np.zeros((1, 2, past, 4), np.float32),
        "past_length": np.array([length], np.int32),
    }
    found = run("CausalMask", inputs)
    assert found.shape == (rows, past + rows)
    for row in range(rows):
        for column in range(past + rows):
            assert found[row, column] == (column < length if column < past else column - past <= row)


ATTENTION = [  # heads, kv_heads, rows, past, size of values
    (4, 4, 5, 0, 8),
    (4, 2, 5, 0, 8),
    (6, 2, 1, 7, 8),
    (4, 1, 3, 6, 8),
    (4, 2, 5, 4, 12),
    (2, 2, 1, 0, 4),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "rows", "past", "size"), ATTENTION)
def test_attention(heads: int, kv_heads: int, rows: int, past: int, size: int, dtype: str) -> None:
    q, k = normal((1, heads, rows, 8), dtype, 0, 2.0), normal((1, kv_heads, rows, 8), dtype, 1, 2.0)
    past_key, v = normal((1, kv_heads, past, 8), dtype, 2, 2.0), normal((1, kv_heads, rows, size), dtype, 3)
    past_value = normal((1, kv_heads, past, size), dtype, 4)
    mask = np.random.default_rng(5).random((rows, past + rows)) < 0.6
    mask[:, -rows:] |= np.eye(rows, dtype=bool)
    inputs = {"q": q, "k": k, "v": v, "past_key": past_key, "past_value": past_value, "mask": mask}
    keys, values = np.concatenate([past_key, k], 2)[0], np.concatenate([past_value, v], 2)[0]
    group = heads // kv_heads
    of_heads = [attended((q[0, h], keys[h // group], values[h // group]), 0.3, mask) for h in range(heads)]
    found = run("Attention", inputs, scale=0.3, heads=heads, kv_heads=kv_heads, head_dim=8)
    check(found, np.stack(of_heads, 1).reshape(rows, heads * size), dtype)


def test_attention_over_a_buffer_is_that_over_its_valid_rows() -> None:
    """What lies behind them has no weight; sums may run in another order."""
    sizes = {"scale": 0.25, "heads": 4, "kv_heads": 2, "head_dim": 16}
    q, k, v = (normal((1, heads, 2, 16), "float32", seed) for seed, heads in enumerate((4, 2, 2)))
    past = [normal((1, 2, 5, 16), "float32", seed) for seed in (7, 8)]
    visible = np.concatenate([np.ones((2, 5), bool), np.tril(np.ones((2, 2), bool))], 1)
    names = ("q", "k", "v", "past_key", "past_value", "mask")
    exact = run("Attention", dict(zip(names, (q, k, v, *past, visible), strict=True)), **sizes)
    buffers = [np.concatenate([x, normal((1, 2, 3, 16), "float32", 9, 1e3)], 2) for x in past]
    visible = np.insert(visible, 5, np.zeros((3, 2), bool), axis=1)
    found = run("Attention", dict(zip(names, (q, k, v, *buffers, visible), strict=True)), **sizes)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("frames", "rows"), [(1, 1), (1, 9), (3, 4)])
def test_encoder_attention(frames: int, rows: int, dtype: str) -> None:
    q, k, v = (normal((frames, 2, rows, 8), dtype, seed, 2.0) for seed in range(3))
    wanted = [[attended([x[f, h] for x in (q, k, v)], 0.4) for h in range(2)] for f in range(frames)]
    found = run("EncoderAttention", {"q": q, "k": k, "v": v}, scale=0.4, heads=2, head_dim=8)
    check(found, np.array(wanted).transpose(0, 2, 1, 3).reshape(frames * rows, 16), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("windows", [[4, 4, 4], [3, 4, 2, 3], [1], [4]])
def test_window_attention(windows: list[int], dtype: str) -> None:
    """Windows of up to a block's places, one behind the other, each place attending to its window's alone."""
    block, frames = 4, 2
    numbers = np.repeat(np.arange(len(windows)), windows)
    blocks = -(-len(numbers) // block)
    window_of_place = np.full((blocks + 2) * block, -1, np.int32)
    window_of_place[block : block + len(numbers)] = numbers
    q, k, v = (normal((frames, 2, len(window_of_place), 8), dtype, seed, 2.0) for seed in range(3))
    inputs = {"q": q, "k": k, "v": v, "window_of_place": window_of_place}
    found = run("WindowAttention", inputs, scale=0.4, heads=2, head_dim=8, block_size=block)
    assert found.shape == (frames, blocks * block, 16)
    inner = [x[:, :, block : block + len(numbers)] for x in (q, k, v)]
    same = numbers[:, None] == numbers
    wanted = [[attended([x[f, h] for x in inner], 0.4, same) for h in range(2)] for f in range(frames)]
    check(found[:, : len(numbers)], np.array(wanted).transpose(0, 2, 1, 3).reshape(frames, len(numbers), 16), dtype)


def test_types_of_functions_are_those_that_onnx_infers() -> None:
    inputs = {"q": normal((1, 2, 3, 8), "float16", 0), "k": normal((1, 2, 3, 8), "float16", 1)}
    inputs["v"] = inputs["k"]
    model = model_of("EncoderAttention", inputs, 1, scale=0.4, heads=2, head_dim=8)
    assert types_of(model.graph)[model.graph.outputs[0]] == ir.DataType.FLOAT16
    assert set(RESULTS) == {name for name, _ in bodies()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(
    ("bits", "block", "features"), [(4, 16, 32), (4, 32, 72), (4, 128, 128), (8, 64, 200), (8, 16, 24)]
)
def test_linear_n_bits(bits: int, block: int, features: int, zero_points: bool, dtype: str) -> None:
    """Also where the last block is short, where the number of blocks is odd, and where q - z leaves 4 signed bits."""
    random, out, blocks = np.random.default_rng(0), 7, -(-features // block)
    stored = random.integers(0, 1 << bits, (out, blocks, block), np.uint8)
    zeros = random.integers(0, 1 << bits, (out, blocks), np.uint8)
    stored[0, 0, :2], stored[1, 0, :2], zeros[:2, 0] = 0, (1 << bits) - 1, [(1 << bits) - 1, 0]
    scales = random.uniform(0.01, 0.1, (out, blocks)).astype(dtype)
    zero = zeros if zero_points else np.full_like(zeros, 1 << (bits - 1))
    weight = (stored.astype(np.float64) - zero[..., None].astype(np.float64)) * scales[..., None].astype(np.float64)
    x = normal((3, features), dtype, 1)
    wanted = x.astype(np.float64) @ weight.reshape(out, -1)[:, :features].T

    def packed(values: Array) -> Array:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
        return values if bits == 8 else values[..., ::2] + 16 * values[..., 1::2]

    inputs = {"x": x, "packed": packed(stored), "scales": scales}
    name = "LinearNBits"
    if zero_points:
        name, inputs = "LinearNBitsZeroPoints", inputs | {"zero_points": packed(zeros)[:, : -(-blocks * bits // 8)]}
    check(run(name, inputs, bits=bits, block_size=block, K=features, N=out), wanted, dtype)


def bodies() -> list[tuple[str, str | None]]:
    """Names of functions and of their bodies' spellings, by the files."""
    names = [path.stem.split(".") for path in sorted((Path(__file__).parents[2] / "graphs" / "ops").glob("*.onnxtxt"))]
    return [(parts[0], parts[1] if len(parts) > 1 else None) for parts in names]


@pytest.mark.parametrize(("name", "spelling"), [body for body in bodies() if body[1]])
def test_every_spelling_is_called_as_the_function_is(name: str, spelling: str) -> None:
    assert signature(function(name, spelling)) == signature(function(name))
