"""Our custom operators in onnxruntime sessions of one node, on the CUDA provider or, emulated, on the CPU provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, IVC_VERSION, OPSET
from ivc_export.lowering.join_decode import join_decode
from ivc_export.runtime.onnxruntime.cuda import FusedSession
from ivc_export.runtime.onnxruntime.fused_graphs import PROVIDERS, Provider, register
from tests.conftest import SCORE_TOLERANCE
from tests.native.attention import DecoderCase, EncoderCase, decoder_case, encoder_case
from tests.native.kernels import SEED_DIVISOR, Case, random_case

DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
INDEX_NAMES = ("visual_index", "text_index", "query_index", "keep_count")


class OwnDecode(FusedSession):
    """Decode steps by our attention, too."""

    def _joined(self) -> ir.Model:
        return self._lower(join_decode(self.bundle.graph("prefix"), self.bundle.graph("decoder")), self.lowering)


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


def in_rows(layout: str, *heads: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Query, key and value [frames, heads, rows, size] as rows of their own, of all three, or of two where turned."""
    rows = [x.transpose(0, 2, 1, 3).reshape(*x.shape[::2], -1) for x in heads]
    if layout == "by row":
        return rows
    whole, both = np.concatenate(rows, axis=2), np.concatenate(rows[:2], axis=2)
    return {"packed": [whole] * 3, "by head": [both, both, whole]}[layout]


def attend(
    library: Path, provider: Provider, case: DecoderCase | EncoderCase, floats: list[Any], ints: list[Any]
) -> list[npt.NDArray[Any]]:
    """AttendInPlace or EncodeAttend on float32 arrays that are cast to the case's type, and its outputs cast back."""
    operator, count = ("AttendInPlace", 3) if isinstance(case, DecoderCase) else ("EncodeAttend", 1)
    heads, _, size = case.q.shape[-3:]
    given, whole = [f"x{i}" for i in range(len(floats))], [f"i{i}" for i in range(len(ints))]
    typed, found = [f"{x}/typed" for x in given], [f"y{i}" for i in range(count)]
    casts = [helper.make_node("Cast", [x], [y], to=DTYPES[case.dtype]) for x, y in zip(given, typed, strict=True)]
    back = [helper.make_node("Cast", [f"{y}/typed"], [y], to=1) for y in found]
    attributes: dict[str, Any] = {"scale": size**-0.5, "heads": heads}
    if isinstance(case, EncoderCase):
        attributes |= {"head_dim": size, "block_size": case.block_size}
    outputs = [f"{y}/typed" for y in found]
    node = helper.make_node(operator, [*typed, *whole], outputs, domain=IVC_DOMAIN, **attributes)
    inputs = [tensors(1, [name], x.ndim)[0] for name, x in zip(given, floats, strict=True)]
    ranks = [3 if isinstance(case, EncoderCase) and case.block_size else 2, 4, 4][:count]
    results = [tensors(1, [name], rank)[0] for name, rank in zip(found, ranks, strict=True)]
    opened = session(library, provider, [*casts, node, *back], [*inputs, *tensors(6, whole)], results)
    feeds = dict(zip(given, (x.astype(np.float32) for x in floats), strict=True)) | dict(zip(whole, ints, strict=True))
    answers: list[npt.NDArray[Any]] = opened.run(None, feeds)
    return answers


def layer_inputs(case: DecoderCase) -> list[npt.NDArray[Any]]:
    """All but past_length."""
    rows = in_rows(case.layout, *(x[None] for x in (case.q, case.k, case.v)))
    return [*rows, case.key_cache[None], case.value_cache[None]]


def attend_in_place(library: Path, provider: Provider, case: DecoderCase) -> list[npt.NDArray[Any]]:
    """y and both caches, which are copied: the casts' results are other memory than the outputs."""
    return attend(library, provider, case, layer_inputs(case), [np.array([case.past_length], np.int32)])


def attend_bound(library: Path, provider: Provider, case: DecoderCase) -> list[npt.NDArray[Any]]:
    """The same in float32, with the caches bound as inputs and outputs."""
    names, caches = [f"x{i}" for i in range(5)], ["present_key", "present_value"]
    attributes: dict[str, Any] = {"scale": case.q.shape[2] ** -0.5, "heads": len(case.q)}
    node = helper.make_node("AttendInPlace", [*names, "past"], ["y", *caches], domain=IVC_DOMAIN, **attributes)
    held = [
        *(x.copy() for x in layer_inputs(case)),
        np.array([case.past_length], np.int32),
    ]  # a value may be their memory
    floats = [tensors(1, [name], x.ndim)[0] for name, x in zip(names, held, strict=False)]
    results = [*tensors(1, ["y"], 2), *tensors(1, caches, 4)]
    opened = session(library, provider, [node], [*floats, *tensors(6, ["past"])], results)
    binding = opened.io_binding()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(x, provider, 0) for x in held]
    for name, value in zip((*names, "past"), values, strict=True):
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    for name, value in zip(caches, values[3:5], strict=True):
        binding.bind_ortvalue_output(name, value)
    opened.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy(), *(value.numpy().copy() for value in values[3:5])]


def encode(library: Path, provider: Provider, case: EncoderCase) -> npt.NDArray[Any]:
    """y."""
    windows = [] if case.windows is None else [case.windows]
    return attend(library, provider, case, in_rows(case.layout, case.q, case.k, case.v), windows)[0]


def check_attention(library: Path, provider: Provider, seed: int, most: int) -> None:
    """A random case of a decoder layer, of frames and of windows, against float64."""
    with np.errstate(all="ignore"):  # NaN and infinities stand where nothing may be read
        layer = replace(decoder_case(seed, most), append=True)
        if layer.key_cache.shape[1] >= layer.q.shape[1]:
            y, *caches = attend_in_place(library, provider, layer)
            for found, wanted in zip(caches, layer.caches(), strict=True):
                np.testing.assert_array_equal(found[0], wanted.astype(np.float32))
            layer.error(y)
        for case in (encoder_case(seed, False, most), encoder_case(seed, True, most)):
            case.error(encode(library, provider, case).reshape(case.answer().shape))
