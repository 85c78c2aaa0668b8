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
"""What finds a format in a checkpoint's JSON files, by the format's name."""

BUNDLED = (FLOAT.name, *(f"int{bits}" for bits in BITS))
"""What layers are in bundles, as manifests call it, whatever the checkpoint's format was."""


def detect_format(checkpoint: Checkpoint) -> WeightFormat:
    """How a checkpoint stores its linear layers, as its JSON files say: as floats where no format knows it.

    Raises:
        UserError: a file is damaged, or a format does not know its settings.
    """
    found = (find(checkpoint) for find in FORMATS.values())
    return next((one for one in found if one is not None), FLOAT)


def has_format(name: str) -> bool:
    """Whether this version has layers of this name in bundles."""
    return name in BUNDLED or name in FORMATS
