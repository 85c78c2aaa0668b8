"""The largest allowed differences between a runtime and the reference, with reasons. Records of runtimes use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerances:
    """The largest error of a correct bundle, and the reason, by kind of tensor.

    The reference computes in float32 on the same weights, rounded to the bundle's dtype. Errors are relative to the
    reference's largest magnitude if that exceeds 1.

    measured: False for bounds that are multiples of rounding errors measured elsewhere. A report that passes then
    proves less.
    """

    errors: Mapping[str, tuple[float, str]]
    measured: bool = True


SELECTION = (1e-6, "the operator against NumPy on the same values, in float32 always; 9e-8 in 500 random cases")
FLOAT32 = Tolerances(
    {
        "image_embeds": (1e-4, "order of summation; 2e-6 measured on small models"),
        "hidden_states": (1e-4, "order of summation; 3e-6 measured on small models"),
        "keys and values": (1e-4, "order of summation; 3e-6 measured on small models"),
        "token_score": (1e-6, "probabilities, absolute; 1e-8 measured on small models"),
        "logits": (1e-4, "order of summation; 16 steps measured at 2e-5"),
        "routing": (1e-5, "scores of experts, absolute: order of summation; 2e-6 measured on small models"),
        "selection": SELECTION,
    },
)
FLOAT16 = Tolerances(
    {
        "image_embeds": (5e-3, "rounding to 11 bits after each operator; 8e-4 measured on small models"),
        "hidden_states": (5e-3, "rounding to 11 bits after each operator; 1e-3 measured on small models"),
        "keys and values": (5e-3, "rounding to 11 bits after each operator; 1.5e-3 measured on small models"),
        "token_score": (1e-4, "probabilities, absolute, of values in float16; 3e-5 measured on small models"),
        "logits": (5e-3, "rounding to 11 bits after each operator; 1.4e-3 measured on small models"),
        "routing": (5e-3, "scores of experts, absolute, of rows in float16; 1.9e-3 measured on small models"),
        "selection": SELECTION,
    },
)
TENSORRT_FLOAT16 = Tolerances(
    {
        "image_embeds": (
            5e-3,
            "TensorRT fuses layers, so it rounds at other places; 5.6e-4 measured on small models, 8.6, H100",
        ),
        "hidden_states": (1e-2, "as image_embeds; 3.6e-3 measured, twice onnxruntime's error on the same graphs"),
        "keys and values": (
            1.5e-2,
            "as image_embeds; 6.6e-3 measured, 4.0e-3 in onnxruntime, with rounded float32 weights",
        ),
        "token_score": (
            1e-3,
            "probabilities, absolute, of such values; 1.7e-4 measured, 8.6e-4 with sums beyond 65504",
        ),
        "logits": (1e-2, "as image_embeds; 4.5e-3 measured, 2.8e-3 in onnxruntime"),
        "routing": (5e-3, "as in onnxruntime; engines cannot be built with experts yet"),
        "selection": (
            1e-4,
            "TensorRT 8.6 may pass values on before it rounds them; 1.9e-5 measured, 1.4e-7 in the plugin",
        ),
    },
)
TENSORRT_BFLOAT16 = Tolerances(
    {
        # eight times float16's: 8 bits against 11; each error was 8 times float16's, with every value rounded
        "image_embeds": (4e-2, "rounding to 8 bits; 1.1e-2 in onnxruntime on small models; not measured on TensorRT"),
        "hidden_states": (8e-2, "rounding to 8 bits; 1.6e-2 in onnxruntime on small models; not measured on TensorRT"),
        "keys and values": (
            1.2e-1,
            "rounding to 8 bits; 2.9e-2 in onnxruntime on small models; not measured on TensorRT",
        ),
        "token_score": (
            8e-3,
            "probabilities, absolute; 8.5e-4 in onnxruntime on small models; not measured on TensorRT",
        ),
        "logits": (8e-2, "rounding to 8 bits; 1.4e-2 in onnxruntime on small models; not measured on TensorRT"),
        "routing": (4e-2, "eight times float16; engines cannot be built with experts yet"),
        "selection": (8e-4, "values may be passed on before they are rounded, as in float16; not measured"),
    },
    measured=False,
)
CUDA_FLOAT16 = Tolerances(
    {
        "image_embeds": (
            5e-3,
            "CUDA's kernels fuse operators and sum in another order; 1.0e-3 measured on small models, H200",
        ),
        "hidden_states": (1e-2, "as image_embeds; 1.3e-3 measured"),
        "keys and values": (1.5e-2, "as image_embeds; 1.9e-3 measured"),
        "token_score": (
            1e-3,
            "probabilities, absolute, of such values; 1.6e-4 measured",
        ),
        "logits": (2e-2, "as image_embeds; 3.2e-3 measured; tests/gpu hold CUDA to this bound"),
        "routing": (5e-3, "as image_embeds; 1.9e-3 on the CPU provider, not measured on CUDA"),
        "selection": SELECTION,
    },
    measured=False,  # scores of experts were not
)
