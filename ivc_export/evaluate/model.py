"""A bundle as a model of lmms-eval: lmms-eval --model ivc --model_args bundle=FOLDER,ratio=0.5."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import tell
from ivc_export.errors import UserError
from ivc_export.report.overlay import count_kinds
from ivc_export.runtime.backends import DEFAULT, find_backend, open_session
from ivc_export.runtime.chat import Chat
from ivc_export.runtime.interface import Picture
from ivc_export.runtime.processor import Look
from ivc_export.runtime.videos import Video
from ivc_export.selection.method import Method
from ivc_export.text.sampling import Sampling
from ivc_export.text.stops import StopTexts
from ivc_export.text.template import Message, answer_message, parts_message

LONGEST = 1024
"""Tokens of an answer, if a task names no number."""


class BundleModel(lmms):  # type: ignore[misc]
    """Answers questions about pictures and videos, one at a time.

    bundle: its folder. ratio, method, method_seed: see Session.converse. max_frames: of a video; None leaves this to
    the model's settings. options: the backend's; see open_session.

    Raises:
        UserError: the bundle cannot be opened in this way, or lmms-eval wants something that is not supported.
    """

    is_simple = False  # messages keep the order of pictures and texts

    def __init__(
        self,
        bundle: str | Path,
        backend: str = DEFAULT,
        ratio: float | None = None,
        method: str | None = None,
        method_seed: int = 0,
        max_frames: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        record = find_backend(backend)
        if str(batch_size or 1) != "1" or max_batch_size not in (None, 1):
            raise UserError(
                "ivc answers one question at a time: leave out --batch_size, and start several processes instead"
            )
        if device is not None:
            raise UserError(
                "--device does not apply to ivc, because the backend decides where it computes: leave out "
                "--device and give backend=NAME in --model_args"
            )
        if record.device == "cuda" and "," in gpus_in_sight(os.environ):
            raise UserError(
                "several processes would share one GPU: start them with torchrun -m ivc_export.evaluate instead "
                "of lmms-eval"
            )
        check_model_args(ratio=ratio, method_seed=method_seed, max_frames=max_frames)
        check_model_args(**{name: options[name] for name in ("threads", "accuracy_level") if name in options})
        libraries = {name: Path(value) if name in record.libraries else value for name, value in options.items()}
        self.session = open_session(Bundle.load(Path(bundle)), backend, **libraries)
        self.ratio = ratio
        self.method = None if method is None else Method(method, method_seed)
        self.max_frames = max_frames
        self.visual = self.kept = 0
        """Visual tokens of the answers so far, and how many of them were kept."""
        self.processor = Chat(self.session, ratio, method=self.method).processor
        self.accelerator = Accelerator()
        self.device = self.accelerator.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> BundleModel:
        """The model of a command line."""
        try:
            model: BundleModel = super().create_from_arg_string(arg_string, additional_config)
            return model
        except UserError as error:
            give_up(error)
        except TypeError as error:
            if "bundle" in str(error):
                give_up(UserError("no bundle was given: add bundle=FOLDER to --model_args"))
            raise

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request."""
        try:
            with tqdm(requests, desc="ivc", disable=self.rank != 0) as bar:
                found = [self._answer(number, request) for number, request in enumerate(bar)]
        except UserError as error:
            give_up(error)
        logger.info(f"{self.session.backend}: kept {self.kept:,} of {self.visual:,} visual tokens so far")
        return found

    def _answer(self, number: int, request: Any) -> Any:
        """The answer to the `number`-th request.

        Raises:
            UserError: it cannot be answered.
        """
        _, ask, settings, document, task, split = request.args
        try:
            messages, pictures = self._read(ask(self.task_dict[task][split][document]))
            chat = Chat(self.session, self.ratio, sampling=sampling(settings, number), method=self.method)
            with closing(chat.answer(messages, pictures)) as pieces:  # type: ignore[type-var]
                text = "".join(StopTexts(pieces, stops(settings)))
        except UserError as error:
            raise UserError(f"question {document} of {task}: {error}") from error
        assert chat.step is not None
        counts = count_kinds(chat.step)
        self.visual += sum(counts.values())
        self.kept += sum(counts.values()) - counts["pruned"]
        return GenerationResult(text, TokenCounts(chat.step.run.rows, len(chat.tokens)))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse."""
        give_up(UserError("ivc does not support tasks of several rounds: leave them out of --tasks"))

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse."""
        give_up(UserError("ivc gives answers, not likelihoods: choose tasks of output_type generate_until"))

    def _read(self, told: Iterable[Mapping[str, Any]]) -> tuple[list[Message], list[Picture]]:
        """A conversation of a task, in the form of chat templates, and its pictures."""
        messages, pictures = list[Message](), list[Picture]()
        for message in told:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if message["role"] == "user":
                shown = [part["text"] if part["type"] == "text" else self._look(part, pictures) for part in parts]
                messages.append(parts_message(shown))
                continue
            text = "".join(part["text"] for part in parts)
            system = message["role"] == "system"
            messages.append(self.processor.system_message(text) if system else answer_message(text))
        return messages, pictures

    def _look(self, part: Mapping[str, Any], pictures: list[Picture]) -> Look:
        kind, medium = part["type"], part["url"]
        if kind not in ("image", "video"):
            raise UserError(f"ivc supports pictures and videos, not {kind}: leave this task out of --tasks")
        if isinstance(medium, str):
            medium = Path(medium)
        look, visuals = self.processor.look(Video(medium, max_frames=self.max_frames) if kind == "video" else medium)
        pictures += visuals
        return look


def check_model_args(**given: object) -> None:
    """Check values of --model_args: `ratio` must be a number, others whole numbers. None means not given.

    Raises:
        UserError: a value has another type.
    """
    for name, value in given.items():
        kind, words = (Real, "number") if name == "ratio" else (Integral, "whole number")
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise UserError(f"{name}={value} is not a {words}: give a {words} in --model_args")


def gpus_in_sight(environment: Mapping[str, str]) -> str:
    """The GPUs that this process sees beside other processes: all, unless the environment says otherwise."""
    return environment.get("CUDA_VISIBLE_DEVICES", "0,...") if int(environment.get("LOCAL_WORLD_SIZE", 1)) > 1 else "0"


def stops(settings: Mapping[str, Any]) -> list[str]:
    """Texts that end an answer, from a task's settings."""
    until = settings.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def sampling(settings: Mapping[str, Any], seed: int) -> Sampling:
    """How a task draws tokens: the best, unless `do_sample` says otherwise.

    Raises:
        UserError: a setting is not supported, or is out of range.
    """
    if (settings.get("num_beams") or 1) != 1:
        raise UserError("ivc has no beam search: use --gen_kwargs num_beams=1")
    longest = int(settings.get("max_new_tokens") or LONGEST)
    if not settings.get("do_sample"):
        return Sampling(max_tokens=longest)
    temperature, top_p, top_k = (settings.get(name) for name in ("temperature", "top_p", "top_k"))
    return Sampling(
        1.0 if temperature is None else float(temperature), float(top_p or 1), seed, longest, int(top_k or 0)
    )


def give_up(error: UserError) -> NoReturn:
    """End with a sentence, as commands do. Otherwise lmms-eval would continue, and its other processes would wait for
    this one."""
    tell(str(error))
    sys.stdout.flush()
    sys.exit(2)
