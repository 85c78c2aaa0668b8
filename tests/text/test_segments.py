"""Chat templates as segments: what they say is what Jinja writes, or they say that they cannot."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from ivc_export import cli, families
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.manifest import PictureText
from ivc_export.source.prompts import segments_of
from ivc_export.text.segments import UnfitError, conversation, find_segments, segments_text
from ivc_export.text.template import ChatTemplate, answer_message, parts_message
from samples.tiny import TINY

PARTS = """\
{%- for p in m.content -%}
{%- if p.type == 'image' -%}<image>{%- else -%}{{ p.text }}{%- endif -%}
{%- endfor -%}"""
LLAMA = """\
{%- if messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0].content[0].text | trim + '\n<</SYS>>\n\n' -%}
{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
<s>[INST] {{ system if loop.first else '' }}PARTS [/INST]
{%- else -%}
{{ ' ' + m.content[0].text | trim + ' </s>' }}
{%- endif -%}
{%- endfor -%}""".replace("PARTS", PARTS)
THINKING = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' -%}
{%- set said = m.content[0].text -%}
{%- if '</think>' in said -%}{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}
{{ said }}
{%- else -%}PARTS{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
<think>
{% endif -%}""".replace("PARTS", PARTS)
PICTURES_FIRST = """\
{%- for m in messages -%}
{{ m.role.upper() + ': ' }}
{%- for p in m.content if p.type == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
{%- for p in m.content if p.type == 'text' -%}{{ p.text.rstrip() + ' ' }}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""
TURNS = "{%- for m in messages -%}\n[{{ m.role }}]PARTS\n{%- endfor -%}".replace("PARTS", PARTS)

TEMPLATES = {name: families.of(name).own_template(TINY[name]) for name in families.names()} | {
    "sample": Path("samples/spatial-vl/chat_template.jinja").read_text(encoding="utf-8"),
    "llama": LLAMA,
    "thinking": THINKING,
    "pictures first": PICTURES_FIRST,
    "turns": TURNS,
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, "the template", "mend it")


@pytest.mark.parametrize("name", TEMPLATES)
def test_segments_write_what_the_template_writes(name: str) -> None:
    jinja = template(TEMPLATES[name])
    segments = find_segments(jinja, TEMPLATES[name])
    assert segments.begin is not None
    source = random.Random(1)  # other conversations than those of the proof
    for number in range(40):
        messages = conversation(jinja, segments, number % 4, source)
        assert segments_text(segments, messages) == jinja.render(messages)


def test_thinking_is_dropped_from_earlier_answers() -> None:
    past = find_segments(template(THINKING), THINKING).assistant_past
    assert (past.thinking_end, past.thinking_left, past.left, past.right) == ("</think>", "newlines", "none", "none")


def test_pictures_in_front_are_told_from_those_in_place() -> None:
    found = find_segments(template(PICTURES_FIRST), PICTURES_FIRST)
    assert found.picture == PictureText(text="<image>\n", line="", first=True)
    messages = [parts_message(["a", None, "b"]), answer_message("c"), parts_message(["d"])]
    assert segments_text(found, messages) == "USER: <image>\na b ASSISTANT: c USER: d ASSISTANT:"


UNFIT = [
    ("contains the date", TURNS + "{{ strftime_now('%Y') }}"),
    ("renders some conversations differently", TURNS.replace("[{{", "[{{ loop.index0 // 5 if loop.index0 > 4 }}{{")),
    ("changes, repeats or drops the text of messages", TURNS.replace("p.text", "p.text | upper")),
    ("changes whitespace at the ends of a text", TURNS.replace("p.text", "p.text | replace('\n', ' ')")),
    ("refuses the conversation: no", TURNS + "{{ raise_exception('no') if messages | length > 5 }}"),
    ("depends on the next message", TURNS + "{{ 'x' if not add_generation_prompt }}"),
]


@pytest.mark.parametrize(("why", "source"), UNFIT)
def test_a_template_that_does_more_has_no_segments(why: str, source: str) -> None:
    with pytest.raises(UnfitError, match=why):
        find_segments(template(source), source)
    found, note = segments_of(template(source), source)
    assert found is None and note is not None and why in note and "already rendered" in note


def test_an_export_writes_segments_or_says_why_not(
    sample_checkpoint: Path, sample_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample_bundle.manifest.chat is not None
    assert not any("Jinja" in note for note in sample_bundle.notes)
    folder = Path(shutil.copytree(sample_checkpoint, tmp_path / "checkpoint"))
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{{ strftime_now('%Y') if false }}")
    assert cli.ivc_export(["--model", str(folder), "--output", str(tmp_path / "bundle"), "--json"]) == 0
    assert "needs Jinja (it contains the date)" in json.loads(capsys.readouterr().out)["warnings"][0]
    assert Bundle.load(tmp_path / "bundle").manifest.chat is None
