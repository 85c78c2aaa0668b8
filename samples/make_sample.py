"""Make the sample: a tiny Qwen2-VL checkpoint with seeded random weights, and the picture that goes with it.

    python -m samples.make_sample FOLDER

The model is untrained, so its answers are noise; its files are what a real checkpoint's are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, which safetensors writes)
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ivc_export import families
from ivc_export.checkpoint.weights import EMBEDDING, PlannedWeights
from ivc_export.dtypes import FloatName
from ivc_export.exporter.graphs import build_graphs
from samples.tiny import TINY, TOKENS

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>")
TEXT = (
    "What is in the picture? Where is the small red ring? How many blue squares are there? Is the circle left of the "
    "triangle? Read the code. Describe the scene. Point to the largest shape. Which colour is it? Yes or no? "
    "You are a helpful assistant. There are three green triangles above the yellow star, and one orange cross below it."
)


def random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Seeded weights for a configuration, scaled so that activations neither vanish nor explode."""
    family = families.of(config["model_type"])
    model, weights = family.read(config, None), PlannedWeights()
    build_graphs(model, weights, 1)
    weights.external(EMBEDDING, (model.decoder.vocab_size, model.decoder.hidden_size))
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(weights.shapes.items()):
        noise = generator.standard_normal(shape, np.float32)
        if len(shape) > 1:
            tensors[name] = noise * np.float32(np.prod(shape[1:]) ** -0.5)
        else:
            tensors[name] = noise * np.float32(0.1) + np.float32(not name.endswith("bias"))
    parts = [stack.split(tensors.pop(stack.name)) for stack in model.stacks]
    return tensors | {name: part for one in parts for name, part in one.items()}


def make_tokenizer(special: Mapping[int, str]) -> Tokenizer:
    """A byte-level BPE tokenizer with `special` tokens at the ids that the tiny configuration says."""
    first = min(special)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=first, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fillers = [f"<|unused_{i}|>" for i in range(tokenizer.get_vocab_size(), first)]
    tokens = [*fillers, *(special[i] for i in sorted(special))]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def make_checkpoint(
    folder: Path, config: Mapping[str, Any] | None = None, dtype: FloatName = "float32", seed: int = 0
) -> Path:
    """Write a checkpoint in transformers 4.4x's layout, with tokenizer and processor files, and return its folder."""
    config = dict(config or TINY["qwen2_vl"]) | {"torch_dtype": dtype}
    family = families.of(config["model_type"])
    folder.mkdir(parents=True, exist_ok=True)
    arrays = random_tensors(config, seed)
    tensors = {family.stored_name(name): array.astype(dtype) for name, array in arrays.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(TOKENS[family.model_type]).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(family.chat_template, encoding="utf-8")
    stop = sorted((i for i, token in TOKENS[family.model_type].items() if token in STOP_TOKENS), reverse=True)
    for name, content in {
        "config.json": config,
        "generation_config.json": {"eos_token_id": stop},
        "preprocessor_config.json": {"resample": 3},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def draw_shapes() -> PIL.Image.Image:
    """A few shapes on a shaded ground, 448 x 336."""
    ground = np.linspace(232, 200, 336)[:, None, None] * np.array([1.0, 0.98, 0.94])
    image = PIL.Image.fromarray(np.broadcast_to(ground, (336, 448, 3)).astype(np.uint8))
    draw = PIL.ImageDraw.Draw(image)
    draw.rectangle((40, 60, 150, 170), fill=(38, 84, 168))
    draw.ellipse((210, 40, 330, 160), outline=(200, 40, 44), width=18)
    draw.polygon(((330, 290), (420, 290), (375, 200)), fill=(44, 140, 80))
    draw.ellipse((80, 220, 150, 290), fill=(236, 180, 40))
    draw.line((190, 300, 290, 220), fill=(90, 60, 130), width=14)
    return image


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(make_checkpoint(Path(sys.argv[1])))
