"""Settings that change the result are obeyed, and have the defaults of transformers' classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import transformers
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLConfig, InternVLVisionConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig, Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from ivc_export import families
from ivc_export.contract.names import MOST_VISUAL
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families import internvl, llava, patch_settings, qwen2_5_vl, qwen2_vl, qwen3_vl, text_models
from ivc_export.families.settings import Settings, square
from ivc_export.verify.parity import check
from samples.make_sample import make_checkpoint
from samples.tiny import TINY
from tests.conftest import PIXEL_TOLERANCE, rows_first
from tests.families.family_cases import changed
from tools.families_doc import CONFIGS

# what is left out

CLASSES: list[tuple[type[Settings], Any]] = [
    (qwen2_vl.Whole, Qwen2VLConfig),
    (qwen2_vl.Text, Qwen2VLTextConfig),
    (qwen2_vl.Vision, Qwen2VLVisionConfig),
    (qwen2_vl.Whole, Qwen2_5_VLConfig),
    (qwen2_vl.Text, Qwen2_5_VLTextConfig),
    (qwen2_5_vl.Vision, Qwen2_5_VLVisionConfig),
    (qwen2_vl.Whole, Qwen3VLConfig),
    (qwen3_vl.Text, Qwen3VLTextConfig),
    (qwen3_vl.Vision, Qwen3VLVisionConfig),
    (llava.Whole, LlavaConfig),
    (llava.Vision, CLIPVisionConfig),
    (internvl.Whole, InternVLConfig),
    (internvl.Vision, InternVLVisionConfig),
    (text_models.LlamaText, LlamaConfig),
    (text_models.Qwen2Text, Qwen2Config),
    (text_models.Qwen3Text, Qwen3Config),
]
PROCESSORS: list[tuple[type[Settings], Any]] = [
    (patch_settings.Pictures, Qwen2VLImageProcessorPil),
    (llava.Pictures, CLIPImageProcessorPil),
    (llava.Pictures, LlavaImageProcessorPil),
    (internvl.Pictures, GotOcr2ImageProcessorPil),
]
BESIDE = {"model_type", "rope_theta", "rope_scaling", "partial_rotary_factor", "head_dim", "tie_word_embeddings"}
"""Keys of tables that a class may have no field for: it takes them as other arguments."""
OTHERS = {
    *("initializer_range", "initializer_factor", "layer_scale_init_value"),  # of training
    *("attention_dropout", "hidden_dropout_prob", "projection_dropout"),
    *("use_cache", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("text_config", "vision_config"),  # which have tables of their own
    *("video_token_id", "tokens_per_second"),  # of videos
    *("projection_dim", "use_mask_token"),  # of parts that are not run
    "image_seq_length",  # follows from the sizes
}
"""Fields of classes that change no answer about a picture."""
CALLS = {
    *("data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "image_seq_length"),
    "pad_size",  # of do_pad
}
"""What image processors take that says how they are called."""
UNUSED = {"do_center_crop", "crop_size", "do_pad", "default_to_square"}
"""What an image processor that overrides the steps may leave unused; see test_unused_keys_change_no_pixels."""
CROPS = {"crop_to_patches"}


def names(pairs: list[tuple[type[Settings], Any]]) -> list[str]:
    return [kind.__name__ for _, kind in pairs]


def plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(("table", "kind"), CLASSES, ids=names(CLASSES))
def test_defaults_of_config_are_the_classes(table: type[Settings], kind: Any) -> None:
    base = transformers.PreTrainedConfig.__dataclass_fields__
    fields = {
        name: field
        for name, field in kind.__dataclass_fields__.items()
        if name not in base or name in table.model_fields
    }
    assert {*table.model_fields} <= {*fields, *BESIDE}
    assert {*fields} - {*base} - {*table.model_fields} <= OTHERS, "keys that no table names"
    for name, field in table.model_fields.items():
        if name in fields and name != "model_type":
            stock = fields[name].default
            wanted = square(stock) if name in ("image_size", "patch_size") else plain(stock)
            assert field.default == wanted, name
    if "model_type" in table.model_fields:
        assert table.model_fields["model_type"].default == kind.model_type
    if issubclass(table, text_models.DecoderSettings):
        assert table.default_theta == kind.default_theta


def test_what_stands_in_no_class_is_as_the_models_have_it() -> None:
    assert qwen2_vl.MRope().mrope_section == tuple(Qwen2VLRotaryEmbedding(Qwen2VLTextConfig()).mrope_section)
    assert qwen3_vl.MRope().mrope_section == tuple(Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig()).mrope_section)
    assert Qwen3VLVisionConfig().rope_parameters["rope_theta"] == patch_settings.VISION_THETA
    assert Qwen2VLVisionConfig().rope_parameters["rope_theta"] == patch_settings.VISION_THETA
    stock = LlavaConfig().vision_config
    assert {key: getattr(stock, key) for key in llava.VISION} == llava.VISION


@pytest.mark.parametrize(("table", "kind"), PROCESSORS, ids=names(PROCESSORS))
def test_defaults_of_pictures_are_the_classes(table: type[Settings], kind: Any) -> None:
    keys = {*kind.valid_kwargs.__annotations__}
    assert keys - {*table.model_fields} <= CALLS | UNUSED | CROPS, "keys that no table names"
    stock = kind()
    for name, field in table.model_fields.items():
        wanted = getattr(stock, name, None)
        if field.default is not None and wanted is not None:  # where the table has None, the encoder's size is taken
            assert field.default == (dict(wanted) if name == "size" else plain(wanted)), name


def without_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the keys that equal the classes' defaults, of the parts too, as older versions saved it."""
    stock = AutoConfig.for_model(config["model_type"]).to_dict()
    for part in ("text_config", "vision_config"):
        if part in config:
            stock[part] = AutoConfig.for_model(stock[part]["model_type"]).to_dict()
    flat = {**stock["text_config"], **stock} if "text_config" not in config else stock

    def kept(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value, defaults[key]) if isinstance(value, dict) and key.endswith("_config") else value
            for key, value in given.items()
            if key in ("model_type", "rope_scaling") or key not in defaults or defaults[key] != value
        }

    return kept(config, flat)


PUBLISHED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(CONFIGS.glob("*.json"))}
STOCK = [name for name, config in PUBLISHED.items() if families.of(config["model_type"]).stock_layout is None]


@pytest.mark.parametrize("alias", STOCK)
def test_published_configurations_need_no_defaults(alias: str) -> None:
    config = PUBLISHED[alias]
    family = families.of(config["model_type"])
    short = without_defaults(config)
    assert len(json.dumps(short)) < len(json.dumps(config))
    assert family.read(short, None) == family.read(config, None)


def test_a_quantised_checkpoints_configuration_is_read() -> None:
    """As published with AWQ weights: of vision_config only what differs from the class's defaults."""
    short = {
        "hidden_size": 1280,
        "in_chans": 3,
        "model_type": "qwen2_5_vl",
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
    }
    config = PUBLISHED["qwen2.5-vl-7b"]
    family = families.of("qwen2_5_vl")
    assert family.read({**config, "vision_config": short}, None) == family.read(config, None)
    stock = Qwen2_5_VLConfig(**{**config, "vision_config": short}).vision_config
    encoder = family.read({**config, "vision_config": short}, None).encoder
    assert isinstance(encoder, qwen2_5_vl.WindowEncoder)
    assert (encoder.sizes.depth, encoder.sizes.heads, encoder.sizes.mlp_size) == (
        stock.depth,
        stock.num_heads,
        stock.intermediate_size,
    )


@pytest.mark.parametrize(
    ("name", "epsilon"),
    [("qwen2_vl", 1e-5), ("qwen2_5_vl", 1e-5), ("qwen3_vl", 1e-6), ("llava", 1e-6), ("internvl", 1e-6)],
)
def test_norms_have_their_classes_epsilon(name: str, epsilon: float) -> None:
    config = json.loads(json.dumps(TINY[name]))
    (config.get("text_config") or config).pop("rms_norm_eps")
    text = AutoConfig.for_model(
        name, **{key: value for key, value in config.items() if key != "model_type"}
    ).text_config
    assert families.of(name).read(config, None).decoder.rms_norm_epsilon == text.rms_norm_eps == epsilon


OBEYED: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_vl", {"rms_norm_eps": 0.1, "rope_theta": 50.0, "hidden_act": "swish", "vision_config": {"mlp_ratio": 3}}),
    ("qwen2_vl", {"rope_scaling": None, "rope_parameters": {"rope_theta": 9.0, "mrope_section": [4, 2, 2]}}),
    ("qwen2_5_vl", {"num_key_value_heads": 4, "vision_config": {"window_size": 56, "fullatt_block_indexes": []}}),
    ("qwen3_vl", {"tie_word_embeddings": True, "vision_config": {"num_position_embeddings": 400}}),
    ("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": [1, 3]}, "text_config": {"rope_theta": 50.0}}),
    ("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": [], "spatial_merge_size": 1, "patch_size": 32}}),
    ("llava", {"text_config": {"num_key_value_heads": None, "head_dim": 32}, "multimodal_projector_bias": False}),
    ("llava", {"vision_config": {"hidden_act": "gelu", "layer_norm_eps": 0.1}, "vision_feature_layer": 1}),
    ("internvl", {"text_config": {"model_type": "llama"}, "vision_config": {"attention_bias": False}}),
    ("internvl", {"vision_config": {"layer_norm_eps": 0.1, "image_size": 112, "patch_size": 14}}),
]


@pytest.mark.parametrize(("name", "changes"), OBEYED, ids=[f"{name} {changes}" for name, changes in OBEYED])
def test_keys_that_are_obeyed_equal_pytorch(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", changed(name, changes))
    bundle = export(ExportRecipe(checkpoint, tmp_path / "b", max_visual=400))
    report = check(bundle, checkpoint, steps=1)
    assert report.passed, [comparison for comparison in report.comparisons if not comparison.passed]


# what pictures become

TYPES = {
    "qwen2_vl": "Qwen2VLImageProcessor",
    "qwen3_vl": "Qwen2VLImageProcessorFast",
    "llava": "CLIPImageProcessor",
    "internvl": "GotOcr2ImageProcessorFast",
}
SIDE: dict[str, dict[str, Any]] = {
    "qwen2_vl": {},
    "qwen3_vl": {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2},
    "llava": {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}},
    "internvl": {"size": {"height": 112, "width": 112}},
}
EVERY: list[dict[str, Any]] = [
    {},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_rescale": False, "image_mean": [120.0, 110.5, 90.0], "image_std": [58.5, 57.0, 60.25]},
    {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 0.5},
    {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.1, 0.2, 0.3], "do_convert_rgb": True, "do_resize": True},
    {"image_mean": None, "image_std": None, "do_normalize": None, "data_format": "channels_first"},
    {"do_rescale": None, "rescale_factor": None},
    *({"resample": resample} for resample in range(6)),
]
PICTURES: list[tuple[str, dict[str, Any]]] = [
    *((name, settings) for name in TYPES if name != "qwen3_vl" for settings in EVERY),
    (
        "qwen3_vl",
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "image_mean": 3 * [0.5], "image_std": 0.5},
    ),
    ("qwen3_vl", {"size": {"longest_edge": 1024 * 40, "shortest_edge": 1024}}),
    ("qwen2_vl", {"size": {"shortest_edge": 784 * 16, "longest_edge": 784 * 64}}),
    ("qwen2_vl", {"min_pixels": 784 * 200, "max_pixels": 784 * 300}),
    ("qwen2_vl", {"size": {"shortest_edge": 3136, "longest_edge": 1003520}, "max_pixels": 784 * 40}),
    ("qwen2_vl", {"size": {"min_pixels": 3136, "max_pixels": 9}, "min_pixels": 784, "max_pixels": 784 * 40}),
    ("qwen2_vl", {"size": None, "min_pixels": None, "max_pixels": None}),
    ("qwen2_vl", {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}),
    ("llava", {"size": 112, "crop_size": 112}),
    ("llava", {"image_processor_type": "LlavaImageProcessorFast", "do_pad": False}),
    ("internvl", {"size": 112}),
    ("internvl", {"size": [112, 112]}),
    ("internvl", {"min_patches": 2, "max_patches": 6}),
    ("internvl", {"max_patches": 1}),
]


CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SWITCHES = dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True) | {"resample": 3}
FILES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2-vl-2b", {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, **CLIP}),
    (
        "qwen2.5-vl-7b",
        {
            **SWITCHES,
            **CLIP,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "crop_size": None,
            "do_center_crop": None,
            "default_to_square": True,
            "device": None,
            "data_format": "channels_first",
            "merge_size": 2,
            "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        },
    ),
    (
        "qwen3-vl-4b",
        {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
    ),
    (
        "llava-1.5-7b",
        {
            **SWITCHES,
            **CLIP,
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": True,
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
        },
    ),
    (
        "internvl3-1b",
        {
            **SWITCHES,
            **IMAGENET,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "crop_size": None,
            "do_center_crop": None,
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 12,
            "return_tensors": None,
            "default_to_square": True,
            "size": {"height": 448, "width": 448},
        },
    ),
    (
        "internvl2.5-8b",
        {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "crop_size": 448,
            "do_center_crop": True,
            "size": 448,
            "do_normalize": True,
            "do_resize": True,
            "resample": 3,
            **IMAGENET,
        },
    ),
]
"""The forms that files of published checkpoints have."""


@pytest.mark.parametrize(("alias", "processor"), FILES, ids=[alias for alias, _ in FILES])
def test_files_of_published_checkpoints_are_taken(alias: str, processor: dict[str, Any]) -> None:
    config = PUBLISHED[alias]
    preprocessing = families.of(config["model_type"]).read(config, processor).preprocessing
    assert (list(preprocessing.mean), list(preprocessing.std)) == (processor["image_mean"], processor["image_std"])
    if preprocessing.kind == "patches":
        assert preprocessing.max_pixels == MOST_VISUAL * preprocessing.token_side**2


def noise(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def settings_of(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {"image_processor_type": TYPES[name], **SIDE[name], **changes}


def stock_pixels(
    folder: Path, name: str, processor: Mapping[str, Any], image: PIL.Image.Image, patch: pytest.MonkeyPatch
) -> npt.NDArray[np.float32]:
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    stock = AutoImageProcessor.from_pretrained(folder, backend="pil")
    call = {"crop_to_patches": True} if name == "internvl" else {}  # as InternVLProcessor calls it
    with patch.context() as patched:
        patched.setattr(PIL.Image.Image, "resize", rows_first)
        return np.asarray(stock(image, return_tensors="np", **call)["pixel_values"])


def own_pixels(name: str, processor: Mapping[str, Any], image: PIL.Image.Image) -> npt.NDArray[np.float32]:
    pictures = families.of(name).read(TINY[name], processor).encoder.pictures
    return np.asarray(pictures.stock_inputs(pictures.picture(image, 0))["pixel_values"])


@pytest.mark.parametrize(("name", "changes"), PICTURES, ids=[f"{name} {changes}" for name, changes in PICTURES])
def test_pictures_become_what_the_image_processors_make(
    name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = settings_of(name, changes)
    for image in (noise(250, 170), noise(90, 400)):
        wanted = stock_pixels(tmp_path, name, processor, image, monkeypatch)
        found = own_pixels(name, processor, image)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=PIXEL_TOLERANCE)


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_unused_keys_change_no_pixels(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, processor = noise(250, 170), settings_of(name, {})
    unused = {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}, "do_pad": True}
    plain = stock_pixels(tmp_path, name, processor, image, monkeypatch)
    np.testing.assert_array_equal(stock_pixels(tmp_path, name, {**processor, **unused}, image, monkeypatch), plain)
    np.testing.assert_array_equal(own_pixels(name, {**processor, **unused}, image), own_pixels(name, processor, image))
