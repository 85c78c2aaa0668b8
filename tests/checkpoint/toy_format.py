"""A weight format that no checkpoint has: 8 bits a number, in two halves of a layer's rows, and a scale a row.

Stored: `weight_q.0` and `weight_q.1`, uint8 [out / 2, in] each, 128 more than what they mean; `weight_scale`, floats
[out]. A bundle holds `weight_q`, int8 [out, in], in the place of the halves, and the scales as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors.numpy import load_file, save_file

from ivc_export.checkpoint.folder import Checkpoint, StoredTensor
from ivc_export.checkpoint.formats.weight_format import Builder, DerivedTensor, Source, WeightFormat, find_tensor

HALVES = ("weight_q.0", "weight_q.1")


def detect_toy(checkpoint: Checkpoint) -> WeightFormat | None:
    """The format, where config.json says that a checkpoint has it."""
    stated = checkpoint.config.get("quantization_config") or {}
    return TOY if stated.get("quant_method") == "toy8" else None


def covers(layer: str) -> bool:
    """Of the decoder's layers every one but those whose number is odd."""
    parts = layer.split(".")
    return parts[:2] == ["model", "layers"] and int(parts[2]) % 2 == 0


def read_toy(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, Source]]:
    """Each layer with halves."""
    names = [name.removesuffix(f".{HALVES[0]}") for name in tensors if name.endswith(f".{HALVES[0]}")]
    return {name: read_layer(tensors, name) for name in names}


def read_layer(tensors: Mapping[str, StoredTensor], name: str) -> dict[str, Source]:
    """Its rows derived, its scales as they lie."""
    halves = tuple(find_tensor(tensors, f"{name}.{half}", "U8") for half in HALVES)
    shape = (sum(half.shape[0] for half in halves), halves[0].shape[1])

    def pieces() -> Iterator[npt.NDArray[Any]]:
        for half in halves:
            for rows in half.rows(1000):
                yield (rows.astype(np.int16) - 128).astype(np.int8)

    q = f"{name}.weight_q"
    return {
        q: DerivedTensor(q, "I8", shape, halves, pieces),
        f"{name}.weight_scale": find_tensor(tensors, f"{name}.weight_scale"),
    }


def toy_linear(g: Builder, x: ir.Value, name: str, out: int, features: int, bias: bool) -> ir.Value:
    """Dequantised in float32, then one Gemm."""
    q = g.to_float32(g.weight(f"{name}.weight_q", (out, features), dtype="I8"))
    scale = g.to_float32(g.weight(f"{name}.weight_scale", (out, 1), (out,)))
    inputs = [x, g.to_graph_dtype(g.op("Mul", q, scale))]
    if bias:
        inputs.append(g.weight(f"{name}.bias", (out,)))
    return g.op("Gemm", *inputs, transB=1)


TOY = WeightFormat("toy8", covers, read_toy, toy_linear)


def quantise(plain: Path, folder: Path, shards: bool = False) -> tuple[Path, Path]:
    """Write a checkpoint of floats in the format, and one of floats that mean the same; return both folders.

    shards: whether the second halves lie in a file of their own.
    """
    stored, wanted = folder / "toy", folder / "dequantised"
    tensors, meant = load_file(plain / "model.safetensors"), {}
    second: dict[str, npt.NDArray[Any]] = {}
    for name, array in list(tensors.items()):
        layer = name.removesuffix(".weight")
        meant[name] = array
        if name.endswith("proj.weight") and covers(layer):
            scale = (np.abs(array.astype(np.float32)).max(1) / 127).astype(array.dtype)
            q = np.rint(array.astype(np.float32) / scale[:, None].astype(np.float32)).clip(-128, 127)
            meant[name] = (q * scale[:, None].astype(np.float32)).astype(array.dtype)
            first, rest = np.split((q + 128).astype(np.uint8), 2)
            del tensors[name]
            tensors |= {f"{layer}.{HALVES[0]}": first, f"{layer}.weight_scale": scale}
            (second if shards else tensors)[f"{layer}.{HALVES[1]}"] = rest
    for target, config in ((stored, {"quantization_config": {"quant_method": "toy8"}}), (wanted, {})):
        target.mkdir(parents=True)
        for file in plain.iterdir():
            if file.suffix != ".safetensors":
                (target / file.name).write_bytes(file.read_bytes())
        content = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(content | config))
    save_file(meant, wanted / "model.safetensors")
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": second}
    if not shards:
        save_file(tensors, stored / "model.safetensors")
        return stored, wanted
    for file_name, content in files.items():
        save_file(content, stored / file_name)
    index = {"weight_map": {name: file_name for file_name, content in files.items() for name in content}}
    (stored / "model.safetensors.index.json").write_text(json.dumps(index))
    return stored, wanted
