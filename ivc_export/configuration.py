"""What the JSON files of a checkpoint say, digested."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ivc_export import contract, families
from ivc_export.bundle import CHAT_TEMPLATE, PREPROCESSOR, TOKENIZER_CONFIG
from ivc_export.checkpoint import Checkpoint
from ivc_export.errors import UserError
from ivc_export.families import Family, Model
from ivc_export.weights import Weights, main_dtype

PROCESSOR = "processor_config.json"
OLD_TEMPLATE = "chat_template.json"
NAMED_TEMPLATE = "additional_chat_templates/default.jinja"


@dataclass(frozen=True)
class Description:
    """What the JSON files say: family, sizes, tokens, and of pictures and chats; None where they say nothing.

    notes: what the user should know of how they were read, a sentence each.
    """

    family: Family
    model: Model
    tokens: contract.SpecialTokens
    processor: dict[str, Any] | None
    chat_template: str
    notes: tuple[str, ...]


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
    processor = image_processor(checkpoint)
    template, notes = chat_template(checkpoint, family)
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
    return Description(family, model, tokens, processor, template, notes)


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
    return Configuration(d.family, model, d.tokens, d.processor, d.chat_template, d.notes, weights)


def image_processor(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The image processor's settings: its part of transformers 5's processor_config.json, or else its own file."""
    part = (checkpoint.json(PROCESSOR) or {}).get("image_processor")
    if part is not None and not isinstance(part, dict):
        raise UserError(f"image_processor of {checkpoint.folder / PROCESSOR} is no JSON object: download it again")
    return part if part is not None else checkpoint.json(PREPROCESSOR)


def chat_template(checkpoint: Checkpoint, family: Family) -> tuple[str, tuple[str, ...]]:
    """The checkpoint's chat template, or the family's if there is none or it cannot show pictures, and what to say."""
    found = stored_template(checkpoint)
    if found is None:
        return family.chat_template, ("the checkpoint has no chat template: the family's own is taken",)
    template, file = found
    if "image" not in template:
        return family.chat_template, (f"the chat template in {file} shows no pictures: the family's own is taken",)
    return template, ()


def stored_template(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The checkpoint's chat template and its file: of several the one that transformers takes, a processor's first.

    Source: ProcessorMixin.get_processor_dict and PreTrainedTokenizerBase._from_pretrained in transformers.

    Raises:
        UserError: see Checkpoint.json and default_template.
    """
    for file in (PROCESSOR, OLD_TEMPLATE, CHAT_TEMPLATE, NAMED_TEMPLATE, TOKENIZER_CONFIG):
        if file.endswith(".json"):
            stored = (checkpoint.json(file) or {}).get("chat_template")
            found = default_template(stored, checkpoint.folder / file)
        else:
            found = checkpoint.text(file)
        if found is not None:
            return found, file
    return None


def default_template(stored: Any, path: Path) -> str | None:
    """A chat template as JSON files hold it: text, or several by name, of which "default" counts.

    Raises:
        UserError: it is neither.
    """
    if isinstance(stored, list):
        named = [entry for entry in stored if isinstance(entry, dict)]
        stored = {str(entry.get("name")): entry.get("template") for entry in named}
    found = stored.get("default") if isinstance(stored, dict) else stored
    if found is not None and not isinstance(found, str):
        raise UserError(f"chat_template of {path} is damaged (it is neither text nor templates by name): mend it")
    return found


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's, or else config.json's."""
    config = checkpoint.config
    texts = [config.get(key) or {} for key in ("text_config", "llm_config")]
    for source in (checkpoint.json("generation_config.json") or {}, config, *texts):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()
