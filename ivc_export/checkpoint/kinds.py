"""Recognises what a user gave instead of a checkpoint that an export can read, and says so before all else.

There are two groups of tables. KINDS looks at names of files and at JSON files, so it works before weights are
downloaded. WRITERS and QUANTISED look at names of tensors, which an index of shards has too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ivc_export.checkpoint.folder import Checkpoint, StoredTensor
from ivc_export.checkpoint.formats import detect_format
from ivc_export.checkpoint.formats.floats import FLOAT
from ivc_export.contract.names import MANIFEST
from ivc_export.errors import UserError

ADAPTER = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "pytorch_model*.bin")
TAKEN = (
    "this version exports only weights in float32, float16 or bfloat16, and those of GPTQ, AWQ, compressed-tensors' "
    "pack-quantized and FP8"
)

METHODS = {
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "nvfp4": "NVFP4",
}
"""Values of `quant_method`, with their names for users. Other values are shown unchanged."""


class CheckpointKind(NamedTuple):
    """One kind. told_by: gives what shows the kind, or None. sentence: what follows the name of the folder or
    repository."""

    told_by: Callable[[Checkpoint], str | None]
    sentence: str


def files(*patterns: str, without: Iterable[str] = ("*.safetensors",)) -> Callable[[Checkpoint], str | None]:
    """Recognise a kind by the first file that matches one of `patterns`, if none matches `without`."""

    def told_by(checkpoint: Checkpoint) -> str | None:
        return None if first(checkpoint.names, without) else first(checkpoint.names, patterns)

    return told_by


def first(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first of `names`, in alphabetical order, that matches one of `patterns`."""
    return next((name for name in sorted(names) if any(fnmatchcase(name, pattern) for pattern in patterns)), None)


def adapter(checkpoint: Checkpoint) -> str | None:
    """An adapter of PEFT, and the model that it adapts."""
    if ADAPTER not in checkpoint.names or first(checkpoint.names, WEIGHTS):
        return None
    settings = checkpoint.json(ADAPTER) or {}
    return f"{shown(settings.get('peft_type'))} of {shown(settings.get('base_model_name_or_path'))}"


def adapted(checkpoint: Checkpoint) -> str | None:
    """An adapter beside a whole model. transformers would apply it when it loads the model."""
    return ADAPTER if ADAPTER in checkpoint.names else None


def quantised(checkpoint: Checkpoint) -> str | None:
    """The method of quantisation and its place, if no weight format supports it."""
    if detect_format(checkpoint) is not FLOAT:
        return None
    config = checkpoint.json("config.json") or {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config", "quantization"):  # the last is MLX's
            if part.get(key) and (key != "quantization" or isinstance(part[key], dict)):
                return f"{method(part[key])}, by {key} of config.json"
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):  # ModelOpt, AutoGPTQ, AutoAWQ
        if name in checkpoint.names:
            content = checkpoint.json(name) or {}
            return f"{method(content.get('quantization') or content)}, by {name}"
    return None


def method(settings: Any) -> str:
    """A quantisation's settings in a few words."""
    if not isinstance(settings, Mapping):
        return shown(settings)
    name, bits = settings.get("quant_method"), settings.get("bits") or settings.get("w_bit")
    for option, count in (("load_in_4bit", 4), ("load_in_8bit", 8)):  # bitsandbytes
        bits = count if settings.get(option) is True else bits
    words = [METHODS.get(name, name) if isinstance(name, str) else None]
    words += [settings.get(key) for key in ("quant_algo", "format")]  # ModelOpt, compressed-tensors
    words += [f"{bits} bits" if isinstance(bits, int) else None]
    return ", ".join(shown(word) for word in words if word) or "by a method without a name"


def shown(value: object) -> str:
    """A value from a file as part of a sentence: short, and on one line."""
    text = value if isinstance(value, str) else "nothing known" if value is None else str(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 80 else f"{text[:77]}..."


KINDS = (
    CheckpointKind(
        lambda checkpoint: files("prefix.onnx", without=())(checkpoint) if MANIFEST in checkpoint.names else None,
        "is a bundle, which ivc-export wrote: give the checkpoint that it was made from",
    ),
    CheckpointKind(
        adapter,
        "is an adapter ({found}), not a whole model: merge it into its model with PEFT's merge_and_unload, and give "
        "what save_pretrained then writes",
    ),
    CheckpointKind(
        adapted,
        "holds an adapter beside a model ({found}): merge both with PEFT's merge_and_unload and save them to a new "
        "folder, or remove {found} if they are already merged",
    ),
    CheckpointKind(quantised, f"is quantised ({{found}}), but {TAKEN}: give the checkpoint that it was made from"),
    CheckpointKind(
        files("*.gguf"),
        "is for llama.cpp ({found} is a GGUF file): give the checkpoint in transformers' layout that it was made from",
    ),
    CheckpointKind(
        files("openvino*.xml", "openvino"),
        "is an export for OpenVINO ({found}): give the checkpoint that it was made from",
    ),
    CheckpointKind(
        files("*.onnx", "onnx"),
        "is an ONNX export of another program ({found}): give the checkpoint that it was made from",
    ),
    CheckpointKind(
        files("model_index.json", without=()),
        "is a pipeline of diffusers ({found}), not a vision-language model: give one in transformers' layout",
    ),
    CheckpointKind(
        files("tf_model*.h5", "flax_model*.msgpack"),
        "holds no PyTorch weights ({found}): load it with transformers, and give what save_pretrained writes",
    ),
    CheckpointKind(
        files("pytorch_model*.bin", "model*.bin", "*.pth", "*.pt", "*.ckpt"),
        "holds only pickled weights ({found}), which can run code when they are opened: give safetensors files, as "
        "transformers' save_pretrained writes them",
    ),
)


def check_folder(checkpoint: Checkpoint) -> None:
    """Check by names of files and by JSON files that a folder is a checkpoint that can be exported.

    Raises:
        UserError: it is one of KINDS, or its index of shards names tensors of another kind.
    """
    for kind in KINDS:
        found = kind.told_by(checkpoint)
        if found is not None:
            raise UserError(f"{checkpoint.place} {kind.sentence.format(found=found)}")
    check_names(checkpoint.place, checkpoint.shards or (), plain=detect_format(checkpoint) is FLOAT)


PEFT = "PEFT, and its adapter is not merged: call merge_and_unload, and give what save_pretrained then writes"
WRITERS: Mapping[str, str] = {
    "*.lora_A.*": PEFT,
    "*.lora_embedding_A*": PEFT,
    "*.base_layer.weight": PEFT,
    "base_model.model.*": "PEFT: call merge_and_unload, and save the model that it returns with save_pretrained",
    "module.*": "a wrapper of PyTorch's: save the model within it (model.module) with save_pretrained",
    "_orig_mod.*": "torch.compile: save the model within it (model._orig_mod) with save_pretrained",
    "_forward_module.*": "DeepSpeed: convert it with its zero_to_fp32.py, and save the model with save_pretrained",
}
"""Names of tensors that transformers does not write, and who writes them."""

QUANTISED: Mapping[str, str] = {
    "*.qweight": "GPTQ or AWQ",
    "*.weight_packed": "compressed-tensors",
    "*.weight_scale_inv": "FP8",
    "*.weight_scale_2": "NVFP4",
    "*.weight_scale": "FP8 or INT8",
    "*.weight.absmax": "bitsandbytes",
    "*.weight.quant_state.*": "bitsandbytes",
    "*.SCB": "bitsandbytes",
    "*.W_q": "HQQ",
}


def check_tensors(place: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that tensors are plain weights.

    Raises:
        UserError: they have names of WRITERS or QUANTISED, or are weights in integers or in 8 bits or fewer.
    """
    check_names(place, tensors)
    for tensor in tensors.values():
        if tensor.name.endswith(".weight") and re.fullmatch(r"[IU]\d+|F[468](_\w+)?", tensor.dtype):
            found = f"{shown(tensor.name)} is {tensor.dtype}"
            raise UserError(f"{place} is quantised ({found}), but {TAKEN}: give the checkpoint that it was made from")


def check_names(place: str, names: Iterable[str], plain: bool = True) -> None:
    """Check tensors by their names. plain: whether they must be plain weights, not those of a format.

    Raises:
        UserError: one is of WRITERS, or of QUANTISED although they must be plain.
    """
    names = list(names)
    for pattern, writer in WRITERS.items():
        if found := first(names, [pattern]):
            raise UserError(f"{place} holds tensors such as {shown(found)}, which are named by {writer}")
    for pattern, format_name in QUANTISED.items() if plain else ():
        if found := first(names, [pattern]):
            found = f"{format_name}, by the tensor {shown(found)}"
            raise UserError(f"{place} is quantised ({found}), but {TAKEN}: give the checkpoint that it was made from")


def check_whole(place: str, names: Collection[str], tied: bool) -> None:
    """Check that a model is complete. names: our names of tensors. tied: whether config.json says that embeddings are
    the head.

    Raises:
        UserError: there is no vision encoder, no language model, or no head.
    """
    if not any(name.startswith("visual.") for name in names):
        raise UserError(f"{place} holds a language model without a vision encoder: give the whole model")
    if not any(name.startswith("model.layers.") for name in names):
        raise UserError(f"{place} holds a vision encoder without a language model: give the whole model")
    if not tied and not any(name.startswith("lm_head.") for name in names):
        raise UserError(
            f"{place} has no lm_head.weight, and tie_word_embeddings of its config.json is not set: set it to true if "
            "the model's embeddings are also its lm_head, or download the checkpoint again"
        )
