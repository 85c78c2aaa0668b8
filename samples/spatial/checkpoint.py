"""The files of Spatial-VL around its weights, in the layout of Qwen2-VL's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ivc_export.families.qwen2_vl import CHAT_TEMPLATE
from samples.spatial.batches import DEVIATION, MEAN, UNIT
from samples.spatial.held_out import MOST_VISUAL
from samples.spatial.language import SPECIAL_TOKENS, TOKEN, word_tokenizer
from samples.spatial.network import CONFIG, Network

STOP = [TOKEN["<|im_end|>"], TOKEN["<|endoftext|>"]]
FILES: dict[str, dict[str, Any]] = {
    "config.json": CONFIG,
    "generation_config.json": {"do_sample": False, "eos_token_id": STOP, "pad_token_id": TOKEN["<|endoftext|>"]},
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 64 * UNIT**2,
        "max_pixels": MOST_VISUAL * UNIT**2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(MEAN),
        "image_std": list(DEVIATION),
        "rescale_factor": 1 / 255,
        "resample": 3,
    },
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "model_max_length": CONFIG["max_position_embeddings"],
    },
}


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write weights, as float16, and everything else that a checkpoint has."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.detach().cpu().half() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load_network(folder: Path) -> Network:
    """The network with a checkpoint's weights, in float32."""
    network = Network(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.float().eval()
