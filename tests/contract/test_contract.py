from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES, GraphName
from ivc_export.contract.operators import verify_graph
from ivc_export.contract.ratio import kept_tokens
from ivc_export.errors import UserError


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_saved_graphs_keep_the_contract(golden_bundle: Bundle, name: GraphName) -> None:
    model = ir.load(golden_bundle.folder / f"{name}.onnx")
    verify_graph(name, model, golden_bundle.manifest.graphs[name])


def test_a_graph_that_breaks_the_contract_is_found(golden_bundle: Bundle) -> None:
    info = golden_bundle.manifest.graphs["vision"]
    for damage in ("input", "operator", "opset"):
        model = ir.load(golden_bundle.folder / "vision.onnx")
        if damage == "input":
            model.graph.inputs[0].dtype = ir.DataType.FLOAT16
        elif damage == "operator":
            next(iter(model.graph)).op_type = "Gelu"
        else:
            model.graph.opset_imports[""] = 18
        with pytest.raises(AssertionError):
            verify_graph("vision", model, info)


def test_weights_exist_once_and_stay_outside_the_graphs(golden_bundle: Bundle) -> None:
    owners: dict[str, str] = {}
    for name in GRAPH_NAMES:
        path = golden_bundle.folder / f"{name}.onnx"
        assert path.stat().st_size < 200_000
        for value in ir.load(path).graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                assert owners.setdefault(value.name or "", name) == name
                assert str(value.const_value.location).startswith("weights/")
    assert len(owners) == 117  # all of the checkpoint's but the embeddings, which the host gathers


def test_kept_tokens_round_half_to_even() -> None:
    assert [kept_tokens(n, 0.5) for n in (1, 3, 5, 7, 120)] == [1, 2, 2, 4, 60]
    assert kept_tokens(64, 1.0) == 64


def damaged(bundle: Bundle, folder: Path, **changes: Any) -> Path:
    shutil.copytree(bundle.folder, folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_manifests_that_cannot_be_read(golden_bundle: Bundle, tmp_path: Path) -> None:
    weights = golden_bundle.manifest.weights[0].model_dump()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("schema version 99.*upgrade ivc-export", {"schema_version": 99}),
        ("damaged.*selection_layer", {"selection_layer": 0}),
        ("newer ivc-export .surprise", {"surprise": 1}),
        ("outside the bundle", {"weights": [weights | {"file": "../weights.safetensors"}]}),
        ("names 0 graphs of 3", {"graphs": {}}),
        ("is missing", {"weights": [weights | {"file": "weights/other.safetensors"}]}),
        ("copy the bundle again", {"weights": [weights | {"size": 5}]}),
        ("names no weight files", {"weights": []}),
        ("was edited after the export.*ivc-export --model CHECKPOINT", {"default_ratio": 0.25}),
    ]
    for number, (sentence, changes) in enumerate(cases):
        with pytest.raises(UserError, match=sentence):
            Bundle.load(damaged(golden_bundle, tmp_path / str(number), **changes))
    (tmp_path / "0" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Bundle.load(tmp_path / "0")
    with pytest.raises(UserError, match="not a bundle"):
        Bundle.load(tmp_path)
