"""Checkpoints of true sizes with random weights, for measurements."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from ivc_export import families
from ivc_export.checkpoint.weights import EMBEDDING, PlannedWeights
from ivc_export.dtypes import FloatName
from ivc_export.exporter.graphs import build_graphs
from samples.tiny import TINY

BLOCK = 1 << 24


def qwen2_vl_2b(layers: int = 28, depth: int = 32) -> dict[str, Any]:
    """config.json of Qwen2-VL-2B-Instruct's sizes, 2.2 B parameters, or of fewer layers."""
    tiny = TINY["qwen2_vl"]
    return {
        **tiny,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "vision_config": {
            **tiny["vision_config"],
            "depth": depth,
            "embed_dim": 1280,
            "num_heads": 16,
            "mlp_ratio": 4,
            "hidden_size": 1536,
        },
    }


def make_large_checkpoint(folder: Path, config: dict[str, Any], dtype: FloatName = "bfloat16") -> Path:
    """Write a checkpoint of that configuration, some tensors at a time: noise, scaled for each.

    Each tensor begins elsewhere in the noise: onnxruntime keeps equal weights once. It has no tokenizer: prompts are
    token ids.
    """
    folder.mkdir(parents=True)
    family = families.of(config["model_type"])
    model, weights = family.read(config, None), PlannedWeights()
    build_graphs(model, weights, 1)
    weights.external(EMBEDDING, (model.decoder.vocab_size, model.decoder.hidden_size))
    size, start = np.dtype(dtype).itemsize, 0
    header: dict[str, Any] = {}
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for name, shape in sorted(weights.shapes.items()):
        end = start + size * math.prod(shape)
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": (start, end)}
        start = end
    noise = np.random.default_rng(0).standard_normal(BLOCK + 1009 * len(header), np.float32)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)

    def write(item: tuple[int, tuple[str, tuple[int, ...]]]) -> None:
        number, (name, shape) = item
        if len(shape) > 1:
            scale, shift = math.prod(shape[1:]) ** -0.5, 0.0
        else:
            scale, shift = 0.1, float(not name.endswith("bias"))
        left, begin = math.prod(shape), 1009 * number
        block = noise[begin : begin + min(left, BLOCK)] * np.float32(scale) + np.float32(shift)
        content, place = block.astype(dtype).view(np.uint8), first + header[name]["data_offsets"][0]
        while left:
            count = min(left, BLOCK)
            view = memoryview(content[: count * size].data)
            while len(view):
                written = os.pwrite(file.fileno(), view, place)
                view, place = view[written:], place + written
            left -= count

    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(write, enumerate(sorted(weights.shapes.items()))))
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=2), encoding="utf-8")
    if config["model_type"] == "qwen2_vl":  # its own limits: else pictures are capped at 1,280 visual tokens
        limits = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
        (folder / "preprocessor_config.json").write_text(json.dumps(limits), encoding="utf-8")
    return folder
