"""Packed weights: blocks, bytes, and what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from ivc_export.checkpoint.formats.nbits import Packing, dequantise, pack_blocks, pack_values, unpack_values
from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, OPSET
from ivc_export.errors import UserError
from ivc_export.graph.functions import function
from ivc_export.lowering import lower


@pytest.mark.parametrize(
    ("group", "features", "block", "blocks"),
    [
        (32, 64, 32, 2),
        (128, 18944, 128, 148),
        (128, 200, 128, 2),
        (256, 512, 128, 4),
        (96, 192, 32, 6),
        (None, 64, 64, 1),
        (None, 72, 128, 1),
        (None, 8, 16, 1),
        (None, 3584, 128, 28),
    ],
)
def test_groups_are_made_up_of_blocks(group: int | None, features: int, block: int, blocks: int) -> None:
    packing = Packing(4, group)
    assert (packing.block(features), packing.blocks(features)) == (block, blocks)
    groups = np.arange(packing.groups(features))[None]
    of_value = np.arange(features) // (group or features)
    np.testing.assert_array_equal(np.repeat(packing.spread(groups, features)[0], block)[:features], of_value)


@pytest.mark.parametrize("group", [0, 8, 24, 100])
def test_groups_that_no_block_makes_up_are_refused(group: int) -> None:
    with pytest.raises(UserError, match=f"weights in groups of {group} cannot be packed: this version takes multiples"):
        Packing(4, group)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 6, 7])
def test_what_is_packed_comes_back(bits: int, count: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (3, 2, count), np.uint8)
    stored = pack_values(values, bits)
    assert stored.shape == (3, 2, -(-count * bits // 8)) and stored.dtype == np.uint8
    np.testing.assert_array_equal(unpack_values(stored, bits, count), values)
    assert stored[0, 0, 0] == (values[0, 0, 0] + 16 * values[0, 0, 1] if bits == 4 and count > 1 else values[0, 0, 0])


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_product_is_one_of_floats_where_no_runtime_knows_it(bits: int, zero_points: bool) -> None:
    """The weight is exactly (stored - zero point) * scale."""
    random, out, features, packing = np.random.default_rng(0), 5, 72, Packing(bits, 32, zero_points)
    values = random.integers(0, 1 << bits, (out, features), np.uint8)
    scales = random.uniform(0.01, 0.1, (out, 3)).astype(np.float16)
    zeros = random.integers(0, 1 << bits, (out, 3), np.uint8)
    zero = zeros if zero_points else np.full_like(zeros, 1 << (bits - 1))
    wanted = values.astype(np.float32) - np.repeat(zero, 32, axis=1)[:, :features]
    wanted *= np.repeat(scales.astype(np.float32), 32, axis=1)[:, :features]

    packed, points = pack_blocks(values, packing), pack_values(zeros, bits) if zero_points else None
    np.testing.assert_array_equal(dequantise(packed, scales, points, bits, features), wanted)

    arrays: dict[str, npt.NDArray[Any]] = {"packed": packed, "scales": scales}
    arrays |= {} if points is None else {"zero_points": points}
    x = ir.val("x", dtype=ir.DataType.FLOAT16, shape=(3, features))
    weights = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    name = "LinearNBitsZeroPoints" if zero_points else "LinearNBits"
    attributes = {"bits": bits, "block_size": 32, "K": features, "N": out}
    node = ir.node(name, [x, *weights], attributes, domain=IVC_DOMAIN, name="linear")
    node.outputs[0].name = "y"
    opsets = {"": OPSET, IVC_DOMAIN: 1}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weights, opset_imports=opsets, name="g")
    model = lower(ir.Model(graph, ir_version=IR_VERSION, functions=[function(name).clone()]), "native")
    (product,), (weight,) = list(model.graph), model.graph.initializers.values()
    assert (product.op_type, product.attributes["transB"].as_int(), not model.functions) == ("Gemm", 1, True)
    assert weight.const_value is not None and weight.const_value.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(weight.const_value.numpy(), wanted.astype(np.float16))
