"""What the JSON files of a checkpoint say, digested."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from ivc_export import contract, families
from ivc_export.bundle import CHAT_TEMPLATE
from ivc_export.checkpoint import Checkpoint
from ivc_export.errors import UserError
from ivc_export.families import Family, Model
from ivc_export.weights import Weights, main_dtype

TEMPLATE_FILES = ("chat_template.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Description:
    """What the JSON files say: family, sizes, tokens, and of pictures and chats; None where they say nothing."""

    family: Family
    model: Model
    tokens: contract.SpecialTokens
    processor: dict[str, Any] | None
    chat_template: str


@dataclass(frozen=True)
class Configuration(Description):
    """One checkpoint: what its JSON files say, as far as its tensors agree, and the tensors."""

    weights: Weights


def read_description(checkpoint: Checkpoint) -> Description:
    """Digest config.json, generation_config.json and the processor's files; no tensor file is looked at.

    Raises:
        UserError: a file or a value is missing, damaged or out of range.
    """
    family = families.of(checkpoint.config.get("model_type"))
    processor = processor_config(checkpoint)
    try:
        model = family.read(checkpoint.config, processor)
        tokens = contract.SpecialTokens(
            image=model.image_token,
            vision_start=model.vision_start_token,
            vision_end=model.vision_end_token,
            template_marks=family.template_marks,
            stop=stop_tokens(checkpoint),
        )
    except (ValidationError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"the JSON files of {checkpoint.folder} do not describe a model ({contract.first_problem(error)}): "
            "give the checkpoint's own files"
        ) from error
    return Description(family, model, tokens, processor, chat_template(checkpoint, family))


def read_configuration(checkpoint: Checkpoint) -> Configuration:
    """Digest the JSON files, and the names, dtypes and shapes of the tensors.

    Raises:
        UserError: a file or a value is missing, damaged or out of range.
    """
    d = read_description(checkpoint)
    tensors = {d.family.canonical_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    model = d.model
    if "lm_head.weight" in tensors:  # as transformers 5: a stored head counts, whatever config.json says
        model = replace(model, decoder=model.decoder.model_copy(update={"tied_embeddings": False}))
    weights = Weights(tensors, main_dtype(tensors))
    return Configuration(d.family, model, d.tokens, d.processor, d.chat_template, weights)


def processor_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The image processor's settings: its own file, or its part of transformers 5's processor_config.json."""
    own = checkpoint.json("preprocessor_config.json")
    return own if own is not None else (checkpoint.json("processor_config.json") or {}).get("image_processor")


def chat_template(checkpoint: Checkpoint, family: Family) -> str:
    """The chat template, from whichever file holds it; the family's, if none is there or it cannot show pictures."""
    templates = [checkpoint.text(CHAT_TEMPLATE)]
    templates += [(checkpoint.json(file) or {}).get("chat_template") for file in TEMPLATE_FILES]
    own = next((template for template in templates if isinstance(template, str)), "")
    return own if "image" in own else family.chat_template


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's, or else config.json's."""
    config = checkpoint.config
    texts = [config.get(key) or {} for key in ("text_config", "llm_config")]
    for source in (checkpoint.json("generation_config.json") or {}, config, *texts):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()
