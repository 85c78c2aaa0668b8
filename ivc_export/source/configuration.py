"""Reads and checks the JSON files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from ivc_export import families
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.checkpoint.formats import detect_format
from ivc_export.checkpoint.formats.weight_format import WeightFormat, tensors_of_no_layer
from ivc_export.checkpoint.kinds import check_tensors, check_whole
from ivc_export.checkpoint.stacks import with_stacks
from ivc_export.checkpoint.weights import Weights
from ivc_export.contract.names import PREPROCESSOR
from ivc_export.contract.preprocessing import VideoPreprocessing
from ivc_export.contract.records import first_problem
from ivc_export.errors import UserError
from ivc_export.families.family import Family, Model
from ivc_export.source.prompts import PROCESSOR, Prompts, either, read_prompts

VIDEO_PROCESSOR = "video_preprocessor_config.json"


@dataclass(frozen=True)
class Description:
    """The content of the JSON files: family, sizes, the image processor's settings if there are any, and prompts.

    video: how videos are prepared; None if the model takes none.
    """

    family: Family
    model: Model
    processor: dict[str, Any] | None
    prompts: Prompts
    video: VideoPreprocessing | None


@dataclass(frozen=True)
class Configuration(Description):
    """One checkpoint: the content of its JSON files, checked against its tensors, the tensors, and how layers are
    stored."""

    weights: Weights
    stored: WeightFormat


def read_description(checkpoint: Checkpoint) -> Description:
    """Read config.json, generation_config.json, and the files of processor and tokenizer, but no tensor.

    Raises:
        UserError: a file or a value is missing, damaged or out of range.
    """
    family, model, processor = read_model(checkpoint)
    with in_one_sentence(checkpoint):
        prompts = read_prompts(checkpoint, family, model)
        video = read_video(checkpoint, family, model, prompts)
    if checkpoint.shards is not None:
        names = {family.canonical_name(name) for name in checkpoint.shards}
        check_whole(checkpoint.place, names, model.decoder.tied_embeddings)
    return Description(family, model, processor, prompts, video)


def read_model(checkpoint: Checkpoint) -> tuple[Family, Model, dict[str, Any] | None]:
    """Read family, sizes and the image processor's settings, but no file of the tokenizer.

    Raises:
        UserError: a file or a value is missing, damaged or out of range.
    """
    family, processor = families.described(checkpoint.config), image_processor(checkpoint)
    with in_one_sentence(checkpoint):
        return family, family.read(checkpoint.config, processor), processor


@contextmanager
def in_one_sentence(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn exceptions about values of a wrong type into one sentence."""
    try:
        yield
    except (ValidationError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"the JSON files of {checkpoint.folder} do not describe a model ({first_problem(error)}): "
            "give the checkpoint's own files"
        ) from error


def read_configuration(
    checkpoint: Checkpoint, description: Description | None = None, packed: bool = True
) -> Configuration:
    """Read the JSON files, and the names, dtypes and shapes of the tensors.

    description: of the checkpoint, if it was read before. packed: whether packed layers stay packed, or become floats.

    Raises:
        UserError: a file or a value is missing, damaged or out of range.
    """
    d = description or read_description(checkpoint)
    tensors = {d.family.canonical_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    stored = detect_format(checkpoint)
    stored = stored if packed else stored.as_floats
    layers = stored.read(tensors)
    check_tensors(checkpoint.place, {t.name: t for t in tensors_of_no_layer(tensors, layers).values()})
    model = d.model
    if any(
        name.startswith("lm_head.") for name in tensors
    ):  # as in transformers 5: a stored head takes precedence over config.json
        model = replace(model, decoder=model.decoder.model_copy(update={"tied_embeddings": False}))
    weights = with_stacks(Weights.of(tensors, layers, stored), model.stacks)
    check_whole(checkpoint.place, tensors, model.decoder.tied_embeddings)
    return Configuration(d.family, model, d.processor, d.prompts, d.video, weights, stored)


def read_video(checkpoint: Checkpoint, family: Family, model: Model, prompts: Prompts) -> VideoPreprocessing | None:
    """How videos are prepared. None if the family takes none, or if no token stands for them.

    Raises:
        UserError: the video processor's settings are not supported.
    """
    tokenizer = prompts.tokenizer.tokenizer if prompts.tokenizer else None
    stated = checkpoint.config.get("video_token_id")
    token = either(stated, family.video_text, tokenizer)
    if family.video is None or type(token) is not int or not 0 <= token < model.decoder.vocab_size:
        return None
    if tokenizer is not None and tokenizer.token_to_id(family.video_text or "") != token:
        return None
    return family.video(checkpoint.config, video_processor(checkpoint), token)


def video_processor(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The video processor's settings. Its own part or file comes first; older checkpoints have them in the image
    processor's file."""
    part = (checkpoint.json(PROCESSOR) or {}).get("video_processor")
    if part is not None and not isinstance(part, dict):
        raise UserError(f"video_processor of {checkpoint.folder / PROCESSOR} is not a JSON object: download it again")
    for found in (part, checkpoint.json(VIDEO_PROCESSOR), checkpoint.json(PREPROCESSOR)):
        if found is not None:
            return found
    return None


def image_processor(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The image processor's settings: its part of transformers 5's processor_config.json, or else its own file.

    If there is neither, they are processor_config.json itself, for a processor that is its own image processor.
    """
    part = (checkpoint.json(PROCESSOR) or {}).get("image_processor")
    if part is not None and not isinstance(part, dict):
        raise UserError(f"image_processor of {checkpoint.folder / PROCESSOR} is not a JSON object: download it again")
    found = part if part is not None else checkpoint.json(PREPROCESSOR)
    whole = checkpoint.json(PROCESSOR) or {}
    return whole if found is None and "image_mean" in whole else found
