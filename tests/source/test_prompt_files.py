"""What of a checkpoint's files makes prompts, where several say the same: what transformers takes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import transformers
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from ivc_export import cli, families
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.processor import Processor
from ivc_export.source.configuration import Description, read_description
from ivc_export.source.prompts import Prompts, segments_of
from ivc_export.text.template import ChatTemplate, answer_message, parts_message
from samples.make_sample import make_checkpoint, make_tokenizer
from samples.tiny import TINY
from tests.conftest import SHAPES

QWEN = families.of("qwen2_vl")


@pytest.fixture
def folder(tmp_path: Path, sample_checkpoint: Path) -> Path:
    """A checkpoint's files without its weights, which nothing here reads, and without a chat template."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.jinja")
    return Path(shutil.copytree(sample_checkpoint, tmp_path / "checkpoint", ignore=ignored))


def described(folder: Path) -> Description:
    return read_description(Checkpoint.open(folder))


def prompts(folder: Path) -> Prompts:
    return described(folder).prompts


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
    found = prompts(folder)
    assert found.chat_template == (stock["default"] if isinstance(stock, dict) else stock)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("place", "note"),
    [
        (lambda f: None, "has no chat template: the bundle gets the family's own"),
        (lambda f: edit(f / "tokenizer_config.json", chat_template=named("tool_use")), "has no chat template"),
        (
            lambda f: write(f / "chat_template.jinja", "{{ messages[0].content }}"),
            r"in chat_template.jinja has no place for pictures",
        ),
        (
            lambda f: edit(f / "chat_template.json", chat_template="x"),
            r"in chat_template.json has no place for pictures",
        ),
    ],
)
def test_the_familys_own_template_is_taken_with_a_note(folder: Path, place: Any, note: str) -> None:
    place(folder)
    found = prompts(folder)
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
    grid = described(folder).model.encoder.pictures.picture(image, 0).grid
    assert 4 * grid.visual == int(stock["image_grid_thw"].prod()) < 4 * 65


def stripped(folder: Path, last: int) -> list[dict[str, Any]]:
    """Take the added tokens behind `last` out of tokenizer.json, and return all that were there."""
    content = json.loads((folder / "tokenizer.json").read_text())
    every: list[dict[str, Any]] = content["added_tokens"]
    content["added_tokens"] = [token for token in every if token["id"] <= last]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return every


def decoder(tokens: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """added_tokens_decoder of a tokenizer_config.json."""
    return {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in tokens}


def in_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder(stripped(folder, 499)))


def in_added_tokens(folder: Path) -> None:
    every = {token["content"]: token["id"] for token in stripped(folder, 499) if token["id"] > 499}
    edit(folder / "added_tokens.json", **every)
    edit(folder / "special_tokens_map.json", additional_special_tokens=[*every], eos_token={"content": "<|im_end|>"})


def in_names(folder: Path) -> None:
    """The last two, named without ids: transformers adds them behind the others, special tokens with a role first."""
    stripped(folder, 505)
    edit(folder / "tokenizer_config.json", additional_special_tokens=["<|im_end|>"], pad_token="<|im_start|>")


@pytest.mark.parametrize("place", [in_config, in_added_tokens, in_names])
def test_tokens_that_tokenizer_json_lacks_are_added_as_transformers_does(folder: Path, place: Any) -> None:
    place(folder)
    stock = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    found = prompts(folder)
    text = QWEN.chat_template + " <|im_start|><|vision_start|><|image_pad|><|vision_end|> and <|im_end|>"
    assert found.tokenizer is not None
    ids = found.tokenizer.tokenizer.encode(text).ids
    assert ids == stock(text).input_ids
    assert {500, 501, 503, 506, 507} <= {*ids}
    added = {token["id"]: token for token in json.loads(found.tokenizer.text)["added_tokens"]}
    assert {added[number]["special"] for number in range(500, 508)} == {True}


def test_a_bundle_asks_about_pictures_with_tokens_that_only_tokenizer_config_holds(
    sample_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sample_checkpoint, tmp_path / "checkpoint")
    in_config(folder)
    wanted = Processor(export(ExportRecipe(sample_checkpoint, tmp_path / "whole")))
    processor = Processor(export(ExportRecipe(folder, tmp_path / "bundle")))
    pictures = [processor.picture(SHAPES)]
    assert processor.question("Where?", pictures) == wanted.question("Where?", pictures)


def test_a_whole_tokenizer_json_is_left_as_it_is(folder: Path) -> None:
    found = prompts(folder)
    assert found.tokenizer is not None
    assert found.tokenizer.text == (folder / "tokenizer.json").read_text()


def without_start(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=505)


@pytest.mark.parametrize(
    ("config", "template", "stop"),
    [
        ({}, QWEN.chat_template, (505, 507)),
        ({"eos_token": "<|im_start|>"}, QWEN.chat_template, (505, 506, 507)),
        ({"eos_token": {"content": "<|im_end|>"}}, QWEN.chat_template, (505, 507)),
        ({}, QWEN.chat_template.replace("<|im_end|>", ""), (505,)),
        ({}, QWEN.chat_template.replace("<|im_end|>", " . "), (505,)),
    ],
)
def test_an_answer_ends_where_the_turn_ends(
    folder: Path, config: dict[str, Any], template: str, stop: tuple[int, ...]
) -> None:
    without_start(folder)
    (folder / "chat_template.jinja").write_text(template)
    edit(folder / "tokenizer_config.json", **config)
    assert prompts(folder).tokens.stop == stop


LISTS = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] }}
{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}
{% endfor %}{{ '<|im_end|>' if message['role'] == 'assistant' }}
{% endfor %}"""


def test_an_answer_ends_where_a_template_of_parts_ends_it(folder: Path) -> None:
    without_start(folder)
    (folder / "chat_template.jinja").write_text(LISTS)
    assert prompts(folder).tokens.stop == (505, 507)


@pytest.mark.parametrize("layout", ["internvl", "internvl_chat"])
def test_internvl_asks_the_tokenizer_for_its_tokens(tmp_path: Path, layout: str) -> None:
    """The marks at ids that no arithmetic gives, and an image token that config.json does not name."""
    family = families.of(layout)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY[family.model_type])
    tokens = {500: "<|endoftext|>", 501: "</img>", 502: "<|im_start|>", 503: "<IMG_CONTEXT>", 504: "<img>"}
    make_tokenizer({**tokens, 505: "<|im_end|>"}).save(str(checkpoint / "tokenizer.json"))
    if layout == "internvl_chat":
        edit(checkpoint / "config.json", img_context_token_id=None)
    found = prompts(checkpoint).tokens
    assert (found.image, found.vision_start, found.vision_end) == (503, 504, 501)
    (checkpoint / "tokenizer.json").unlink()
    if layout == "internvl":
        assert prompts(checkpoint).tokens.image == 503
    else:
        with pytest.raises(UserError, match=r"names no image token, and .* no tokenizer that knows <IMG_CONTEXT>"):
            prompts(checkpoint)


MARKED = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}
{%- for p in m.content %}{{ '<image>\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize("name", ["internvl3_5", "internvl_chat"])
def test_a_template_that_marks_pictures_as_the_original_code_does_shows_them(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY[name])
    (checkpoint / "chat_template.jinja").write_text(MARKED)
    found = prompts(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = ChatTemplate(found.chat_template, {}, "it", "mend it").render([{"role": "user", "content": content}])
    assert text == "<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert found.notes == ()


@pytest.mark.parametrize(("layout", "part"), [("internvl", "text_config"), ("internvl_chat", "llm_config")])
def test_internvls_own_template_drops_what_qwen3_thought(layout: str, part: str) -> None:
    question, past = parts_message(["Why?"]), answer_message("<think>\nIt </think> rains.\n</think>\n\nIt rains.")
    for kind, dropped in (("qwen3", True), ("qwen2", False)):
        source = families.of(layout).own_template({**TINY[layout], part: {**TINY[layout][part], "model_type": kind}})
        text = ChatTemplate(source, {}, "it", "mend it").render([question, past, question])
        assert ("<|im_start|>assistant\nIt rains.<|im_end|>" in text, "<think>" in text) == (dropped, not dropped)
        segments, note = segments_of(ChatTemplate(source, {}, "it", "mend it"), source)
        assert note is None and segments is not None and (segments.assistant_past.thinking_end is not None) == dropped


def retokenize(folder: Path, **changes: Any) -> None:
    edit(folder / "tokenizer.json", **changes)


def conflict(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"503": {"content": "<|other|>", "special": True}})


def moved(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"600": {"content": "<|image_pad|>"}})


def gap(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"511": {"content": "<|other|>"}})


ONE = "an image: <|image_pad|>{{ messages[0].content[-1].text }}"
DOUBLE = QWEN.chat_template.replace("<|image_pad|>", "<|image_pad|><|image_pad|>")

BAD = [
    ("two texts of an id", conflict, "contradict each other (token 503 is <|image_pad|>, and token 503 is <|other|>)"),
    ("two ids of a text", moved, "contradict each other (<|image_pad|> is token 503, and token 600 is <|image_pad|>)"),
    ("an id behind a gap", gap, "says that <|other|> is token 511, but its tokenizer says 508"),
    ("added tokens conflict", lambda f: edit(f / "added_tokens.json", x=503), "contradict each other (token 503 is"),
    ("an id of text", lambda f: edit(f / "added_tokens.json", x="y"), "of id 'y' is not a token"),
    ("a negative id", lambda f: edit(f / "added_tokens.json", x=-1), "of id -1 is not a token"),
    (
        "a decoder of words",
        lambda f: edit(f / "tokenizer_config.json", added_tokens_decoder={"x": {}}),
        "is not a token",
    ),
    ("a decoder no object", lambda f: edit(f / "tokenizer_config.json", added_tokens_decoder=[]), "is not an object"),
    ("a name of numbers", lambda f: edit(f / "tokenizer_config.json", eos_token=3), "(eos_token is not text)"),
    (
        "extra tokens",
        lambda f: edit(f / "tokenizer_config.json", extra_special_tokens=3),
        "a special token is not text",
    ),
    ("no image token", lambda f: stripped(f, 502), "has no <|image_pad|>, which stands for a picture"),
    (
        "another image token",
        lambda f: edit(f / "config.json", image_token_id=504),
        "<|image_pad|> is token 504 in config.json and 503 in the tokenizer",
    ),
    (
        "another mark",
        lambda f: edit(f / "config.json", vision_end_token_id=9),
        "<|vision_end|> is token 9 in config.json and",
    ),
    ("an unknown stop token", lambda f: edit(f / "generation_config.json", eos_token_id=510), "has no such token"),
    ("a huge stop token", lambda f: edit(f / "generation_config.json", eos_token_id=1 << 20), "beyond the vocabulary"),
    ("ids behind the model's", lambda f: edit(f / "config.json", vocab_size=506), "is beyond the vocabulary of 506"),
    ("a tokenizer cut short", lambda f: (f / "tokenizer.json").write_text("{"), "is not valid JSON"),
    ("a tokenizer of a list", lambda f: (f / "tokenizer.json").write_text("[]"), "should hold a JSON object"),
    ("an empty tokenizer", lambda f: (f / "tokenizer.json").write_text("{}"), "it has no vocabulary"),
    ("an unknown model", lambda f: retokenize(f, model={"type": "X", "vocab": {}}), "tokenizer.json cannot be read"),
    ("added tokens no list", lambda f: retokenize(f, added_tokens={"a": 1}), "added_tokens is not a list"),
    ("an added token no object", lambda f: retokenize(f, added_tokens=[[]]), "is not a token"),
    ("a template without image", lambda f: write(f / "chat_template.jinja", "an image"), "writes 0 image tokens for a"),
    ("a template with two", lambda f: write(f / "chat_template.jinja", DOUBLE), "writes 2 image tokens for a picture"),
    ("one token for two", lambda f: write(f / "chat_template.jinja", ONE), "writes 1 image tokens for two pictures"),
    ("a template that fails", lambda f: write(f / "chat_template.jinja", "image{{ 1 / 0 }}"), "division by zero"),
    ("a template in pieces", lambda f: write(f / "chat_template.jinja", "image{% if %}"), "is damaged"),
    (
        "a template of numbers",
        lambda f: edit(f / "chat_template.json", chat_template=1),
        "neither text nor a list of named templates",
    ),
    (
        "a named one",
        lambda f: edit(f / "processor_config.json", chat_template={"default": []}),
        "neither text nor a list of",
    ),
    ("an image processor", lambda f: edit(f / "processor_config.json", image_processor=[]), "is not a JSON object"),
]


@pytest.mark.parametrize(("spoil", "sentence"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_files_are_told_in_one_sentence(
    folder: Path, spoil: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "chat_template.jinja").write_text(QWEN.chat_template)
    spoil(folder)
    with pytest.raises(UserError, match=re.escape(sentence)):
        described(folder)
    assert cli.ivc_export(["--model", str(folder), "--output", f"{folder}-out", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and not Path(f"{folder}-out").exists()
