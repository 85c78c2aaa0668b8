"""testdata/, as docs/runtime.md tells it to somebody who writes a runtime: nothing of ivc_export computes here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import PIL.Image
import pytest

from ivc_export.bundle.recording import Recording
from ivc_export.contract.manifest import Manifest
from ivc_export.contract.records import Frozen
from ivc_export.errors import UserError
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from samples.make_sample import make_checkpoint
from tests.conftest import LOGIT_TOLERANCE, PIXEL_TOLERANCE, SHAPES, Golden

Array = npt.NDArray[Any]
RUNTIME = Path(__file__).parents[2] / "docs" / "runtime.md"


class Files:
    """A bundle's manifest and testdata, read as any program would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.index = json.loads((folder / "testdata" / "index.json").read_text())

    def tensors(self, stage: str, graph: str, role: str) -> dict[str, Array]:
        return {
            entry["name"]: np.fromfile(self.folder / "testdata" / entry["file"], f"<{entry['dtype'][0]}4").reshape(
                entry["shape"]
            )
            for entry in self.index["tensors"]
            if (entry["stage"], entry["graph"], entry["role"]) == (stage, graph, role)
        }


@pytest.fixture(scope="module")
def files(sample_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    bundle = export(ExportRecipe(sample_checkpoint, tmp_path_factory.mktemp("testdata") / "bundle", testdata=True))
    return Files(bundle.folder)


def kernel(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resample_rows(pixels: Array, size: int) -> Array:
    """The first axis of uint8 pixels from its length to `size`."""
    n = pixels.shape[0]
    if n == size:
        return pixels
    scale = n / size
    stretch = max(scale, 1.0)
    out = np.zeros((size, *pixels.shape[1:]), np.uint8)
    for i in range(size):
        centre = (i + 0.5) * scale
        first = max(0, math.trunc(centre - 2 * stretch + 0.5))
        last = min(n, math.trunc(centre + 2 * stretch + 0.5))
        weights = [kernel((x - centre + 0.5) / stretch) for x in range(first, last)]
        total = sum(weights)
        whole = [math.trunc(w / total * 2**22 + math.copysign(0.5, w)) for w in weights]
        summed = sum(
            (w * pixels[x].astype(np.int64) for w, x in zip(whole, range(first, last), strict=True)),
            np.full(pixels.shape[1:], 2**21, np.int64),
        )
        out[i] = np.clip(summed >> 22, 0, 255)
    return out


def preprocess(pixels: Array, p: dict[str, Any]) -> tuple[Array, Array, tuple[int, int]]:
    """pixel_values, patch_position and the grid of RGB pixels [height, width, 3]."""
    height, width = pixels.shape[:2]
    side, merge = p["patch_size"], p["merge_size"]
    unit = side * merge
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > p["max_pixels"]:
        s = math.sqrt(height * width / p["max_pixels"])
        rows, columns = max(1, math.floor(height / s / unit)), max(1, math.floor(width / s / unit))
    elif rows * columns * unit**2 < p["min_pixels"]:
        s = math.sqrt(p["min_pixels"] / (height * width))
        rows, columns = math.ceil(height * s / unit), math.ceil(width * s / unit)
    wide = resample_rows(pixels.transpose(1, 0, 2), columns * unit).transpose(1, 0, 2)
    scaled = resample_rows(wide, rows * unit).astype(np.float32)
    normal = (scaled * np.float32(p["rescale_factor"]) - np.float32(p["mean"])) / np.float32(p["std"])
    patches, position = [], []
    for r in range(rows):
        for c in range(columns):
            for y in range(merge * r, merge * (r + 1)):
                for x in range(merge * c, merge * (c + 1)):
                    patch = normal[y * side : (y + 1) * side, x * side : (x + 1) * side].transpose(2, 0, 1)
                    patches.append(np.stack([patch] * p["temporal_patch_size"], axis=1).ravel())
                    position.append((y, x))
    return np.stack(patches)[None], np.array(position, np.int32), (rows, columns)


def picture_positions(start: int, rows: int, columns: int) -> Array:
    return np.array([(start, start + r, start + c) for r in range(rows) for c in range(columns)]).T


def priorities(positions: Array, m: dict[str, Any]) -> Array:
    half = m["decoder"]["head_dim"] // 2
    frequencies = m["rotary"]["theta"] ** (-2 * np.arange(half, dtype=np.float64) / m["decoder"]["head_dim"])
    angles = positions[:, :, None] * frequencies
    n = round(m["selection"]["ivc_fraction"] * positions.shape[1])
    lists = []
    for means in (np.cos(angles).mean(axis=(0, 2)), np.sin(angles).mean(axis=(0, 2))):
        rounded = [round(float(mean), 9) for mean in means]
        lists.append(sorted(range(len(rounded)), key=lambda token: -rounded[token])[:n])
    merged = list(dict.fromkeys(token for pair in zip(*lists, strict=True) for token in pair))
    priority = np.zeros(positions.shape[1], np.float32)
    for rank, token in enumerate(merged):
        priority[token] = 32768 - rank
    return priority


def test_the_picture_becomes_the_recorded_patches(files: Files) -> None:
    pixels = np.asarray(PIL.Image.open(files.folder / "testdata" / files.index["picture"]))
    values, position, (rows, columns) = preprocess(pixels, files.manifest["preprocessing"])
    recorded = files.tensors("prefill", "vision", "inputs")
    assert np.abs(values - recorded["pixel_values"]).max() < PIXEL_TOLERANCE
    np.testing.assert_array_equal(position, recorded["patch_position"])
    assert files.index["grid"] == {"time": 1, "rows": rows, "columns": columns}


@pytest.mark.parametrize(("width", "height"), [(448, 336), (100, 37), (1000, 130), (20, 20), (61, 900)])
def test_the_resampling_of_the_docs_is_pillows(width: int, height: int) -> None:
    source = PIL.Image.open(SHAPES).convert("RGB").resize((width, height), PIL.Image.Resampling.NEAREST)
    pixels = np.random.default_rng(0).integers(-40, 40, (height, width, 3)) + np.asarray(source)
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    wide = resample_rows(pixels.transpose(1, 0, 2), 84).transpose(1, 0, 2)
    wanted = PIL.Image.fromarray(pixels)
    for size in ((84, height), (84, 140)):  # one axis a call: Pillow 13 chooses the order by the shape
        wanted = wanted.resize(size, PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resample_rows(wide, 140), np.asarray(wanted))


def test_the_prompt_becomes_the_recorded_inputs(files: Files) -> None:
    m, recorded = files.manifest, files.tensors("prefill", "prefix", "inputs")
    ids = np.array(files.index["prompt_tokens"])
    visual = np.flatnonzero(ids == m["tokens"]["image"])
    rows, columns = files.index["grid"]["rows"], files.index["grid"]["columns"]
    first, end = int(visual[0]), int(visual[-1]) + 1
    behind = first + max(rows, columns)
    text_behind = np.arange(behind, behind + len(ids) - end)
    picture = picture_positions(first, rows, columns)
    positions = np.concatenate([np.tile(np.arange(first), (3, 1)), picture, np.tile(text_behind, (3, 1))], axis=1)
    table = m["embedding"]
    embedding = np.memmap(files.folder / table["file"], "<f4", "r", table["offset"], tuple(table["shape"]))
    embeds = embedding[ids]
    embeds[visual] = files.tensors("prefill", "vision", "outputs")["image_embeds"][0]
    wanted = {
        "position_ids": positions[:, None],
        "visual_index": visual,
        "text_index": np.setdiff1d(np.arange(len(ids)), visual),
        "query_index": np.arange(end + m["selection"]["query_offset"], len(ids)),
        "keep_count": [max(1, round(files.index["ratio"] * len(visual)))],
        "ivc_priority": priorities(picture, m),
        "past_length": [0],
        "inputs_embeds": embeds[None],
    }
    for name, array in wanted.items():
        np.testing.assert_array_equal(recorded[name], array, err_msg=name)
    for number, token in enumerate(files.index["drawn_tokens"][:2], 1):
        step = files.tensors(f"decode-{number}", "prefix", "inputs")
        np.testing.assert_array_equal(step["inputs_embeds"][0, 0], embedding[token])
        assert step["position_ids"].ravel().tolist() == [int(text_behind[-1]) + number] * 3
        indices = [step[name].tolist() for name in ("visual_index", "text_index", "query_index", "keep_count")]
        assert (indices, step["ivc_priority"].tolist()) == ([[0], [], [0], [1]], [0.0])


def test_the_graphs_give_the_recorded_outputs(files: Files) -> None:
    for graph, info in files.manifest["graphs"].items():
        session = onnxruntime.InferenceSession(files.folder / info["file"])
        for stage in ("prefill",) if graph == "vision" else ("prefill", "decode-1", "decode-2"):
            inputs, recorded = (files.tensors(stage, graph, role) for role in ("inputs", "outputs"))
            assert list(recorded) == [tensor["name"] for tensor in info["outputs"]]
            feeds = {tensor["name"]: inputs[tensor["name"]] for tensor in info["inputs"]}
            assert len(feeds) == len(inputs)
            for name, found in zip(recorded, session.run(None, feeds), strict=True):
                if recorded[name].dtype == np.int32:
                    np.testing.assert_array_equal(found, recorded[name], err_msg=name)
                else:
                    assert np.abs(found - recorded[name]).max(initial=0) < LOGIT_TOLERANCE, name


def test_what_is_handed_on_is_what_was_given(files: Files) -> None:
    m = files.manifest
    past: dict[str, Array] = {}
    for number, stage in enumerate(("prefill", "decode-1", "decode-2")):
        prefix, decoder = (files.tensors(stage, graph, "outputs") for graph in ("prefix", "decoder"))
        before = files.tensors(stage, "decoder", "inputs")
        given = files.tensors(stage, "prefix", "inputs") | before
        for name, array in past.items():
            np.testing.assert_array_equal(given[name], array)
            assert given["past_length"].tolist() == [array.shape[2]]
        for name in ("hidden_states", "keep_index", *(n for n in prefix if n.startswith("new_"))):
            np.testing.assert_array_equal(before[name], prefix[name])
        assert before["logit_index"].tolist() == [len(prefix["keep_index"]) - 1]
        for i in range(m["decoder"]["layers"]):
            for kind in ("key", "value"):
                kept = decoder[f"{'compact' if i < m['selection_layer'] else 'new'}_{kind}.{i}"]
                name = f"past_{kind}.{i}"
                past[name] = np.concatenate([past[name], kept], axis=2) if name in past else kept
        assert int(decoder["logits"][0, 0].argmax()) == files.index["drawn_tokens"][number]


def test_every_field_of_the_manifest_is_described() -> None:
    named = set(re.findall(r"`(\w+)`", RUNTIME.read_text(encoding="utf-8")))

    def check(model: type[Frozen]) -> None:
        for name, field in model.model_fields.items():
            assert name in named, f"{model.__name__}.{name} is missing in docs/runtime.md"
            inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for kind in inner:
                if isinstance(kind, type) and issubclass(kind, Frozen):
                    check(kind)

    check(Manifest)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_testdata_of_narrow_bundles_is_of_the_same_dtypes(dtype: Any, tmp_path: Path) -> None:
    bundle = export(ExportRecipe(make_checkpoint(tmp_path / "checkpoint", dtype=dtype), tmp_path / "b", testdata=True))
    found = {str(array.dtype) for array in Recording.read(bundle.folder / "testdata").tensors.values()}
    assert found == {"float32", "int32"}


def test_a_bundle_without_tokenizer_has_testdata_too(golden: Golden, tmp_path: Path) -> None:
    bundle = export(ExportRecipe(golden.folder, tmp_path / "bundle", testdata=True))
    assert bundle.missing_processor_files()
    recording = Recording.read(bundle.folder / "testdata")
    assert recording.facts["prompt"] is None
    assert len(recording.of("prefill", "prefix")["keep_index"]) == len(recording.facts["prompt_tokens"]) - 60


def test_a_damaged_recording_is_one_sentence(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json is missing: record it again"):
        Recording.read(tmp_path)
    whole = Recording.read(files.folder / "testdata")
    whole.write(tmp_path)
    assert Recording.read(tmp_path).tensors.keys() == whole.tensors.keys()
    path = tmp_path / "prefill" / "prefix" / "outputs" / "hidden_states.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="holds an incomplete recording"):
        Recording.read(tmp_path)
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="another version"):
        Recording.read(tmp_path)
