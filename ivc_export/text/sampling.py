"""Draws the next token from logits, and reads the settings for it from a checkpoint's generation_config.json."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.errors import UserError
from ivc_export.files import read_object

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    At temperature 0 the best token is taken. Otherwise the token is drawn at random: first only the `top_k` best tokens
    are left, and of these the smallest set with probability `top_p`.

    Attributes:
        temperature: logits are divided by it. 0 takes the best token.
        top_p: probability of the smallest set to draw from, above 0 and up to 1.
        seed: the seed of the conversation's random draws.
        max_tokens: the most tokens of an answer.
        top_k: how many of the best tokens to draw from. 0 takes all.
        repetition_penalty: for tokens of the prompt and the answer, positive logits are divided by it and negative ones
            multiplied. 1 changes nothing. It applies at temperature 0 too.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} is out of range: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is out of range: give a probability mass above 0 and up to 1")
        if self.max_tokens < 1:
            raise UserError(f"max tokens {self.max_tokens} is out of range: give at least 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is out of range: give 0 or more")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is out of range: give 0 (all tokens) or more")
        if not 1e-3 <= self.repetition_penalty <= 1e3:  # otherwise logits leave float64's range
            raise UserError(
                f"repetition penalty {self.repetition_penalty} is out of range: give 0.001 to 1000, such as 1.05; 1 "
                "means none"
            )

    @property
    def takes_best(self) -> bool:
        """Whether the best token of the model's logits is taken, without a penalty for repetition."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def scores(self, logits: npt.NDArray[np.float32], seen: Iterable[int] = ()) -> npt.NDArray[np.float64]:
        """Logits of the distribution to draw from, float64 [vocab]. They are -inf for tokens that are not drawn.

        Source: the logits processors of transformers' generate, in its order.

        Args:
            logits: the model's logits, float32 [vocab].
            seen: token ids of the prompt and of the answer so far.
        """
        scores: npt.NDArray[np.float64] = logits.astype(np.float64)
        if self.repetition_penalty != 1:
            ids = np.array(sorted(set(seen)), np.int64)
            found = scores[ids]
            scores[ids] = np.where(found < 0, found * self.repetition_penalty, found / self.repetition_penalty)
        if self.temperature == 0:
            return scores
        with np.errstate(over="ignore"):  # at a tiny temperature all but the best are at -inf
            scores = (scores - scores.max()) / self.temperature
        if 0 < self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        if self.top_p < 1:
            order = np.argsort(scores, kind="stable")
            worse = np.cumsum(softmax(scores[order])) <= 1 - self.top_p
            scores[order[:-1][worse[:-1]]] = -np.inf
        return scores


GREEDY = Sampling()


class Sampler:
    """The draws of one conversation: its random generator, and the ids that it has read and drawn."""

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        self.sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)
        self._seen: set[int] = set()

    def read(self, tokens: Iterable[int]) -> None:
        """Remember ids that the model has read."""
        self._seen.update(int(token) for token in tokens)

    def take(self, token: int) -> int:
        """Remember a token that was chosen elsewhere, and return it."""
        self._seen.add(token)
        return token

    def draw(self, logits: npt.NDArray[np.float32]) -> int:
        """Draw the next token id. logits: [vocab]."""
        scores = self.sampling.scores(logits, self._seen)
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            token = int(self._generator.choice(len(scores), p=softmax(scores)))
        self._seen.add(token)
        return token


def softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probabilities of these logits, float64 [n]."""
    powers = np.exp(scores - scores.max())
    found: npt.NDArray[np.float64] = powers / powers.sum()
    return found


DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""Keys of generation_config.json that matter if do_sample is true, with transformers' values for missing keys."""

UNKNOWN: dict[str, tuple[Any, ...]] = {  # unsupported keys that change answers, with values that do not
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_p", "penalty_alpha"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "top_h"), ()),
    **dict.fromkeys(("dola_layers", "watermarking_config", "force_words_ids", "constraints"), ()),
    "guidance_scale": (1,),
}


def stored_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of generation_config.json beyond taking the best token, by Sampling's names, or by their own."""
    found: dict[str, Any] = {}
    if config.get("do_sample"):
        found |= {key: default if config.get(key) is None else config[key] for key, default in DRAWN.items()}
    if config.get("repetition_penalty") not in (None, 1):
        found["repetition_penalty"] = config["repetition_penalty"]
    return found | {key: config[key] for key, none in UNKNOWN.items() if config.get(key) not in (None, *none)}


def stored_sampling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of generation_config.json, by Sampling's names.

    Raises:
        UserError: a setting is not supported, or a value has another type.
    """
    found = stored_settings(config)
    for key, value in found.items():
        if key in UNKNOWN:
            raise UserError(
                f"{GENERATION_CONFIG} sets {key} to {value!r}, which this version does not support: give "
                "--sampling greedy"
            )
        kinds = (int,) if key == "top_k" else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(
                f"{GENERATION_CONFIG} sets {key} to {value!r}, which is not a number: give --sampling greedy"
            )
    return found


def checkpoint_sampling(folder: Path, **chosen: Any) -> Sampling:
    """The sampling of a checkpoint's or bundle's generation_config.json. Values in `chosen`, by Sampling's names,
    replace it.

    Raises:
        UserError: the file is missing or damaged, or a setting is not supported.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        raise UserError(f"{path} is missing, so the checkpoint's sampling is not known: give --sampling greedy")
    return Sampling(**stored_sampling(read_object(path, "export the model again")) | chosen)


def greedy_note(config: Mapping[str, Any], chosen: Container[str] = ()) -> str | None:
    """A sentence about settings of generation_config.json that greedy answers ignore. None if there are none.

    chosen: names of settings that the user gave.
    """
    left = {key: value for key, value in stored_settings(config).items() if key not in chosen}
    if left.get("top_k") == 1:  # with which nothing is random
        left = {key: value for key, value in left.items() if key not in DRAWN}
    if not left:
        return None
    asked = ", ".join(f"{key} {value}" for key, value in left.items())
    return (
        f"{GENERATION_CONFIG} sets {asked}, but answers are greedy: ivc-run --sampling checkpoint uses these settings"
    )
