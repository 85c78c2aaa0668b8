"""Our custom operators in onnxruntime sessions of one node, on the CUDA provider or, emulated, on the CPU provider."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper

from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, IVC_VERSION, OPSET
from ivc_export.runtime.onnxruntime.fused_graphs import PROVIDERS, Provider, register
from tests.conftest import SCORE_TOLERANCE
from tests.native.kernels import SEED_DIVISOR, Case, random_case

DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
INDEX_NAMES = ("visual_index", "text_index", "query_index", "keep_count")


def tensors(dtype: int, names: Sequence[str], rank: int = 1) -> list[Any]:
    return [helper.make_tensor_value_info(name, dtype, [None] * rank) for name in names]


def session(
    library: Path, provider: Provider, nodes: Sequence[Any], inputs: list[Any], outputs: list[Any]
) -> onnxruntime.InferenceSession:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(IVC_DOMAIN, IVC_VERSION)]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    register(library, options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDERS[provider]])


@cache
def selection_session(
    library: Path, provider: Provider, dtype: str, softmax_over_all: bool
) -> onnxruntime.InferenceSession:
    """SelectTokens on float32 values that are cast to `dtype` first."""
    names = ("typed", "ivc_priority", *INDEX_NAMES)
    outputs = ("keep_index", "token_score", "seed_index")
    cast = helper.make_node("Cast", ["values"], ["typed"], to=DTYPES[dtype])
    select = helper.make_node("SelectTokens", names, outputs, domain=IVC_DOMAIN, seed_divisor=SEED_DIVISOR)
    select.attribute.append(helper.make_attribute("softmax_all", int(softmax_over_all)))
    floats = [*tensors(TensorProto.FLOAT, ["values"], 4), *tensors(TensorProto.FLOAT, ["ivc_priority"])]
    found = [tensors(TensorProto.FLOAT if o == "token_score" else TensorProto.INT32, [o])[0] for o in outputs]
    return session(library, provider, [cast, select], [*floats, *tensors(TensorProto.INT32, INDEX_NAMES)], found)


def select(library: Path, provider: Provider, case: Case, keep_count: int | None = None) -> list[npt.NDArray[Any]]:
    """keep_index, token_score, seed_index."""
    feeds = {"values": case.values[None], "ivc_priority": case.priority, "visual_index": case.visual}
    feeds |= {"text_index": case.text, "query_index": case.query}
    feeds["keep_count"] = np.array([case.keep_count if keep_count is None else keep_count], np.int32)
    opened = selection_session(library, provider, case.dtype, case.softmax_over_all)
    found: list[npt.NDArray[Any]] = opened.run(None, feeds)
    return found


def check_selection(library: Path, provider: Provider, seed: int, most: int, dtype: str) -> float:
    """A random case against NumPy: scores within tolerance, and exactly the rows that follow from them."""
    case = random_case(seed, most, dtype)
    keep, score, seeds = select(library, provider, case)
    return case.check(keep, score, seeds, SCORE_TOLERANCE)[0]


def check_gather(library: Path, provider: Provider, dtype: str) -> None:
    """Tensors of several shapes and axes by one index, more of them than one launch takes."""
    generator = np.random.default_rng(0)
    shapes = [((1, 2, 50, 8), 2), ((1, 3, 50, 33), 2), ((1, 50, 20), 1)] * 45
    names = [f"x{i}" for i in range(len(shapes))]
    typed, gathered, outputs = ([f"{name}/{suffix}" for name in names] for suffix in ("typed", "y", "float"))
    casts = [helper.make_node("Cast", [x], [y], to=DTYPES[dtype]) for x, y in zip(names, typed, strict=True)]
    back = [helper.make_node("Cast", [x], [y], to=1) for x, y in zip(gathered, outputs, strict=True)]
    axes = [axis for _, axis in shapes]
    node = helper.make_node("CompactGatherN", ["index", *typed], gathered, domain=IVC_DOMAIN, axes=axes)
    ranks = [len(shape) for shape, _ in shapes]
    inputs, found = ([tensors(1, [n], r)[0] for n, r in zip(of, ranks, strict=True)] for of in (names, outputs))
    opened = session(library, provider, [*casts, node, *back], [*tensors(6, ["index"]), *inputs], found)
    arrays = [generator.integers(-99, 99, shape).astype(np.float32) for shape, _ in shapes]  # exact in every dtype
    index = np.sort(generator.permutation(50)[:31]).astype(np.int32)
    for x, axis, y in zip(
        arrays, axes, opened.run(None, {"index": index} | dict(zip(names, arrays, strict=True))), strict=True
    ):
        np.testing.assert_array_equal(y, x.take(index, axis))
