"""Nothing outside of a bundle is read, written or deleted, whatever its files and links say."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.manifest import constants_sha256
from ivc_export.contract.names import MANIFEST

ASK = ["--prompt", "Where?", "--max-tokens", "1"]


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    return shutil.copytree(sample_bundle.folder, tmp_path / "bundle")


def moved_out(name: str) -> Callable[[Path], None]:
    """Move a file of the bundle out of it, and leave a link."""

    def move(bundle: Path) -> None:
        target = bundle.parent / "outside" / Path(name).name
        (bundle / name).rename(target)
        (bundle / name).symlink_to(target)

    return move


def rewrite(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the prefix graph, and the manifest's hashes with it, as an attacker would."""
    path = bundle / "prefix.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    content = json.loads((bundle / MANIFEST).read_text())
    content["graphs"]["prefix"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    content["constants_sha256"] = constants_sha256(content)
    (bundle / MANIFEST).write_text(json.dumps(content))


def weight(model: onnx.ModelProto) -> onnx.TensorProto:
    found: onnx.TensorProto = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    return found


def located(key: str, value: str) -> Callable[[Path], None]:
    def change(model: onnx.ModelProto) -> None:
        entry = next((entry for entry in weight(model).external_data if entry.key == key), None)
        (entry or weight(model).external_data.add(key=key)).value = value

    return lambda bundle: rewrite(bundle, change)


def within_a_constant(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Constant", output=["more"]).attribute.add(
        name="value", type=onnx.AttributeProto.TENSOR
    ).t.CopyFrom(weight(model))


def within_a_function(model: onnx.ModelProto) -> None:
    node = next(node for function in model.functions for node in function.node)
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(weight(model))


def within_a_branch(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [], [weight(model)])
    model.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (moved_out("manifest.json"), "outside it: copy the whole bundle"),
        (moved_out("tokenizer.json"), "outside it"),
        (moved_out("chat_template.jinja"), "outside it"),
        (moved_out("config.json"), "outside it"),
        (moved_out("preprocessor_config.json"), "outside it"),
        (moved_out("decoder.onnx"), "outside it"),
        (lambda b: (b / "engines").symlink_to(b.parent), "outside it"),
        (lambda b: (b / "testdata").symlink_to("testdata"), "outside it"),
        (moved_out("weights"), "outside it"),
        (moved_out("weights/model.safetensors"), "outside it"),
        (located("location", "../outside/x"), "which is not a weight file of the manifest"),
        (located("location", "/etc/passwd"), "which is not a weight file of the manifest"),
        (located("location", "weights/../weights/model.safetensors"), "which is not a weight file of the manifest"),
        (located("location", "config.json"), "which is not a weight file of the manifest"),
        (located("location", ""), "which is not a weight file of the manifest"),
        (located("offset", str(1 << 40)), "is not within weights/model.safetensors"),
        (located("offset", "-4"), "is not within weights/model.safetensors"),
        (located("offset", "four"), "invalid literal"),
        (located("length", "4"), "is not within weights/model.safetensors"),
        (lambda b: rewrite(b, within_a_constant), "it has weights where none belong"),
        (lambda b: rewrite(b, within_a_function), "it has weights where none belong"),
        (lambda b: rewrite(b, within_a_branch), "it has weights where none belong"),
    ],
)
def test_what_leaves_the_bundle_is_not_read(
    bundle: Path, prepare: Callable[[Path], None], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(bundle)
    assert cli.ivc_run([str(bundle), *ASK]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1, said


def test_links_that_stay_within_the_bundle_serve(bundle: Path) -> None:
    (bundle / "tokenizer.json").rename(bundle / "text.json")
    (bundle / "tokenizer.json").symlink_to("text.json")
    assert cli.ivc_run([str(bundle), *ASK]) == 0


@pytest.mark.parametrize("folder", ["report", "report/reference"])
def test_a_check_writes_and_deletes_nothing_behind_links(
    bundle: Path, sample_checkpoint: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = bundle.parent / "outside"
    (outside / "reference").mkdir()
    (outside / "reference" / "thesis.txt").write_text("years of work")
    (bundle / folder).parent.mkdir(exist_ok=True)
    (bundle / folder).symlink_to(outside)
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), "--steps", "0"]) == 2
    assert ("outside it" if folder == "report" else "which is a link or a file: remove it") in capsys.readouterr().err
    assert [path.name for path in outside.rglob("*")] == ["reference", "thesis.txt"]


def test_files_that_are_links_are_replaced_and_not_written_through(bundle: Path, sample_checkpoint: Path) -> None:
    victim = bundle.parent / "outside" / "thesis.txt"
    victim.write_text("years of work")
    (bundle / "report").mkdir()
    links = [bundle / "report" / name for name in ("parity.json", "parity.html")]
    for link in links:
        link.symlink_to(victim)
    content = json.loads((bundle / MANIFEST).read_text())
    content["weights"][0]["sha256"] = None
    (bundle / MANIFEST).write_text(json.dumps(content))
    check = [str(bundle), "--weights", "--against", str(sample_checkpoint), "--steps", "0"]
    assert cli.ivc_check(check) == 0
    assert victim.read_text() == "years of work"
    assert json.loads((bundle / MANIFEST).read_text())["weights"][0]["sha256"]
    assert not links[0].is_symlink() and links[0].stat().st_mode & 0o777 == 0o666 & ~0o022


@pytest.fixture
def checked(bundle: Path, sample_checkpoint: Path) -> Path:
    """The reference that a check leaves in a bundle."""
    assert cli.ivc_check([str(bundle), "--against", str(sample_checkpoint), "--steps", "1"]) == 0
    return bundle / "report" / "reference"


def test_a_stored_run_is_read_from_its_own_folder_alone(checked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = checked / "index.json"
    whole = json.loads(index.read_text())
    outside = checked.parent.parent.parent / "outside"
    shutil.copy(checked / "picture-0.png", outside)
    np.zeros(120, np.float32).tofile(outside / "x.bin")

    def first(**changes: object) -> dict[str, object]:
        return {"tensors": [whole["tensors"][0] | changes, *whole["tensors"][1:]]}

    for changes, sentence in (
        ({"pictures": ["../../../outside/picture-0.png"]}, "outside it"),
        ({"pictures": [str(outside / "picture-0.png")]}, "outside it"),
        ({"pictures": ["a\0b"]}, "outside it"),
        ({"pictures": 5}, "index.json is damaged (pictures"),
        ({"pictures": []}, "image_embeds and the number of pictures do not match"),
        ({"prompt_tokens": [1 << 40]}, "index.json is damaged (prompt_tokens"),
        ({"ratio": 2}, "index.json is damaged (ratio"),
        ({"drawn_tokens": [1, 2, 3]}, "step 3 has no logits"),
        ({"tensors": whole["tensors"][:-4]}, "is damaged"),
        (first(stage="../../../../outside"), "outside it"),
        (first(name="../" * 9 + "etc/passwd"), "outside it"),
        (first(dtype="O"), "is of dtype 'O'"),
        (first(shape=[1 << 40]), "but the index says"),
        (first(shape=[-1, -1]), "but the index says"),
        (first(shape=[float("inf")]), "holds an incomplete recording"),
        (first(shape="x"), "holds an incomplete recording"),
    ):
        index.write_text(json.dumps(whole | changes))
        capsys.readouterr()
        assert cli.ivc_check([str(checked.parent.parent), "--onnx-only"]) == 2, changes
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1, (changes, said)
