"""Training batches: pictures of one size, a dozen questions about each, and what each visual token shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from samples.spatial.language import END, REPLY, SYSTEM, TOKEN, TURN
from samples.spatial.questions import TASKS, Asker, thousandths
from samples.spatial.scenes import CODE_LETTERS, COLORS, PLATE, SHAPES, SIDES, TEXTURES, Scene, draw_scene

UNIT = 28  # pixels of a visual token's side
SLOTS = 320  # text tokens of a picture
SECOND_TURN = 0.2  # of questions follow another about the same picture
WEIGHTS = {"attribute": 0.14, "relation": 0.18, "counting": 0.2, "grounding": 0.2, "pointing": 0.16, "reading": 0.12}
CLASSES = {"shape": len(SHAPES) + 2, "color": len(COLORS), "texture": len(TEXTURES), "size": 2}
LETTERS = 4  # of the longest code
ENOUGH = 0.12  # of a visual token that an object covers, for the token to show it
TRAINING_STREAM = 0
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Batch:
    """B pictures of one grid of visual tokens and their text.

    pixels: uint8 [B, height, width, 3].
    tokens: [B, T].
    branch: [B, T], the conversation of each token: it sees the picture and its own branch alone; -1 is padding.
    offset: [B, T], a token's place in its branch.
    weight: float32 [B, T], of predicting the token behind.
    late: bool [B, T], tokens from their branch's first answer on.
    shown: [B, L, 4 + LETTERS], classes of what each visual token shows; -100 where there is none.
    box: float32 [B, L, 4], the box of what it shows, in fractions of the sides.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    branch: torch.Tensor
    offset: torch.Tensor
    weight: torch.Tensor
    late: torch.Tensor
    shown: torch.Tensor
    box: torch.Tensor


def scene_for_grid(rows: int, columns: int, generator: np.random.Generator) -> Scene:
    """A scene whose picture the image processor would scale to rows x columns visual tokens, before it does."""
    sides = [UNIT * columns, UNIT * rows]
    if generator.random() < 0.5:
        sides = [
            min(max(side + int(n), SIDES[0]), SIDES[1])
            for side, n in zip(sides, generator.integers(-13, 14, 2), strict=True)
        ]
    return draw_scene(generator, *sides)


def converse(scene: Scene, tokenizer: Tokenizer, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Tokens, branches, offsets, weights and lateness of random questions, [5, up to SLOTS]."""
    tokens: list[int] = []
    branches: list[int] = []
    offsets: list[int] = []
    weights: list[float] = []
    late: list[bool] = []
    asker, branch, misses = Asker(scene, generator), 0, 0
    order = [list(WEIGHTS)[i] for i in generator.choice(len(WEIGHTS), 32, p=list(WEIGHTS.values()))]
    while order and misses < 8:
        turns = 2 if generator.random() < SECOND_TURN else 1
        own: list[int] = []
        own_weights: list[float] = []
        prompt = 0
        for turn in range(turns):
            question = TASKS[order.pop()](asker) if order else None
            if question is None:
                break
            asked = tokenizer.encode((TURN if turn else "") + question.text + REPLY, add_special_tokens=False).ids
            answered = tokenizer.encode(question.answer + END, add_special_tokens=False).ids
            prompt = prompt or len(asked)
            own += asked + answered
            own_weights += [0.0] * (len(asked) - 1) + [len(answered) ** -0.5] * len(answered) + [0.0]
        if not own:
            continue
        if len(tokens) + len(own) > SLOTS:
            misses += 4
            continue
        tokens += own
        weights += own_weights
        late += [i >= prompt for i in range(len(own))]
        branches += [branch] * len(own)
        offsets += range(len(own))
        branch += 1
    return np.array([tokens, branches, offsets, weights, late], np.float64)


def label_tokens(scene: Scene, rows: int, columns: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """What each visual token shows, as Batch's `shown` and `box`."""
    shown = np.full((rows * columns, 4 + LETTERS), -100, np.int64)
    shown[:, 0] = CLASSES["shape"] - 1  # the ground
    box = np.zeros((rows * columns, 4), np.float32)
    best = np.full((rows, columns), ENOUGH)
    for item in scene.items:
        scaled = [part / 1000 for part in thousandths(scene, item)]
        across = [
            np.clip(np.minimum(scaled[2 + a] * n, i + 1) - np.maximum(scaled[a] * n, i), 0, 1)
            for a, n, i in ((1, rows, np.arange(rows)), (0, columns, np.arange(columns)))
        ]
        covered = np.outer(*across)
        mine = (covered > best).ravel()
        best = np.maximum(best, covered)
        plate = item.shape == PLATE
        kinds = [
            len(SHAPES) if plate else SHAPES.index(item.shape),
            list(COLORS).index(item.color),
            -100 if plate else TEXTURES.index(item.texture),
            -100 if plate else ("small", "large").index(item.size),
        ]
        letters = [CODE_LETTERS.index(letter) for letter in item.code] + [len(CODE_LETTERS)] * (
            LETTERS - len(item.code)
        )
        shown[mine] = kinds + (letters if plate else [-100] * LETTERS)
        box[mine] = scaled
    return shown, box


class Batches(Dataset[Batch]):
    """Batch number `i` of a seeded, endless stream."""

    def __init__(self, tokenizer: str, size: int, steps: int, seed: int) -> None:
        self.tokenizer, self.size, self.steps, self.seed = Tokenizer.from_str(tokenizer), size, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> Batch:
        generator = np.random.default_rng([self.seed, TRAINING_STREAM, number])
        rows, columns = (int(n) for n in generator.integers(SIDES[0] // UNIT, SIDES[1] // UNIT + 1, 2))
        pixels = np.empty((self.size, rows * UNIT, columns * UNIT, 3), np.uint8)
        tokens = np.zeros((self.size, SLOTS), np.int64)
        branch, offset, weight, late = tokens - 1, tokens.copy(), tokens.astype(np.float32), tokens > 0
        arrays: tuple[npt.NDArray[Any], ...] = (tokens, branch, offset, weight, late)
        labels = []
        for i in range(self.size):
            scene = scene_for_grid(rows, columns, generator)
            size = (columns * UNIT, rows * UNIT)
            pixels[i] = np.asarray(
                scene.picture
                if scene.picture.size == size
                else scene.picture.resize(size, PIL.Image.Resampling.BICUBIC)
            )
            found = converse(scene, self.tokenizer, generator)
            for array, values in zip(arrays, found, strict=True):
                array[i, : len(values)] = values
            labels.append(label_tokens(scene, rows, columns))
        shown, box = (np.stack(parts) for parts in zip(*labels, strict=True))
        return Batch(*map(torch.from_numpy, (pixels, tokens, branch, offset, weight, late, shown, box)))


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids before and after the picture that every conversation shares."""
    return tokenizer.encode(SYSTEM, add_special_tokens=False).ids, [TOKEN["<|vision_end|>"]]


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, height, width, 3] to float32 [B, 3, height, width], as Qwen2-VL's image processor scales it."""
    device = pixels.device
    scaled = (pixels.float() / 255 - torch.tensor(MEAN, device=device)) / torch.tensor(DEVIATION, device=device)
    return scaled.permute(0, 3, 1, 2)
