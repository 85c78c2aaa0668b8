from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from safetensors.numpy import load_file, save_file

from ivc_export.bundle.bundle import Bundle
from ivc_export.exporter.pipeline import export
from ivc_export.exporter.recipe import ExportRecipe
from ivc_export.families.pictures import Grid, Visual
from ivc_export.families.views import token_source
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from samples.make_sample import make_checkpoint

GOLDENS = Path(__file__).parent / "goldens"
SHAPES = Path(__file__).parent.parent / "samples" / "pictures" / "shapes.png"

LOGIT_TOLERANCE = 1e-4
"""Logits in float32 against the official code and PyTorch: order of summation; 16 steps measured at 2e-5."""

SCORE_TOLERANCE = 1e-6
"""Selection scores in float32, which are means of probabilities: order of summation; measured below 2e-7."""

PIXEL_TOLERANCE = 1e-6
"""Normalised pixels: both sides round once in float32 after the same resize."""


def patch_positions(grid: Grid, merge: int = 2) -> npt.NDArray[np.int32]:
    """Row and column of each patch, merge blocks row-major: written out as loops, unlike the product's code."""
    return np.array(
        [
            (merge * row + y, merge * column + x)
            for row in range(grid.rows)
            for column in range(grid.columns)
            for y in range(merge)
            for x in range(merge)
        ],
        np.int32,
    )


def rows_first(
    image: PIL.Image.Image,
    size: tuple[int, int],
    resample: int,
    *_: object,
    whole: Any = PIL.Image.Image.resize,
    **__: Any,
) -> PIL.Image.Image:
    """Pillow up to 12, which models were trained with; from 13 on it takes columns first for some shapes."""
    one = whole(image, (size[0], image.height), resample)
    return whole(one, size, resample)  # type: ignore[no-any-return]


def random_picture(grid: Grid, seed: int) -> Visual:
    pixels = np.random.default_rng(seed).standard_normal((1, 4 * grid.visual, 1176), np.float32)
    return Visual({"pixel_values": pixels, "patch_position": patch_positions(grid)}, grid, 503)


def make_overflowing_checkpoint(folder: Path) -> Path:
    """A tiny checkpoint whose residual sums leave float16's range, as those of some models do in a few channels."""
    checkpoint = make_checkpoint(folder)
    tensors = load_file(checkpoint / "model.safetensors")
    for layer in range(4):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"][:2] *= np.float32(2.0e4)
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint


def make_large_embeddings(folder: Path) -> Path:
    """A tiny checkpoint whose token 5 has an embedding beyond float16's range."""
    checkpoint = make_checkpoint(folder)
    tensors = load_file(checkpoint / "model.safetensors")
    assert "lm_head.weight" in tensors  # not the same matrix
    tensors["model.embed_tokens.weight"][5, 3] = -1e5
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint


@dataclass(frozen=True)
class Golden:
    """A whole-model golden: the official code's inputs and outputs."""

    folder: Path
    data: dict[str, npt.NDArray[np.float32]]

    @property
    def tokens(self) -> list[int]:
        return [int(token) for token in self.data["input_ids"][0]]

    @property
    def kept(self) -> int:
        """Visual tokens that the official code kept."""
        return len(self.data["keep_indices"]) - len(self.tokens) + int(self.data["visual_len"])

    @property
    def cache_lengths(self) -> list[int]:
        """Rows of each layer's pruned cache: before the first decode step, where the official code prunes only then."""
        lazy = self.data.get("pruned_first_decode_kv_lengths")
        return (self.data["prefill_kv_lengths"] if lazy is None else lazy - 1).tolist()  # type: ignore[no-any-return]

    @property
    def picture(self) -> Visual:
        token = int(self.data["input_ids"][0, self.data["visual_start"]])
        if "aspect_ratio" in self.data:  # tiles
            columns, rows = (16 * int(tiles) for tiles in self.data["aspect_ratio"])
            return Visual({"pixel_values": self.data["pixel_values"]}, Grid(rows, columns, 16), token)
        if "images_spatial_crop" in self.data:  # two views
            columns, rows = self.data["images_spatial_crop"].ravel().astype(int).tolist()
            shown = np.setdiff1d([15 * y + x for y in range(14) for x in range(14)], self.data["padding"])
            content = (*np.divmod(shown.min(), 15), *(np.add(np.divmod(shown.max(), 15), 1)))
            grid = Grid(14 * rows, 14 * columns, 14, content=(*map(int, content),))  # type: ignore[arg-type]
            inputs = {"pixel_values": self.data["pixel_values"][0], "token_source": token_source(columns, rows, 14)}
            return Visual(inputs, grid, token)
        if "image_grid_thw" not in self.data:  # of fixed size
            side = math.isqrt(int(self.data["visual_len"]))
            return Visual({"pixel_values": self.data["pixel_values"]}, Grid(side, side), token)
        _, rows, columns = (int(x) for x in self.data["image_grid_thw"][0])
        grid = Grid(rows // 2, columns // 2)
        inputs = {"pixel_values": self.data["pixel_values"][None], "patch_position": patch_positions(grid)}
        return Visual(inputs, grid, token)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded, also where they ran in other processes."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def golden() -> Golden:
    folder = GOLDENS / "model" / "qwen2_vl"
    return Golden(folder, dict(np.load(folder / "input-00.npz")))


@pytest.fixture(scope="session")
def golden_bundle(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("golden") / "bundle"
    return export(ExportRecipe(golden.folder, output, layer=int(golden.data["ivcp_k"])))


@pytest.fixture(scope="session")
def golden_session(golden_bundle: Bundle) -> OnnxSession:
    return OnnxSession(golden_bundle)


@pytest.fixture(scope="session")
def sample_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sample") / "checkpoint")


@pytest.fixture(scope="session")
def sample_bundle(sample_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(ExportRecipe(sample_checkpoint, tmp_path_factory.mktemp("sample") / "bundle"))


@pytest.fixture(scope="session")
def sample_session(sample_bundle: Bundle) -> OnnxSession:
    return OnnxSession(sample_bundle)
