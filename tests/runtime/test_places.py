"""Where pictures stand in a prompt, and what stands before it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from ivc_export import cli, families
from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.runtime.chat import Chat, Sampling
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.runtime.processor import Processor, user_message
from ivc_export.text.template import ChatTemplate
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import SHAPES

SHORT = Sampling(max_tokens=2)
OTHER = PIL.Image.new("RGB", (84, 56), "green")


@pytest.mark.parametrize(
    ("text", "pictures", "kinds"),
    [
        ("Which?", 0, ["Which?"]),
        ("Which?", 2, [None, None, "Which?"]),
        ("First <image> then <image>: which?", 2, ["First ", None, " then ", None, ": which?"]),
        ("<image><image>\nWhich?", 2, [None, None, "\nWhich?"]),
        ("Which of <image>", 1, ["Which of ", None]),
    ],
)
def test_marks_place_pictures(text: str, pictures: int, kinds: list[str | None]) -> None:
    content = user_message(text, pictures)["content"]
    assert [part.get("text") for part in content] == kinds
    assert [part["type"] for part in content] == ["text" if kind else "image" for kind in kinds]


@pytest.mark.parametrize(("text", "pictures"), [("<image> Which?", 0), ("<image> Which?", 2), ("<image> <image>?", 1)])
def test_marks_that_are_no_pictures_are_refused(text: str, pictures: int) -> None:
    with pytest.raises(UserError, match=rf"marks, but there are {pictures} pictures: write one mark for each, or none"):
        user_message(text, pictures)


def test_parts_are_marks(sample_session: OnnxSession) -> None:
    """Tokens stand in the order of the parts, whichever way they are given."""
    chats = [Chat(sample_session, sampling=SHORT, system="Be brief.") for _ in range(2)]
    answers = [
        "".join(chats[0].ask("First <image>, then <image>: which?", [SHAPES, OTHER])),
        "".join(chats[1].ask(["First ", SHAPES, ", then ", OTHER, ": which?"])),
    ]
    assert answers[0] == answers[1]
    runs = [chat.step.run for chat in chats if chat.step is not None]
    assert runs[0].tokens.tolist() == runs[1].tokens.tolist()
    tokenizer = chats[0].processor.tokenizer
    text = tokenizer.decode(runs[0].tokens.tolist(), skip_special_tokens=False)
    for _ in range(200):
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        f"First {picture}, then {picture}: which?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [grid.visual for grid in runs[0].grids] == [192, 6]


@pytest.mark.parametrize(
    ("question", "images", "sentence"),
    [
        ([], [], "the prompt is empty"),
        ([SHAPES], [], "the prompt is empty"),
        (["Which?", SHAPES], [OTHER], "pictures are given twice"),
        ("<image>", [OTHER], "the prompt is empty"),
    ],
)
def test_questions_that_cannot_be(sample_session: OnnxSession, question: Any, images: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        next(Chat(sample_session, sampling=SHORT).ask(question, images))


def templated(bundle: Bundle, folder: Path, template: str) -> Processor:
    shutil.copyfile(bundle.folder / "tokenizer.json", folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(template)
    return Processor(Bundle(folder, bundle.manifest))


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
PICTURES_FIRST = TURN.replace(
    "%s",
    "{% for p in m.content if p.type == 'image' %}<|image_pad|>{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}",
)


def test_a_template_that_moves_pictures_is_told(sample_bundle: Bundle, tmp_path: Path) -> None:
    """As that of LLaVA-1.5 does, which writes all pictures before all text."""
    processor = templated(sample_bundle, tmp_path, PICTURES_FIRST)
    pictures = [processor.picture(OTHER)]
    assert processor.question("<image> Which?", pictures) == processor.question(" Which?", pictures)
    with pytest.raises(UserError, match="does not keep pictures within the text: put them before the text"):
        processor.question("Which is <image> of these?", pictures)


@pytest.mark.parametrize(
    ("template", "content"),
    [
        (PICTURES_FIRST, [{"type": "text", "text": "Be brief."}]),
        (TURN.replace("%s", "{{ m.content if m.role == 'system' else '?' }}"), "Be brief."),
        (TURN.replace("%s", "{{ '?' }}"), None),
        ("{{ raise_exception('no systems') if messages[0].role == 'system' }}", None),
    ],
)
def test_a_system_message_has_the_form_that_the_template_takes(
    sample_bundle: Bundle, tmp_path: Path, template: str, content: object
) -> None:
    processor = templated(sample_bundle, tmp_path, template)
    if content is None:
        with pytest.raises(UserError, match="takes no system message: leave it out"):
            processor.system_message("Be brief.")
    else:
        assert processor.system_message("Be brief.") == {"role": "system", "content": content}


@pytest.mark.parametrize("family", families.names())
def test_every_familys_own_template_takes_a_system_message_and_keeps_places(family: str, tmp_path: Path) -> None:
    template = ChatTemplate(families.of(family).chat_template, {}, "the template", "mend it")
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    text = template.render([system, user_message("First <image> then <image>: which?", 2)])
    image = families.of(family).token_texts.image
    assert text.count("Be brief.") == 1 and text.count(image) == 2
    places = [text.index(part) for part in ("Be brief.", "First", image, "then")]
    assert places == sorted(places) and text.rindex(image) > places[-1]


SYSTEM = "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。<|im_end|>\n"  # noqa: E501


def test_the_original_internvl_code_writes_such_a_conversation() -> None:
    """A line for each picture in front, marks as they stand, and a system message before all."""
    template = ChatTemplate(families.of("internvl_chat").chat_template, {}, "the template", "mend it")
    for text, pictures, wanted in (
        ("Where?", 1, "<IMG_CONTEXT>\nWhere?"),
        ("Where?", 2, "<IMG_CONTEXT>\n<IMG_CONTEXT>\nWhere?"),
        ("1: <image>\n2: <image>\nWhere?", 2, "1: <IMG_CONTEXT>\n2: <IMG_CONTEXT>\nWhere?"),
        ("<image>\nWhere?", 1, "<IMG_CONTEXT>\nWhere?"),
        ("Where in <image>?", 1, "Where in <IMG_CONTEXT>?"),
        ("Where?", 0, "Where?"),
    ):
        question = f"<|im_start|>user\n{wanted}<|im_end|>\n<|im_start|>assistant\n"
        assert template.render([user_message(text, pictures)]) == SYSTEM + question
    turns = [user_message("A?", 0), {"role": "assistant", "content": "B."}, user_message("C?", 0)]
    assert template.render(turns) == (
        f"{SYSTEM}<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
        "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = {"role": "system", "content": "Be brief."}
    assert template.render([own, turns[0]]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA?")


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({}, SYSTEM),
        ({"template": "internvl2_5", "system_message": None}, SYSTEM),
        ({"system_message": 'Say "{{ yes }}"\nonce.'}, '<|im_start|>system\nSay "{{ yes }}"\nonce.<|im_end|>\n'),
        ({"template": "internlm2-chat"}, "template 'internlm2-chat' of config.json is not supported"),
        ({"system_message": 3}, "system_message of config.json is 3, which is not text"),
    ],
)
def test_config_json_chooses_the_system_message(changes: dict[str, Any], begins: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", {**TINY["internvl_chat"], **changes})
    (checkpoint / "chat_template.jinja").unlink()
    recipe = ExportRecipe(checkpoint, tmp_path / "bundle")
    if not begins.startswith("<"):
        with pytest.raises(UserError, match=begins):
            export(recipe)
        (checkpoint / "chat_template.jinja").write_text(families.of("internvl_chat").chat_template)
        begins = SYSTEM  # one of the checkpoint's own is asked about nothing
    assert Processor(export(recipe)).render([user_message("?", 0)]).startswith(begins)


@pytest.mark.parametrize(
    ("family", "size", "wanted"),
    [
        ("qwen2_vl", (448, 336), {"covered": [0, 0, 448, 336], "scaled": (448, 336), "grid": (12, 16, 1)}),
        ("qwen2_vl", (30, 200), {"covered": [0, 0, 30, 200], "scaled": (28, 196), "grid": (7, 1, 1)}),
        ("llava", (448, 336), {"covered": [56, 0, 392, 336], "scaled": (112, 112), "grid": (8, 8, 1)}),
        ("internvl", (300, 100), {"covered": [0, 0, 300, 100], "scaled": (336, 112), "grid": (4, 12, 4)}),
        ("internvl", (100, 100), {"covered": [0, 0, 100, 100], "scaled": (112, 112), "grid": (4, 4, 1)}),
    ],
)
def test_json_tells_how_pictures_were_scaled(
    family: str, size: tuple[int, int], wanted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", TINY[family])
    bundle = export(ExportRecipe(checkpoint, tmp_path / "bundle"))
    PIL.Image.new("RGB", size).save(tmp_path / "picture.png")
    arguments = [str(bundle.folder), "--image", str(tmp_path / "picture.png"), "--prompt", "Where?"]
    assert cli.ivc_run([*arguments, "--json", "--max-tokens", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == [
        {
            "original": {"width": size[0], "height": size[1]},
            "covered": wanted["covered"],
            "scaled": dict(zip(("width", "height"), wanted["scaled"], strict=True)),
            "grid": {"time": 1, **dict(zip(("rows", "columns", "tiles"), wanted["grid"], strict=True))},
        }
    ]
    rows, columns, tiles = wanted["grid"]
    assert found["visual_tokens"]["total"] == rows * columns * (1 if tiles == 1 else tiles / (tiles - 1))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bad_picture_costs_a_chat_nothing_and_a_bad_question_its_pictures(
    sample_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    thin = tmp_path / "thin.png"
    PIL.Image.new("RGB", (5000, 20)).save(thin)
    lines = [f"/image {thin}", "What?", f"/image {SHAPES}", "<image> <image>", "And now?", f"/image {SHAPES}", "Where?"]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines)))
    assert cli.ivc_run([str(sample_bundle.folder), "--chat", "--json", "--max-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["visual_tokens"]["total"] for line in out.splitlines()] == [0, 0, 192]
    assert err.count("error: ") == 2 and err.count("too elongated") == 1
    assert "or none to put them first; its pictures were dropped, and /image adds them again" in err
