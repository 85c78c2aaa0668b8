"""The registry of weight formats. A new format is one file beside this one, and one line in FORMATS."""

from __future__ import annotations

from collections.abc import Callable

from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.checkpoint.formats.awq import detect_awq
from ivc_export.checkpoint.formats.compressed_tensors import detect_pack_quantized
from ivc_export.checkpoint.formats.floats import FLOAT
from ivc_export.checkpoint.formats.fp8 import detect_fp8
from ivc_export.checkpoint.formats.gptq import detect_gptq
from ivc_export.checkpoint.formats.nbits import BITS
from ivc_export.checkpoint.formats.weight_format import WeightFormat

FORMATS: dict[str, Callable[[Checkpoint], WeightFormat | None]] = {
    "awq": detect_awq,
    "compressed-tensors": detect_pack_quantized,
    "fp8": detect_fp8,
    "gptq": detect_gptq,
}
"""For each format, the function that recognises it by a checkpoint's JSON files."""

BUNDLED = (FLOAT.name, *(f"int{bits}" for bits in BITS))
"""The formats of layers in bundles, as manifests name them. They do not depend on the checkpoint's format."""


def detect_format(checkpoint: Checkpoint) -> WeightFormat:
    """Find how a checkpoint stores its linear layers, by its JSON files. If no format recognises it, they are floats.

    Raises:
        UserError: a file is damaged, or a format does not support its settings.
    """
    found = (find(checkpoint) for find in FORMATS.values())
    return next((one for one in found if one is not None), FLOAT)


def has_format(name: str) -> bool:
    """Whether this version supports layers of this format in bundles."""
    return name in BUNDLED or name in FORMATS
