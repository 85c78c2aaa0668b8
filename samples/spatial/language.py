"""The tokenizer and the chat form that Spatial-VL is trained with: Qwen's, with a small vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from samples.spatial.questions import TASKS, Asker
from samples.spatial.scenes import draw_scene

VOCABULARY = 512
SPECIAL_TOKENS = (  # the last ids, in Qwen's order
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TOKEN = {token: VOCABULARY - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
TURN = "\n<|im_start|>user\n"
REPLY = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def sentences(scenes: int = 400) -> Iterable[str]:
    """Text to find the vocabulary from: questions and answers without the codes, which stay letters."""
    generator = np.random.default_rng(1)
    yield from ["You are a helpful assistant.", "system", "user", "assistant"] * 100
    for _ in range(scenes):
        asker = Asker(draw_scene(generator), generator)
        for task, ask in TASKS.items():
            if question := ask(asker):
                yield question.text
                if task != "reading":
                    yield question.answer


def word_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of 512 tokens, split into words and single digits much as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = VOCABULARY - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=text, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2
    )
    tokenizer.train_from_iterator(
        (line.replace("<|box_start|>", "").replace("<|box_end|>", "") for line in sentences()), trainer
    )
    fillers = [f"<|unused_{i}|>" for i in range(tokenizer.get_vocab_size(), text)]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*fillers, *SPECIAL_TOKENS)])
    return tokenizer
