"""Tiny quantised checkpoints, written as the formats' own libraries lay them out, and floats that mean the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Layout:
    """One way to store layers. group: values that share a scale; -1 for a row. version: of GPTQ's format."""

    kind: str
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    ordered: bool = False
    version: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """quantization_config."""
        if self.kind == "gptq":
            name = "gptq" if self.version == 1 else "gptq_v2"
            sizes = {"bits": self.bits, "group_size": self.group, "sym": self.symmetric, "desc_act": self.ordered}
            return {"quant_method": "gptq", "checkpoint_format": name, **sizes}
        if self.kind == "awq":
            names = {"modules_to_not_convert": ["visual"], "version": "gemm", "zero_point": True}
            return {"quant_method": "awq", "bits": self.bits, "group_size": self.group, **names}
        if self.kind == "fp8":
            return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16]}
        weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        if self.kind == "pack-quantized":
            weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric}
            weights |= {"strategy": "channel" if self.group == -1 else "group"}
            weights |= {"group_size": None if self.group == -1 else self.group}
            weights |= {"actorder": "group" if self.ordered else None}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
        return {
            "quant_method": "compressed-tensors",
            "format": self.kind,
            "ignore": ["re:.*visual.*", "re:.*vision_tower.*", "lm_head"],
            "config_groups": groups,
        }


LAYOUTS = {
    "GPTQ": Layout("gptq"),
    "GPTQ, second version, zero points": Layout("gptq", symmetric=False, version=2),
    "GPTQ, zero points, activations ordered": Layout("gptq", symmetric=False, ordered=True),
    "GPTQ, 8 bits, activations ordered": Layout("gptq", bits=8, group=16, ordered=True),
    "GPTQ, 8 bits, a scale a row": Layout("gptq", bits=8, group=-1),
    "AWQ": Layout("awq", symmetric=False),
    "compressed-tensors": Layout("pack-quantized"),
    "compressed-tensors, zero points, activations ordered": Layout("pack-quantized", symmetric=False, ordered=True),
    "compressed-tensors, 8 bits, zero points, by channel": Layout("pack-quantized", bits=8, group=-1, symmetric=False),
    "compressed-tensors, by channel": Layout("pack-quantized", group=-1),
}


def words(values: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Values along the first axis as int32 words: word by word, nibble by nibble."""
    fill = 32 // bits
    values = np.pad(values, ((0, -len(values) % fill), (0, 0))).astype(np.uint32)
    packed = np.zeros((len(values) // fill, values.shape[1]), np.uint32)
    for place in range(fill):
        packed |= values[(order or range(fill))[place] :: fill] << np.uint32(bits * place)
    return packed.view(np.int32)


def quantise_layer(weight: Array, layout: Layout, seed: int) -> tuple[dict[str, Array], Array]:
    """Stored tensors of a layer by the ends of their names, and the float32 weight that they mean, [out, in]."""
    random, (out, features) = np.random.default_rng(seed), weight.shape
    if layout.kind == "fp8":
        high, wide = layout.settings["weight_block_size"]
        scale = random.uniform(0.001, 0.004, (-(-out // high), -(-features // wide))).astype(np.float32)
        by_value = np.repeat(np.repeat(scale, high, 0), wide, 1)[:out, :features]
        stored = (weight / by_value).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        return {"weight": stored, "weight_scale_inv": scale}, stored.astype(np.float32) * by_value
    if layout.kind == "float-quantized":
        scale = (np.abs(weight).max(1, keepdims=True) / 448).astype(np.float32)
        stored = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scale}, stored.astype(np.float32) * scale
    group = features if layout.group == -1 else layout.group
    groups, most = features // group, (1 << layout.bits) - 1
    group_of = np.arange(features) // group
    if layout.ordered:
        group_of = group_of[random.permutation(features)]
    zero = np.full((out, groups), 1 << (layout.bits - 1), np.int64)
    if not layout.symmetric:  # from 1 on, and 15 where the format can say it
        zero = random.integers(1, most + (layout.version == 2 or layout.kind != "gptq"), (out, groups))
    scale = (random.uniform(0.5, 1, (out, groups)) * np.abs(weight).max() / most * 1.5).astype(np.float16)
    of_value = scale.astype(np.float32)[:, group_of]
    q = np.rint(weight / of_value + zero[:, group_of]).clip(0, most).astype(np.int64)
    meant = (q - zero[:, group_of]).astype(np.float32) * of_value
    g_idx = group_of.astype(np.int32)
    if layout.kind == "gptq":
        points = words(zero - (layout.version == 1), layout.bits).T
        found = {"qweight": words(q.T, layout.bits), "qzeros": points, "scales": scale.T, "g_idx": g_idx}
    elif layout.kind == "awq":
        found = {"qweight": words(q, 4, AWQ_ORDER).T, "qzeros": words(zero, 4, AWQ_ORDER).T, "scales": scale.T}
    else:
        found = {"weight_packed": words(q.T, layout.bits).T, "weight_scale": scale}
        found["weight_shape"] = np.array([out, features], np.int64)
        found |= {} if layout.symmetric else {"weight_zero_point": words(zero, layout.bits)}
        found |= {"weight_g_idx": g_idx} if layout.ordered else {}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}, meant


def is_packed(name: str) -> bool:
    """Whether a stored tensor is a decoder layer's weight."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    others = ("wqkv", "wo", "w1", "w2", "w3")
    beginning, end = name.startswith(("model.", "language_model.", "language.")), name.endswith(".weight")
    return beginning and end and name.split(".")[-2] in parts + others


def write(plain: Path, folder: Path, layout: Layout, shards: bool = False) -> tuple[Path, Path]:
    """A checkpoint of floats in a layout, and one in float32 that means the same. shards: two files, not one."""
    stored, wanted = folder / "stored", folder / "dequantised"
    tensors: dict[str, Array] = {}
    meant: dict[str, Array] = {}
    for seed, (name, array) in enumerate(sorted(load_file(plain / "model.safetensors").items())):
        if is_packed(name):
            parts, meant[name] = quantise_layer(array.astype(np.float32), layout, seed)
            tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
        else:
            half = array.astype(np.float16)
            tensors[name], meant[name] = half, half.astype(np.float32)
    for target, changes in (
        (stored, {"quantization_config": layout.settings, "torch_dtype": "float16"}),
        (wanted, {"torch_dtype": "float32"}),
    ):
        target.mkdir(parents=True)
        for file in plain.iterdir():
            if file.suffix != ".safetensors":
                (target / file.name).write_bytes(file.read_bytes())
        edit_config(target, changes)
    save_file(meant, wanted / "model.safetensors", {"format": "pt"})
    if shards:
        save_shards(stored, tensors)
    else:
        save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    return stored, wanted


def edit_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_shards(folder: Path, tensors: Mapping[str, Array]) -> None:
    """Every second tensor in each of two files, so that a layer lies in both."""
    names = sorted(tensors)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
