from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ivc_export.bundle.bundle import Bundle
from ivc_export.errors import UserError
from ivc_export.families import of
from ivc_export.families.pictures import Grid
from ivc_export.families.positions import mrope_positions
from ivc_export.families.qwen2_vl import CHAT_TEMPLATE
from ivc_export.runtime.pictures import open_picture
from ivc_export.runtime.processor import Processor, user_message
from tests.conftest import PIXEL_TOLERANCE, SHAPES, patch_positions, rows_first

SIZES = [(448, 336), (28, 28), (30, 200), (1999, 701), (5, 3), (640, 480), (56, 4000)]


def noise(size: tuple[int, int], mode: str = "RGB") -> PIL.Image.Image:
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("max_visual", [1280, 64])
def test_pixels_equal_the_official_processors(
    sample_bundle: Bundle, size: tuple[int, int], max_visual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(size)
    preprocessing = sample_bundle.manifest.preprocessing.model_copy(update={"max_pixels": max_visual * 28 * 28})
    picture = of("qwen2_vl").pictures(preprocessing).picture(image, 503)
    official = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=max_visual * 28 * 28)
    with monkeypatch.context() as patched:
        patched.setattr(PIL.Image.Image, "resize", rows_first)
        wanted = official(image, return_tensors="np")
    _, rows, columns = wanted["image_grid_thw"][0]
    assert picture.grid == Grid(rows // 2, columns // 2)
    assert np.abs(picture.inputs["pixel_values"][0] - wanted["pixel_values"]).max() < PIXEL_TOLERANCE
    np.testing.assert_array_equal(picture.inputs["patch_position"], patch_positions(picture.grid))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    assert open_picture(noise((40, 40), mode)).mode == "RGB"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    noise((60, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (30, 60)


def test_pictures_that_cannot_be(sample_bundle: Bundle, tmp_path: Path) -> None:
    processor = Processor(sample_bundle)
    (tmp_path / "text.png").write_text("not a picture")
    whole = SHAPES.read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name, sentence in (
        ("none.png", "no picture at"),
        ("text.png", "cannot be read as a picture"),
        ("half.png", "cannot be read as a picture"),
    ):
        with pytest.raises(UserError, match=sentence):
            processor.picture(tmp_path / name)
    with pytest.raises(UserError, match="too elongated"):
        processor.picture(noise((2100, 10)))
    long = Bundle(sample_bundle.folder, sample_bundle.manifest.model_copy(update={"max_visual": 40}))
    with pytest.raises(UserError, match="60 visual tokens, but this bundle takes 40 at most"):
        Processor(long).picture(noise((28 * 60, 28)))


def test_the_chat_template_renders_as_transformers_does(sample_bundle: Bundle) -> None:
    turns = [user_message("Where?", 2), {"role": "assistant", "content": "Here."}, user_message("And now?", 0)]
    official = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(f"{sample_bundle.folder}/tokenizer.json")
    )
    for count in (1, 3):
        wanted = official.apply_chat_template(
            turns[:count], chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        assert Processor(sample_bundle).render(turns[:count]) == wanted
        assert "<|image_pad|><|vision_end|>" in wanted


OTHER_TEMPLATE = """\
{% set seen = namespace(n=0) %}
{% for message in messages %}
  {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
Be brief.<|im_end|>
  {% endif %}
<|im_start|>{{ message['role'] }}
  {% if message['content'] is string %}
{{ message['content'] }}<|im_end|>
  {% else %}
    {% for part in message['content'] %}
      {% if part['type'] == 'image' or 'image' in part %}
        {% set seen.n = seen.n + 1 %}
{% if number_pictures %}Picture {{ seen.n }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>
      {% elif 'text' in part %}
{{ part['text'] }}
      {% endif %}
    {% endfor %}
<|im_end|>
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
{% generation %}{{ 'said' }}{% endgeneration %}
{{ bos_token }}{{ {'a': '‹é>'}|tojson }}{{ strftime_now('%Y')|length }}
{{ {'b': 'é', 'a': 1}|tojson(ensure_ascii=True, sort_keys=True) }}{{ ['é']|tojson(ensure_ascii=False) }}
{{ [1, 2]|tojson(indent=2) }}{{ {'a': [1, 2]}|tojson(separators=(',', ':')) }}
{{ tools is none }}{{ documents is defined }}
"""
"""The forms that published templates use: counters, contents as strings and lists, unset names, filters."""


@pytest.mark.parametrize("config", [None, "{}", '{"bos_token": null}', '{"bos_token": {"content": "<s>"}}'])
def test_other_templates_render_as_transformers_does(sample_bundle: Bundle, tmp_path: Path, config: str | None) -> None:
    (tmp_path / "tokenizer.json").write_bytes((sample_bundle.folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(OTHER_TEMPLATE, encoding="utf-8")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    tokens = {"bos_token": "<s>"} if config is not None and "<s>" in config else {}
    official = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(f"{tmp_path}/tokenizer.json"), **tokens
    )
    turns = [user_message("Where?", 2), {"role": "assistant", "content": "Here."}, user_message("And now?", 1)]
    wanted = official.apply_chat_template(
        turns, chat_template=OTHER_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert Processor(Bundle(tmp_path, sample_bundle.manifest)).render(turns) == wanted


def test_training_settings_of_a_tokenizer_do_not_cut_prompts(sample_bundle: Bundle, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(f"{sample_bundle.folder}/tokenizer.json")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("x")
    prompt = "Where is the small red ring?"
    wanted = Processor(sample_bundle).encode(prompt)
    assert Processor(Bundle(tmp_path, sample_bundle.manifest)).encode(prompt) == wanted
    assert len(wanted) > 4


def test_a_conversation_begins_as_the_tokenizer_says(sample_bundle: Bundle, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(f"{sample_bundle.folder}/tokenizer.json")
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $0", special_tokens=[("<|endoftext|>", 505)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    processor = Processor(Bundle(tmp_path, sample_bundle.manifest))
    text = processor.encode("Where?", begin=False)
    assert 505 not in text
    assert processor.encode("Where?") == processor.encode("<|endoftext|>Where?") == [505, *text]


def test_image_tokens_repeat_once_for_each_visual_token(sample_bundle: Bundle) -> None:
    processor = Processor(sample_bundle)
    pictures = [processor.picture(SHAPES), processor.picture(noise((56, 84)))]
    tokens = processor.encode(processor.render([user_message("Where?", 2)]), pictures)
    assert [pictures[0].grid.visual, pictures[1].grid.visual] == [192, 6]
    assert tokens.count(503) == 198
    first = tokens.index(500)
    assert tokens[first : first + 3] == [500, 503, 503]
    assert tokens[first + 193 : first + 195] == [501, 500]
    with pytest.raises(UserError, match="write no image tokens"):
        processor.encode(processor.render([user_message("<|image_pad|>", 0)]))


def test_streamed_pieces_join_to_the_whole_text(sample_bundle: Bundle) -> None:
    processor = Processor(sample_bundle)
    tokens = processor.encode("Größe: 3 µm – “yes” 字")
    assert "".join(processor.stream([*tokens, 507])) == processor.decode([*tokens, 507]) == "Größe: 3 µm – “yes” 字"


def test_positions_equal_transformers(sample_checkpoint: Path) -> None:
    import torch

    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(sample_checkpoint).model
    grids = [Grid(3, 5), Grid(7, 2)]
    ids = torch.tensor([[1, 2, 500, *[503] * 15, 501, 4, 500, *[503] * 14, 501, 9, 9]])
    wanted, delta = model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == 503).int(),
        image_grid_thw=torch.tensor([(1, 2 * g.rows, 2 * g.columns) for g in grids]),
    )
    found, after = mrope_positions([3, grids[0], 3, grids[1], 3], 0)
    np.testing.assert_array_equal(found, wanted[:, 0].numpy())
    assert after == ids.shape[1] + int(delta)
    np.testing.assert_array_equal(mrope_positions([grids[0], 4], 7)[0], mrope_positions([grids[0], 4], 0)[0] + 7)


def test_positions_of_two_frames_equal_transformers_of_a_video(sample_checkpoint: Path) -> None:
    import torch

    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(sample_checkpoint).model
    still, moving = Grid(4, 3), Grid(3, 5, time=2)
    assert (moving.visual, moving.blocks, len(moving.cells)) == (30, [15, 15], 30)
    kinds = torch.tensor([[0, 0, *[2] * moving.visual, 0, *[1] * still.visual, 0, 0, *[2] * moving.visual]])
    video = (2, 2 * moving.rows, 2 * moving.columns)
    wanted, delta = model.get_rope_index(
        torch.ones_like(kinds),
        mm_token_type_ids=kinds,
        image_grid_thw=torch.tensor([(1, 2 * still.rows, 2 * still.columns)]),
        video_grid_thw=torch.tensor([video, video]),
    )
    found, after = mrope_positions([2, moving, 1, still, 2, moving], 0)
    np.testing.assert_array_equal(found, wanted[:, 0].numpy())
    assert after == kinds.shape[1] + int(delta)
    assert np.unique(found[0, 2 : 2 + moving.visual]).tolist() == [2, 3]


def test_damaged_processor_files_say_so(sample_bundle: Bundle, golden_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer.json: .*export again"):
        Processor(golden_bundle)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
        Processor(Bundle(tmp_path, sample_bundle.manifest))
    (tmp_path / "tokenizer.json").write_bytes((sample_bundle.folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"chat_template.jinja or tokenizer_config.json of .* is damaged"):
        Processor(Bundle(tmp_path, sample_bundle.manifest))
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no systems') }}")
    with pytest.raises(UserError, match="refuses the conversation: no systems"):
        Processor(Bundle(tmp_path, sample_bundle.manifest)).render([])
    (tmp_path / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    with pytest.raises(UserError, match="cannot render the conversation"):
        Processor(Bundle(tmp_path, sample_bundle.manifest)).render([])
    for content in ("[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            Processor(Bundle(tmp_path, sample_bundle.manifest))
