"""Our custom operators in onnxruntime sessions of one node, on the CUDA provider or, emulated, on the CPU provider."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, IVC_VERSION, OPSET
from ivc_export.lowering import LOWERINGS
from ivc_export.lowering.onnxruntime.own_attention import OwnAttention, UseOwnAttentionPass
from ivc_export.lowering.precision.retype_floats import RetypeFloatsPass
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.session_options import PROVIDERS, Provider, register
from tests.conftest import SCORE_TOLERANCE
from tests.native.attention import STORED, EncoderCase, encoder_case
from tests.native.joined import EPSILON, JoinedCase, joined_case, near, split_case
from tests.native.kernels import SEED_DIVISOR, Case, random_case

DTYPES_OF_INTS = {"int32": TensorProto.INT32, "int64": TensorProto.INT64}
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
INDEX_NAMES = ("visual_index", "text_index", "query_index", "keep_count")


class OwnAttentionSession(FusedSession):
    """Attention of all sizes by our kernels, where they take them."""

    def _lower(self, model: ir.Model, lowering: str) -> ir.Model:
        if self.dtype != self.bundle.manifest.dtype:
            model = RetypeFloatsPass(self.dtype)(model).model
        passes = [
            UseOwnAttentionPass(OwnAttention(rows=True, frames=True)) if isinstance(one, UseOwnAttentionPass) else one
            for one in LOWERINGS[lowering].passes()
        ]
        for one in passes:
            model = one(model).model
        return model


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


def run_node(
    library: Path, provider: Provider, node: Any, inputs: Sequence[tuple[str, npt.NDArray[Any]]], dtype: str, rank: int
) -> list[npt.NDArray[Any]]:
    """A node whose inputs "x.." are float32 arrays that are cast to `dtype` first, as its outputs are cast back.

    rank: of the first output; others are caches, or as it.
    """
    casts = [helper.make_node("Cast", [f"given/{n}"], [n], to=DTYPES[dtype]) for n, _ in inputs if n[0] == "x"]
    back = [helper.make_node("Cast", [y], [f"wide/{y}"], to=1) for y in node.output]
    given, feeds = [], {}
    for name, array in inputs:
        kind = TensorProto.FLOAT if array.dtype.kind == "f" or name[0] == "x" else DTYPES_OF_INTS[array.dtype.name]
        held = array.astype(np.float32) if kind == TensorProto.FLOAT else array
        named = f"given/{name}" if name[0] == "x" else name
        given += tensors(kind, [named], array.ndim)
        feeds[named] = held
    ranks = [rank, *[4 if node.op_type == "AttendJoined" else rank] * 2]
    results = [tensors(1, [f"wide/{y}"], r)[0] for y, r in zip(node.output, ranks, strict=False)]
    opened = session(library, provider, [*casts, node, *back], given, results)
    answers: list[npt.NDArray[Any]] = opened.run(None, feeds)
    return answers


def joined_inputs(
    case: JoinedCase, *between: tuple[str, npt.NDArray[Any]]
) -> list[tuple[str, npt.NDArray[Any] | None]]:
    """Names and arrays, in order; those that are left out have no array."""
    tables = [("cos", case.cos), ("sin", case.sin)]
    return [("x", case.rows), *between, *tables, ("x/q", case.query_norm), ("x/k", case.key_norm)]


def joined_node(operator: str, case: JoinedCase, inputs: Sequence[tuple[str, Any]], **more: Any) -> Any:
    """AttendJoined or TurnHeads."""
    sizes: dict[str, Any] = {"heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.size}
    sizes["grouped"] = int(case.grouped)
    names = ["" if array is None else name for name, array in inputs]
    while not names[-1]:
        names.pop()
    return helper.make_node(operator, names, ["a", "b", "c"], domain=IVC_DOMAIN, epsilon=EPSILON, **sizes, **more)


def turn_heads(library: Path, provider: Provider, case: JoinedCase, frames: int) -> list[npt.NDArray[Any]]:
    """q, k, v."""
    inputs = joined_inputs(case, ("frames", np.array([frames], np.int64)))
    node = joined_node("TurnHeads", case, inputs)
    return run_node(library, provider, node, [(n, x) for n, x in inputs if x is not None], case.dtype, 3)


def attending(case: JoinedCase) -> tuple[Any, list[tuple[str, npt.NDArray[Any]]]]:
    """AttendJoined, and its inputs."""
    caches = (("x/keys", case.key_cache[None]), ("x/values", case.value_cache[None]))
    inputs = joined_inputs(case, *caches, ("past", np.array([case.past_length], np.int32)))
    node = joined_node("AttendJoined", case, inputs, scale=case.size**-0.5)
    return node, [(name, array) for name, array in inputs if array is not None]


def attend_joined(library: Path, provider: Provider, case: JoinedCase) -> list[npt.NDArray[Any]]:
    """y and both caches, which are copied: the casts' results are other memory than the outputs."""
    node, inputs = attending(case)
    return run_node(library, provider, node, inputs, case.dtype, 2)


def attend_bound(library: Path, provider: Provider, case: JoinedCase) -> list[npt.NDArray[Any]]:
    """The same in float32, with the caches bound as inputs and outputs."""
    node, inputs = attending(case)
    given = [
        tensors(TensorProto.INT32 if name == "past" else TensorProto.FLOAT, [name], x.ndim)[0] for name, x in inputs
    ]
    results = [*tensors(1, ["a"], 2), *tensors(1, ["b", "c"], 4)]
    opened = session(library, provider, [node], given, results)
    binding = opened.io_binding()
    held = {name: x.copy() for name, x in inputs}  # a value may be their memory
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x, provider, 0) for name, x in held.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("a")
    for name, past in (("b", "x/keys"), ("c", "x/values")):
        binding.bind_ortvalue_output(name, values[past])
    opened.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy(), *(values[name].numpy().copy() for name in ("x/keys", "x/values"))]


def encode(library: Path, provider: Provider, case: EncoderCase) -> npt.NDArray[Any]:
    """y."""
    rows = [x.transpose(0, 2, 1, 3).reshape(*x.shape[::2], -1) for x in (case.q, case.k, case.v)]
    inputs = [(f"x{i}", x) for i, x in enumerate(rows)]
    inputs += [] if case.windows is None else [("windows", case.windows)]
    heads, _, size = case.q.shape[1:]
    attributes = {"scale": size**-0.5, "heads": heads, "head_dim": size, "block_size": case.block_size}
    node = helper.make_node("EncodeAttend", [n for n, _ in inputs], ["a"], domain=IVC_DOMAIN, **attributes)
    return run_node(library, provider, node, inputs, case.dtype, 3 if case.block_size else 2)[0]


def check_attention(library: Path, provider: Provider, seed: int, most: int) -> None:
    """A random case of a decoder layer, of split heads, of frames and of windows, against float64."""
    with np.errstate(all="ignore"):  # NaN and infinities stand where nothing may be read
        layer = joined_case(seed, most)
        y, *caches = attend_joined(library, provider, layer)
        layer.check_answer(*(x.reshape(x.shape[-3 + (x is y) :]).astype(STORED[layer.dtype]) for x in (y, *caches)))
        split = split_case(seed)
        frames = 1 if split.cos is None else len(split.rows) // len(split.cos)
        for found, wanted in zip(turn_heads(library, provider, split, frames), split.split(), strict=True):
            assert found.shape == (frames, len(split.rows) // frames, wanted.shape[1] * split.size)
            near(found, wanted, split.dtype)
        for case in (encoder_case(seed, False, most), encoder_case(seed, True, most)):
            case.error(encode(library, provider, case).reshape(case.answer().shape))
