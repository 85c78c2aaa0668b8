"""The body of SelectTokens that sorts, against the one that counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import IR_VERSION, IVC_DOMAIN, OPSET
from ivc_export.graph.functions import function
from ivc_export.lowering import lower
from ivc_export.lowering.onnxruntime.sorted_selection import SortSelectionPass
from ivc_export.runtime.probes import selection_part
from tests.native.kernels import SEED_DIVISOR, Case, random_case

NAMES = ("values", "ivc_priority", "visual_index", "text_index", "query_index", "keep_count")
FLOATS = NAMES[:2]


def model(softmax_all: int = 0) -> ir.Model:
    """A call of SelectTokens."""

    def value(name: str, floats: bool) -> ir.Value:
        dtype = ir.DataType.FLOAT if floats else ir.DataType.INT32
        return ir.val(name, dtype=dtype, shape=ir.Shape([None] * (4 if name == "values" else 1)))

    inputs = [value(name, name in FLOATS) for name in NAMES]
    attributes = {"seed_divisor": SEED_DIVISOR, "softmax_all": softmax_all}
    node = ir.node("SelectTokens", inputs, attributes, domain=IVC_DOMAIN, num_outputs=3, name="select")
    for output, name in zip(node.outputs, ("keep_index", "token_score", "seed_index"), strict=True):
        output.name, output.type = name, value(name, name == "token_score").type
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": OPSET, IVC_DOMAIN: 1}, name="select")
    return ir.Model(graph, ir_version=IR_VERSION, functions=[function("SelectTokens").clone()])


def opened(one: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ir.to_proto(one).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions() -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    """The body that counts, and the one that sorts."""
    sorts = SortSelectionPass()(model())
    assert sorts.modified
    return opened(model()), opened(sorts.model)


def feeds(case: Case) -> Mapping[str, npt.NDArray[Any]]:
    keep_count = np.array([case.keep_count], np.int32)
    arrays = (case.values[None], case.priority, case.visual, case.text, case.query, keep_count)
    return dict(zip(NAMES, arrays, strict=True))


def check(sessions: tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession], case: Case) -> None:
    """The same seeds and rows, also where scores tie."""
    wanted, found = (session.run(None, dict(feeds(case))) for session in sessions)
    np.testing.assert_array_equal(found[2], wanted[2])
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=2e-6)
    assert [x.dtype for x in found] == [x.dtype for x in wanted]


def test_random_tokens(sessions: Any) -> None:
    for seed in range(1, 150):
        case = random_case(seed, 1500)
        if not case.softmax_over_all:
            check(sessions, case)


@pytest.mark.parametrize("length", [1, 2, 49, 50, 51, 150, 250, 257, 1025])
def test_ties_go_to_the_lowest_index(sessions: Any, length: int) -> None:
    generator = np.random.default_rng(length)
    rows = generator.permutation(length + 7).astype(np.int32)
    visual, text = np.sort(rows[:length]), np.sort(rows[length:])
    values, priority = np.ones((1, length + 7, 8), np.float32), np.zeros(length, np.float32)
    for keep_count in {1, max(1, length // 2), length}:
        check(sessions, Case(values, priority, visual, text, text[-1:], keep_count))


def test_scores_of_zero_tie_too(sessions: Any) -> None:
    """All votes go to the three seeds, exactly."""
    values = np.zeros((1, 300, 8), np.float32)
    values[:, [40, 90, 200, 299]] = 60
    index = np.arange(300, dtype=np.int32)
    case = Case(values, np.zeros(299, np.float32), index[:299], index[299:], index[299:], 20)
    check(sessions, case)
    score = sessions[1].run(None, dict(feeds(case)))[1]
    assert (score == 0).sum() > 250


def test_votes_that_other_rows_share_are_counted_as_before() -> None:
    shared = SortSelectionPass()(model(softmax_all=1))
    assert not shared.modified
    names = [node.op_type for body in shared.model.functions.values() for node in body]
    assert "TopK" not in names


def test_onnxruntime_selects_in_forty_nodes(golden_bundle: Bundle, tmp_path: Path) -> None:
    part = selection_part(lower(golden_bundle.graph("prefix"), "ort-cuda"))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that the file fits this machine
    content = ir.to_proto(part).SerializeToString()
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    nodes = list(ir.load(options.optimized_model_filepath).graph)
    assert len(nodes) <= 40
    assert not any(node.op_type == "Sqrt" for node in nodes), "it computes a constant in each run"
    assert sum(node.op_type == "FusedMatMul" for node in nodes) == 2, "it scales products in nodes of their own"
