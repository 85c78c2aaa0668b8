"""Questions that training never sees, and batched greedy answers to them, with or without pruned visual tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from samples.spatial.batches import UNIT, frame, normalise
from samples.spatial.language import END, REPLY, TOKEN, TURN
from samples.spatial.network import Network, text_angles
from samples.spatial.questions import TASKS, Asker, Question, is_correct
from samples.spatial.scenes import draw_scene

STREAMS = {"calibration": 1, "test": 2}  # training draws from stream 0
LONGEST_ANSWER = 22  # tokens: a box takes 18
MOST_VISUAL = 256


@dataclass(frozen=True)
class HeldOutExample:
    """A question about a picture, and a second one about the same picture."""

    picture: PIL.Image.Image
    question: Question
    second: Question

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        width, height = self.picture.size
        return round(height / UNIT), round(width / UNIT)


def held_out(split: str, each: int, seed: int = 0) -> list[HeldOutExample]:
    """`each` questions of every task, in turn; every question has a picture of its own."""
    found = []
    for number in range(each):
        for index, task in enumerate(TASKS):
            for trial in range(1000):
                generator = np.random.default_rng([seed, STREAMS[split], number, index, trial])
                scene = draw_scene(generator)
                asker = Asker(scene, generator)
                question = TASKS[task](asker)
                second = TASKS[list(TASKS)[int(generator.integers(len(TASKS)))]](asker)
                if question and second and second.text != question.text:
                    found.append(HeldOutExample(scene.picture, question, second))
                    break
    return found


@dataclass(frozen=True)
class Score:
    """How many of `total` answers were right."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Fraction of right answers."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        z, n, p = 1.96, self.total, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - half, middle + half


def scores(examples: Sequence[HeldOutExample], answers: Sequence[str], second: bool = False) -> dict[str, Score]:
    """Scores by task, and of all under "all"."""
    right: dict[str, list[bool]] = defaultdict(list)
    for example, answer in zip(examples, answers, strict=True):
        question = example.second if second else example.question
        right[question.task].append(is_correct(question, answer))
    found = {task: Score(sum(right[task]), len(right[task])) for task in TASKS if task in right}
    return found | {"all": Score(sum(map(sum, right.values())), len(examples))}


@dataclass(frozen=True)
class Evidence:
    """What a method may look at when it prunes, for a batch of B pictures with up to 256 visual tokens.

    is_visual: bool [B, 256], slots that hold a visual token; grids: [B, 2]; start: position of the first visual token;
    image: [B, 256, hidden]; values: [B, kv_heads, slots, head_dim] of the layer below the cut (None at layer 0);
    attention: [B, slots], that the prompt's last token pays in that layer, mean over heads; visual: the slots of
    visual tokens; votes: bool [B, slots], text rows that vote.
    """

    is_visual: Tensor
    grids: Tensor
    start: int
    image: Tensor
    values: Tensor | None
    attention: Tensor | None
    visual: slice
    votes: Tensor


@dataclass(frozen=True)
class Pruning:
    """Prune before layer `layer`. `rank` gives each visual token a score, [B, 256]; the best `ratio` of them stay."""

    layer: int
    ratio: float
    rank: Callable[[Evidence], Tensor]

    def keep(self, evidence: Evidence) -> Tensor:
        """Tokens that stay, bool [B, 256]; of equal scores the lower index."""
        score = self.rank(evidence).masked_fill(~evidence.is_visual, -math.inf)
        place = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        counts = [max(1, round(self.ratio * count)) for count in evidence.is_visual.sum(1).tolist()]
        return place < torch.tensor(counts, device=score.device)[:, None]


@dataclass
class State:
    """Caches of a batch: keys and values by layer, [B, kv_heads, slots, head_dim]; which slots later rows see."""

    keys: list[Tensor]
    values: list[Tensor]
    seen: Tensor
    next_position: Tensor


class Answering:
    """Greedy answers to held-out questions; pictures are encoded once."""

    def __init__(self, network: Network, tokenizer: Tokenizer, batch: int = 256) -> None:
        self.network, self.tokenizer, self.batch = network, tokenizer, batch
        self.device = next(network.parameters()).device
        self.before, self.after = frame(tokenizer)

    def score(self, examples: Sequence[HeldOutExample]) -> dict[str, Score]:
        """Scores by task, nothing pruned."""
        return scores(examples, self.answer(examples, self.encode(examples)))

    @torch.no_grad()
    def encode(self, examples: Sequence[HeldOutExample]) -> list[Tensor]:
        """Image embeddings of each picture, [L, hidden]."""
        by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, example in enumerate(examples):
            by_grid[example.grid].append(i)
        found: list[Any] = [None] * len(examples)
        for (rows, columns), members in by_grid.items():
            pixels = np.stack([scale(examples[i].picture, rows, columns) for i in members])
            for i, image in zip(
                members, self.network.visual(normalise(torch.from_numpy(pixels).to(self.device))), strict=True
            ):
                found[i] = image.float()
        return found

    def answer(
        self, examples: Sequence[HeldOutExample], images: Sequence[Tensor], pruning: Pruning | None = None
    ) -> list[str]:
        """Answers to the questions."""
        return self.converse(examples, images, pruning, turns=1)[0]

    @torch.no_grad()
    def converse(
        self, examples: Sequence[HeldOutExample], images: Sequence[Tensor], pruning: Pruning | None, turns: int = 2
    ) -> list[list[str]]:
        """Answers to the questions, and with two turns to the second ones, asked of what the first turn left."""
        found: list[list[str]] = [[] for _ in range(turns)]
        for first in range(0, len(examples), self.batch):
            part = slice(first, first + self.batch)
            questions = [example.question.text + REPLY for example in examples[part]]
            state, hidden = self.prefill(images[part], [e.grid for e in examples[part]], questions, pruning)
            found[0] += self.generate(state, hidden)
            if turns == 2:
                again = [END + TURN + example.second.text + REPLY for example in examples[part]]
                tokens, is_text = self.padded(again)
                found[1] += self.generate(state, self.extend(state, tokens, is_text))
        return found

    def padded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, T] and where they are no padding."""
        ids = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        width = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=self.device)
        return tokens, torch.tensor([[i < len(row) for i in range(width)] for row in ids], device=self.device)

    def prefill(
        self, images: Sequence[Tensor], grids: Sequence[tuple[int, int]], texts: Sequence[str], pruning: Pruning | None
    ) -> tuple[State, Tensor]:
        """Run pictures and questions; returns the caches and the last rows' hidden states [B, hidden]."""
        network, device = self.network, self.device
        size, start = len(images), len(self.before)
        image = torch.stack([F.pad(part, (0, 0, 0, MOST_VISUAL - len(part))) for part in images])
        is_visual = torch.tensor([[i < len(part) for i in range(MOST_VISUAL)] for part in images], device=device)
        text, is_text = self.padded(texts)
        embed = network.model.embed_tokens
        before, after = (torch.tensor(part, device=device).expand(size, -1) for part in (self.before, self.after))
        x = torch.cat([embed(before), image, embed(after), embed(text)], dim=1)
        ones = torch.ones(size, start, dtype=torch.bool, device=device)
        valid = torch.cat([ones, is_visual, ones[:, :1], is_text], dim=1)
        slots = valid.shape[1]
        positions = torch.stack([self.positions(start, grid, text.shape[1]) for grid in grids], dim=1)
        visual = slice(start, start + MOST_VISUAL)
        last = slots - text.shape[1] + is_text.sum(1) - 1
        votes = torch.zeros_like(valid)
        votes[:, start + MOST_VISUAL + 2 :] = is_text[:, 1:]
        causal = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
        visible, seen = (causal & valid[:, None])[:, None], valid
        angles = text_angles(positions, network.config)
        batch = torch.arange(size, device=device)
        state = State([], [], valid, positions[0, batch, last] + 1)
        attention: Tensor | None = None
        for number, layer in enumerate(network.layers):
            if pruning and number == pruning.layer:
                values = state.values[-1] if number else None
                kept = pruning.keep(
                    Evidence(is_visual, torch.tensor(grids), start, image, values, attention, visual, votes)
                )
                seen = valid.clone()
                seen[:, visual] &= kept
                visible = (causal & seen[:, None])[:, None]
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), angles)
            if pruning and number + 1 == pruning.layer:
                group = q.shape[1] // k.shape[1]
                weights = (q[batch, :, last, None] @ k.repeat_interleave(group, 1).mT)[:, :, 0] / q.shape[-1] ** 0.5
                attention = weights.masked_fill(~visible[batch, :, last], -math.inf).softmax(-1).mean(1)
            state.keys.append(k)
            state.values.append(v)
            x = x + layer.self_attn.mix(q, k, v, visible)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        state.seen = seen
        return state, x[batch, last]

    def positions(self, start: int, grid: tuple[int, int], text: int) -> Tensor:
        """M-RoPE positions [3, slots] of a prompt, padding included."""
        rows, columns = grid
        index = torch.arange(MOST_VISUAL)
        visual = torch.stack([torch.zeros_like(index), index // columns, index % columns]) + start
        behind = torch.arange(1 + text) + start + max(rows, columns)
        return torch.cat([torch.arange(start).expand(3, -1), visual, behind.expand(3, -1)], dim=1).to(self.device)

    def extend(self, state: State, tokens: Tensor, is_text: Tensor) -> Tensor:
        """Run more text over the caches; returns the last valid rows' hidden states [B, hidden]."""
        network, rows = self.network, tokens.shape[1]
        positions = state.next_position[:, None] + torch.arange(rows, device=self.device)
        state.next_position = state.next_position + is_text.sum(1)
        causal = torch.ones(rows, rows, dtype=torch.bool, device=self.device).tril() & is_text[:, None]
        visible = torch.cat([state.seen[:, None].expand(-1, rows, -1), causal], dim=2)[:, None]
        state.seen = torch.cat([state.seen, is_text], dim=1)
        angles = text_angles(positions.expand(3, -1, -1), network.config)
        x = network.model.embed_tokens(tokens)
        for number, layer in enumerate(network.layers):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), angles)
            state.keys[number] = torch.cat([state.keys[number], k], dim=2)
            state.values[number] = torch.cat([state.values[number], v], dim=2)
            x = x + layer.self_attn.mix(q, state.keys[number], state.values[number], visible)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last = (is_text.sum(1) - 1).clamp(min=0)
        return torch.take_along_dim(x, last[:, None, None], dim=1)[:, 0]

    def generate(self, state: State, hidden: Tensor) -> list[str]:
        """Greedy answers, special tokens left out. The token that ends an answer is not run."""
        ended = torch.zeros(len(hidden), dtype=torch.bool, device=self.device)
        drawn = []
        for _ in range(LONGEST_ANSWER):
            token = self.network.logits(self.network.model.norm(hidden)).argmax(-1)
            ended |= token == TOKEN[END]
            drawn.append(token.masked_fill(ended, TOKEN[END]))
            if bool(ended.all()):
                break
            hidden = self.extend(state, token[:, None], ~ended[:, None])
        rows = torch.stack(drawn, dim=1).tolist()
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def scale(picture: PIL.Image.Image, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels of a picture scaled to rows x columns visual tokens as a bundle does it: rows of pixels first."""
    bicubic, width, height = PIL.Image.Resampling.BICUBIC, columns * UNIT, rows * UNIT
    return np.array(picture.resize((width, picture.height), bicubic).resize((width, height), bicubic))
