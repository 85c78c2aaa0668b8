"""The table of which Jetson holds which model, for docs/families.md."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from ivc_export import families
from ivc_export.checkpoint.formats.floats import FLOAT
from ivc_export.checkpoint.formats.nbits import Packing
from ivc_export.checkpoint.formats.packed_layers import packed_format
from ivc_export.checkpoint.formats.quantisation import in_decoder
from ivc_export.checkpoint.formats.weight_format import WeightFormat
from ivc_export.exporter.estimate import DEVICES, GIB, TEXT, DeviceMemory, Export, Size

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "configs"
MODELS = ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-8b")
TOKENS = (256, 1024, 4096)
GROUP = 128
JETSONS = {
    8: "Jetson Orin Nano 8 GB",
    16: "Jetson Orin NX 16 GB",
    32: "Jetson AGX Orin 32 GB",
    64: "Jetson AGX Orin 64 GB",
}


def packed(bits: int) -> WeightFormat:
    """Every product of the decoder's layers packed, in groups of GROUP, symmetric."""

    def nothing(*_: object) -> None:
        raise NotImplementedError

    return packed_format(f"int{bits}", f"int{bits}", Packing(bits, GROUP), "", in_decoder, nothing)  # type: ignore[arg-type]


FORMATS = {"float16": FLOAT, "int8": packed(8), "int4": packed(4)}


def jetson_lines() -> Iterator[str]:
    """A heading, what the figures are, and the table."""
    yield from (
        "## What a Jetson holds",
        "",
        "Each cell has the memory that a model needs, and the smallest Orin that has it. The figures are computed, not "
        "measured, in the same way as `ivc-export --dry-run` computes them:",
        "",
        "- The memory is that of the weights, the largest cache, and the activations of one graph at a time. Attention "
        "is by fused kernels, which store no scores.",
        f"- The prompt is one picture of so many visual tokens, and {TEXT} tokens of text. The ratio is "
        "the family's default.",
        f"- The board's own system takes {reserved():g} GiB beside that.",
        f"- In int8 and int4, the products of the decoder's layers are packed in groups of {GROUP}. Vision encoder, "
        "embeddings and head stay in 16 bits.",
        "- Some runtimes turn packed weights into floats ([Weights in 4 and 8 bits](weights.md)). For them the row of "
        "float16 applies.",
        "",
        f"| `--model` | weights | {' | '.join(f'{tokens:,} visual tokens' for tokens in TOKENS)} |",
        f"| --- | --- |{' --- |' * len(TOKENS)}",
    )
    for alias in MODELS:
        yield from model_lines(alias)


def reserved() -> float:
    """Of a Jetson's memory, in GiB, for its system."""
    (found,) = {device.reserved for device in DEVICES if device.name in JETSONS.values()}
    return found


def model_lines(alias: str) -> Iterator[str]:
    """One model's lines, one for each format."""
    family = next(one for one in map(families.of, families.names()) if alias in one.hub)
    model = family.read(json.loads((CONFIGS / f"{alias}.json").read_text(encoding="utf-8")), None)
    side = model.preprocessing.token_side
    large = model.preprocessing.model_copy(update={"max_pixels": max(TOKENS) * side**2})  # as the checkpoints' own say
    pictures = family.pictures(large)
    sizes = [Size(side * math.isqrt(tokens), side * math.isqrt(tokens)) for tokens in TOKENS]
    layer = family.default_layer(model.decoder).layer
    beside: list[int] = []
    for name, stored in FORMATS.items():
        planned = Export.planned(family, model, pictures, layer, False, "float16", stored)
        if not beside:  # caches and activations are the same
            found = planned.estimate(family.default_ratio, sizes).pictures
            assert [picture.visual_tokens for picture in found] == list(TOKENS)
            costs = [picture.pruned for picture in found]
            beside = [cost.cache_bytes + max(cost.activation_bytes.values()) for cost in costs]
        cells = [holder(planned.weight_bytes + more) for more in beside]
        yield f"| `{alias}` | {name}, {decimal(planned.weight_bytes)} | {' | '.join(cells)} |"


def holder(needed: int) -> str:
    """What is needed, and the smallest Orin that has it."""
    devices = {device.name: device for device in DEVICES}

    def holds(device: DeviceMemory) -> bool:
        return needed <= (device.memory - device.reserved) * GIB

    fitting = [size for size, name in JETSONS.items() if holds(devices[name])]
    return f"{decimal(needed)}: {f'{fitting[0]} GB' if fitting else 'none'}"
