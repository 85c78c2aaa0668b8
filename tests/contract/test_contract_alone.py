"""The contract, as someone who writes a runtime meets it: a moved bundle, and nothing of ivc_export but the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ivc_export.bundle.bundle import Bundle
from tests.conftest import LOGIT_TOLERANCE, Golden


def test_a_moved_bundle_runs_from_its_manifest_alone(golden: Golden, golden_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "moved"
    shutil.copytree(golden_bundle.folder, folder)
    m = json.loads((folder / "manifest.json").read_text())
    layers, cut, head_dim = m["decoder"]["layers"], m["selection_layer"], m["decoder"]["head_dim"]
    sessions = {name: onnxruntime.InferenceSession(folder / graph["file"]) for name, graph in m["graphs"].items()}

    def run(name: str, feeds: dict[str, Any]) -> dict[str, Any]:
        wanted = [tensor["name"] for tensor in m["graphs"][name]["inputs"]]
        outputs = sessions[name].run(None, {n: feeds[n] for n in wanted})
        return {t["name"]: array for t, array in zip(m["graphs"][name]["outputs"], outputs, strict=True)}

    table = m["embedding"]
    embedding = np.memmap(folder / table["file"], table["dtype"], "r", table["offset"], tuple(table["shape"]))
    frequencies = m["rotary"]["theta"] ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    shape = (1, m["decoder"]["kv_heads"], 0, head_dim)
    cache = {f"past_{kind}.{i}": np.zeros(shape, np.float32) for i in range(layers) for kind in ("key", "value")}

    def turn(ids: np.ndarray[Any, Any], positions: np.ndarray[Any, Any], length: int, image: Any = None) -> Any:
        visual = np.flatnonzero(ids == m["tokens"]["image"]) if image is not None else np.arange(1)
        text, embeds = np.setdiff1d(np.arange(len(ids)), visual), embedding[ids]
        query, priority, keep_count = text[-1:] if len(text) else visual, np.zeros(len(visual)), 1
        if image is not None:
            embeds[visual] = image
            query = text[text >= visual[-1] + 1 + m["selection"]["query_offset"]]
            angles = positions[:, visual, None] * frequencies
            count = round(m["selection"]["ivc_fraction"] * len(visual))
            means = [np.round(part.mean(axis=(0, 2)), 9) for part in (np.cos(angles), np.sin(angles))]
            best = [np.argsort(-mean, kind="stable")[:count] for mean in means]
            for rank, token in enumerate(dict.fromkeys(np.stack(best, 1).ravel())):
                priority[token] = 10_000 - rank
            keep_count = round(m["default_ratio"] * len(visual))
        feeds = {name: array.astype(np.int32) for name, array in
                 {"visual_index": visual, "text_index": text, "query_index": query, "position_ids": positions[:, None],
                  "keep_count": np.array([keep_count]), "past_length": np.array([length])}.items()}  # fmt: skip
        feeds |= {"inputs_embeds": embeds[None], "ivc_priority": priority.astype(np.float32), **cache}
        prefix = run("prefix", feeds)
        last = np.array([len(prefix["keep_index"]) - 1], np.int32)
        decoder = run("decoder", feeds | prefix | {"logit_index": last})
        for name in cache:
            new = decoder[name.replace("past", "compact" if int(name.split(".")[1]) < cut else "new")]
            cache[name] = np.concatenate([cache[name], new], axis=2)
        return decoder["logits"][0, 0], prefix["keep_index"]

    blocks = [int(extent) // 2 for extent in golden.data["image_grid_thw"][0, 1:]]
    patches = np.mgrid[: 2 * blocks[0], : 2 * blocks[1]].reshape(2, blocks[0], 2, blocks[1], 2).transpose(1, 3, 2, 4, 0)
    feeds = {
        "pixel_values": golden.data["pixel_values"][None],
        "patch_position": patches.reshape(-1, 2).astype(np.int32),
    }
    image = run("vision", feeds)["image_embeds"][0]
    positions = golden.data["position_ids"]
    logits, keep = turn(golden.data["input_ids"][0], positions, 0, image)
    np.testing.assert_array_equal(keep, golden.data["keep_indices"])
    for step, wanted in enumerate(golden.data["pruned_step_logits"]):
        assert np.abs(logits - wanted).max() < LOGIT_TOLERANCE
        position = np.full((3, 1), positions.max() + 1 + step)
        logits, _ = turn(np.array([logits.argmax()]), position, cache["past_key.0"].shape[2])
