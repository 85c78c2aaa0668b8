"""Dequantises checkpoints in PyTorch. It is written from the formats alone, because exports are checked against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

Tensors = dict[str, torch.Tensor]
Rule = Callable[[Tensors, str, Mapping[str, Any], torch.dtype], torch.Tensor]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of a word for each of its nibbles, lowest first."""


def quantisation(folder: Path) -> Mapping[str, Any] | None:
    """The quantisation in a checkpoint's JSON files. None if there is none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        if part.get("quantization_config"):
            found: Mapping[str, Any] = part["quantization_config"]
            return found
    other = folder / "hf_quant_config.json"
    return json.loads(other.read_text(encoding="utf-8"))["quantization"] if other.is_file() else None


def dequantised(tensors: Tensors, settings: Mapping[str, Any], scale_dtype: torch.dtype) -> tuple[Tensors, set[str]]:
    """A checkpoint's tensors, with a float32 weight for each quantised layer, and the names of these weights.

    scale_dtype: scales are rounded to it before they multiply, as in a bundle that has packed layers in it.
    """
    rules: dict[str, Rule] = {
        "qweight": awq if settings.get("quant_method") == "awq" else gptq,
        "weight_packed": packed,
        "weight_scale_inv": fp8,
        "weight_scale": fp8,
    }
    weights: Tensors = {}
    for end, rule in rules.items():  # a packed layer's scale is not an FP8 layer's
        marker = f".{end}"
        for layer in [name.removesuffix(marker) for name in tensors if name.endswith(marker)]:
            if layer not in weights:
                weights[layer] = rule(tensors, layer, settings, scale_dtype)
    parts = tuple(f"{layer}." for layer in weights)
    others = {name: t for name, t in tensors.items() if name.endswith(".bias") or not name.startswith(parts)}
    found = {f"{layer}.weight": weight for layer, weight in weights.items()}
    return others | found, set(found)


def bundled(folder: Path, bits: Mapping[str, int]) -> Tensors:
    """Float32 weights of a bundle's packed layers, by their stems, which `bits` has.

    A row's values are in blocks that share a scale, and possibly a zero point.
    """
    tensors: Tensors = {}
    for file in sorted((folder / "weights").glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            held = set(opened.keys())
            wanted = held & {f"{stem}.{part}" for stem in bits for part in ("packed", "scales", "zero_points")}
            tensors |= {name: opened.get_tensor(name) for name in wanted}
    found = {}
    for stem, width in bits.items():
        if f"{stem}.packed" not in tensors:
            continue
        stored, scale = tensors[f"{stem}.packed"], tensors[f"{stem}.scales"].float()
        q = values_of(stored.flatten(1), width)
        zero = torch.full_like(scale, 1 << (width - 1))
        if f"{stem}.zero_points" in tensors:
            zero = values_of(tensors[f"{stem}.zero_points"], width)[:, : scale.shape[1]].float()
        block = torch.arange(q.shape[1]) // (8 * stored.shape[2] // width)
        found[stem] = combined(q, zero, scale, block)
    return found


def values_of(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of bytes along the last axis, lowest bits first."""
    return stored if bits == 8 else torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of int32 words along the last axis, lowest bits first."""
    places = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> places) & ((1 << bits) - 1)).flatten(-2)


def combined(q: torch.Tensor, zero: torch.Tensor | int, scale: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(q - zero) * scale in float32. q: [out, in]; zero, scale: [out, groups]; group: [in], of each column."""
    points = zero[:, group] if isinstance(zero, torch.Tensor) else zero
    return (q - points).float() * scale[:, group]


def gptq(tensors: Tensors, layer: str, settings: Mapping[str, Any], scale_dtype: torch.dtype) -> torch.Tensor:
    """A layer of GPTQ's, [out, in]; see QuantLinear in AutoGPTQ."""
    bits = settings["bits"]
    q = unpacked(tensors[f"{layer}.qweight"].T, bits)
    scale = tensors[f"{layer}.scales"].T.to(scale_dtype).float()
    zero: torch.Tensor | int = 1 << (bits - 1)
    points = tensors.get(f"{layer}.qzeros")
    if points is not None and points.numel():
        zero = unpacked(points, bits).T + (settings.get("checkpoint_format", "gptq") == "gptq")
    size = settings["group_size"] if settings["group_size"] > 0 else q.shape[1]
    group = tensors.get(f"{layer}.g_idx", torch.arange(q.shape[1]) // size)
    return combined(q, zero, scale, group.long())


def awq(tensors: Tensors, layer: str, settings: Mapping[str, Any], scale_dtype: torch.dtype) -> torch.Tensor:
    """A layer of AWQ's, [out, in]; see WQLinear_GEMM in AutoAWQ."""

    def columns(words: torch.Tensor) -> torch.Tensor:
        nibbles, found = unpacked(words, 4), torch.empty(len(words), 8 * words.shape[1], dtype=torch.int32)
        for nibble, column in enumerate(AWQ_COLUMNS):
            found[:, column::8] = nibbles[:, nibble::8]
        return found.T

    q, zero = columns(tensors[f"{layer}.qweight"]), columns(tensors[f"{layer}.qzeros"])
    size = settings["group_size"] if settings["group_size"] > 0 else q.shape[1]
    scale = tensors[f"{layer}.scales"].T.to(scale_dtype).float()
    return combined(q, zero, scale, torch.arange(q.shape[1]) // size)


def packed(tensors: Tensors, layer: str, settings: Mapping[str, Any], scale_dtype: torch.dtype) -> torch.Tensor:
    """A layer of compressed-tensors' pack-quantized, [out, in]; see pack_to_int32 there."""
    weights = next(iter(settings["config_groups"].values()))["weights"]
    bits, size = weights["num_bits"], weights.get("group_size")
    out, features = tensors[f"{layer}.weight_shape"].tolist()
    q = unpacked(tensors[f"{layer}.weight_packed"], bits)[:, :features]
    zero: torch.Tensor | int = 1 << (bits - 1)
    if f"{layer}.weight_zero_point" in tensors:
        zero = unpacked(tensors[f"{layer}.weight_zero_point"].T, bits)[:, :out].T
    scale = tensors[f"{layer}.weight_scale"].to(scale_dtype).float()
    group = torch.arange(features) // (size if size and weights["strategy"] == "group" else features)
    return combined(q, zero, scale, tensors.get(f"{layer}.weight_g_idx", group).long())


def fp8(tensors: Tensors, layer: str, settings: Mapping[str, Any], scale_dtype: torch.dtype) -> torch.Tensor:
    """A layer in FP8, [out, in]: scales of blocks, of rows, or one for all."""
    weight, block = tensors[f"{layer}.weight"].float(), settings.get("weight_block_size")
    if f"{layer}.weight_scale_inv" not in tensors:
        return weight * tensors[f"{layer}.weight_scale"].float().reshape(-1, 1)
    scale = tensors[f"{layer}.weight_scale_inv"].float()
    by_value = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1) if block else scale
    return weight * by_value[: weight.shape[0], : weight.shape[1]]
