"""What of a checkpoint's files makes prompts, where several say the same: what transformers takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import transformers
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from ivc_export import cli, families
from ivc_export.checkpoint import Checkpoint
from ivc_export.configuration import Description, read_description
from ivc_export.errors import UserError

QWEN = families.of("qwen2_vl")


@pytest.fixture
def folder(tmp_path: Path, sample_checkpoint: Path) -> Path:
    """A checkpoint's files without its weights, which nothing here reads, and without a chat template."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.jinja")
    return Path(shutil.copytree(sample_checkpoint, tmp_path / "checkpoint", ignore=ignored))


def described(folder: Path) -> Description:
    return read_description(Checkpoint.open(folder))


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file, which may not be there yet."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def template(name: str) -> str:
    """A chat template that says which one it is."""
    return QWEN.chat_template.replace("You are a helpful assistant.", name)


def named(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template(name)} for name in names]


PLACES: dict[str, Callable[[Path], object]] = {  # in transformers' order
    "processor_config.json": lambda f: edit(f / "processor_config.json", chat_template=template("processor")),
    "chat_template.json": lambda f: edit(f / "chat_template.json", chat_template=template("old")),
    "chat_template.jinja": lambda f: (f / "chat_template.jinja").write_text(template("jinja")),
    "additional": lambda f: write(f / "additional_chat_templates" / "default.jinja", template("additional")),
    "tokenizer_config.json": lambda f: edit(f / "tokenizer_config.json", chat_template=named("tool_use", "default")),
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves files open
@pytest.mark.parametrize("first", range(len(PLACES)))
def test_of_several_chat_templates_transformers_is_taken(folder: Path, first: int) -> None:
    for name in list(PLACES)[first:]:
        PLACES[name](folder)
    if first < 2:  # transformers refuses chat_template.json beside that folder
        shutil.rmtree(folder / "additional_chat_templates")
    processor: Any = Qwen2VLProcessor
    stock = processor.get_processor_dict(str(folder))[0].get("chat_template")
    if stock is None:
        stock = transformers.PreTrainedTokenizerFast.from_pretrained(folder).chat_template
    found = described(folder)
    assert found.chat_template == (stock["default"] if isinstance(stock, dict) else stock)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("place", "note"),
    [
        (lambda f: None, "has no chat template: the family's own is taken"),
        (lambda f: edit(f / "tokenizer_config.json", chat_template=named("tool_use")), "has no chat template"),
        (lambda f: write(f / "chat_template.jinja", "{{ messages[0].content }}"), r"in chat_template.jinja shows no"),
        (lambda f: edit(f / "chat_template.json", chat_template="x"), r"in chat_template.json shows no pictures"),
    ],
)
def test_the_familys_own_template_is_taken_with_a_note(folder: Path, place: Any, note: str) -> None:
    place(folder)
    found = described(folder)
    assert found.chat_template == QWEN.chat_template
    assert len(found.notes) == 1 and note in found.notes[0]


def test_an_export_tells_its_notes(sample_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(sample_checkpoint, tmp_path / "checkpoint")
    (folder / "chat_template.jinja").unlink()
    assert cli.ivc_export(["--model", str(folder), "--output", str(tmp_path / "bundle"), "--json"]) == 0
    assert "has no chat template" in json.loads(capsys.readouterr().out)["warnings"][0]


def test_of_two_image_processors_transformers_is_taken(folder: Path) -> None:
    kind = {"image_processor_type": "Qwen2VLImageProcessor", "resample": 3}
    edit(folder / "preprocessor_config.json", **kind, min_pixels=3136, max_pixels=12845056)
    edit(folder / "processor_config.json", processor_class="Qwen2VLProcessor")
    assert described(folder).model.preprocessing.model_dump()["max_pixels"] == 12845056
    size = {"shortest_edge": 3136, "longest_edge": 64 * 28 * 28}
    edit(folder / "processor_config.json", image_processor={**kind, "size": size})
    image = PIL.Image.new("RGB", (640, 480))
    stock = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="np")
    grid = QWEN.picture(image, described(folder).model.preprocessing).grid
    assert 4 * grid.visual == int(stock["image_grid_thw"].prod()) < 4 * 65


BAD = [
    ("a template of numbers", lambda f: edit(f / "chat_template.json", chat_template=1), "neither text nor templates"),
    ("a named one", lambda f: edit(f / "processor_config.json", chat_template={"default": []}), "neither text nor"),
    ("an image processor", lambda f: edit(f / "processor_config.json", image_processor=[]), "is no JSON object"),
]


@pytest.mark.parametrize(("spoil", "sentence"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_files_are_told_in_one_sentence(
    folder: Path, spoil: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "chat_template.jinja").write_text(QWEN.chat_template)
    spoil(folder)
    with pytest.raises(UserError, match=sentence):
        described(folder)
    assert cli.ivc_export(["--model", str(folder), "--output", f"{folder}-out", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and not Path(f"{folder}-out").exists()
