"""What Polygraphy's loaders and TensorRT-RTX refuse ends in one sentence, and nothing else is printed."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from ivc_export.errors import UserError
from ivc_export.tensorrt.compile import compile_graph
from ivc_export.tensorrt.loading import make_logger, polygraphy
from ivc_export.tensorrt.profiles import Extents
from ivc_export.tensorrt.recipe import Options

OPTIONS = Options("tensorrt-rtx", "8.6")


def squares(operator: str) -> ir.Model:
    """One node, on a matrix of n by 4 and itself."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node(operator, ["x", "x"], ["y"])], "toy", [x], [y])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize(
    ("operator", "extents", "options", "sentence"),
    [
        ("Nonsense", (1, 2, 3), OPTIONS, r"cannot read the toy graph \(.*Nonsense.*\)"),
        ("MatMul", (1, 2, 3), OPTIONS, r"cannot build the toy graph \(.*MatrixMultiply.*\): see docs/tensorrt.md"),
        ("Mul", (3, 2, 1), OPTIONS, r"cannot build the toy graph \(.+\): see docs/tensorrt.md"),
        ("Mul", (1, 2, 3), Options("tensorrt-rtx", "8.6", tactic_sources=("NONE",)), "there is no tactic source NONE"),
    ],
)
def test_what_is_refused_ends_in_one_sentence(
    operator: str,
    extents: tuple[int, int, int],
    options: Options,
    sentence: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    profile: Extents = {"n": extents}
    with pytest.raises(UserError, match=sentence) as raised:
        compile_graph(trt, squares(operator), [profile], options, tmp_path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_compiles_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert compile_graph(trt, squares("Mul"), [{"n": (1, 2, 3)}], OPTIONS, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_missing_polygraphy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.config", None)
    with (
        pytest.raises(UserError, match=r"Polygraphy does not load .*: install ivc-export\[tensorrt\]"),
        polygraphy("tensorrt-rtx", make_logger(trt), "it fails"),
    ):
        pytest.fail("it loads")


def test_a_process_builds_for_one_library() -> None:
    with polygraphy("tensorrt-rtx", make_logger(trt), "it fails") as loaders:
        assert loaders.get_trt_logger
    with (
        pytest.raises(UserError, match="build for tensorrt in a new process"),
        polygraphy("tensorrt", make_logger(trt), "it fails"),
    ):
        pytest.fail("it loads")
