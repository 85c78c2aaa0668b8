"""Pictures in two views: whole in one tile, and larger in several tiles, with separators between rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import PIL.Image

from ivc_export.contract.preprocessing import Preprocessing, ViewPreprocessing
from ivc_export.contract.records import Depth, Frozen, Heads, SideLength, Width
from ivc_export.families.encoder import Encoder, Preparation, of_kind
from ivc_export.families.pictures import Grid, NormalisedInputs, Visual, check_shape, scaled_levels, tile_levels
from ivc_export.graph.activations import gelu, gelu_tanh
from ivc_export.graph.builder import FLOAT, Graph
from ivc_export.graph.norms import layer_norm
from ivc_export.graph.vit import EncoderBlock, pixel_patches

MERGE = 2  # patches along a side of a visual token
NORM_EPSILON = 1e-6


class ViewSizes(Frozen):
    """Sizes of the vision encoder; `image` and `patch` are sides in pixels."""

    layers: Depth
    width: Width
    heads: Heads
    mlp_size: Width
    image: SideLength
    patch: SideLength

    @property
    def side(self) -> int:
        """Patches along a side of a tile. Pixels that do not fill a patch are left out."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Visual tokens along a side of a tile. The last ones may lack patches."""
        return -(-self.side // MERGE)


@dataclass(frozen=True)
class TwoViews(Preparation):
    """A picture whole in one tile, and larger in several tiles. Both views are filled up to their tiles."""

    preprocessing: ViewPreprocessing

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> TwoViews:
        """Make it from these settings.

        Raises:
            UserError: they are of another kind.
        """
        return cls(of_kind(ViewPreprocessing, preprocessing))

    def picture(self, image: PIL.Image.Image, token_id: int) -> Visual:
        """Scale a picture into both views, fill these up, normalise, and cut them into tiles.

        Source: DeepseekVLV2Processor of the model's own code.
        """
        p = self.preprocessing
        check_shape(*image.size, p.tile_pixels)
        pixels, side = p.tile_pixels, p.tile_side
        columns, rows = tiling(*image.size, p)
        whole = filled(image, pixels, pixels, p)[None, None]
        large = filled(image, columns * pixels, rows * pixels, p)
        large = large.reshape(rows, pixels, columns, pixels, 3).transpose(0, 2, 1, 3, 4)
        tiles = np.concatenate([view.reshape(-1, pixels, pixels, 3) for view in (whole, large)]).transpose(0, 3, 1, 2)
        grid = Grid(rows * side, columns * side, side, content=content(*image.size, p))
        inputs = NormalisedInputs(tile_levels(tiles, p), token_source=token_source(columns, rows, side))
        return Visual(inputs, grid, token_id)

    def scaled(self, size: tuple[int, int], grid: Grid) -> tuple[int, int]:
        """The size within the second view."""
        pixels, side = self.preprocessing.tile_pixels, self.preprocessing.tile_side
        return within(size, grid.columns // side * pixels, grid.rows // side * pixels)

    def stock_inputs(self, visual: Visual) -> dict[str, npt.NDArray[Any]]:
        """The same tiles, and how many columns and rows of them the second view has."""
        side = self.preprocessing.tile_side
        shape = np.array([[visual.grid.columns // side, visual.grid.rows // side]])
        return {"pixel_values": visual.inputs["pixel_values"], "tile_shapes": shape}


def tiling(width: int, height: int, p: ViewPreprocessing) -> tuple[int, int]:
    """Columns and rows of tiles of the second view; see ViewPreprocessing."""

    def goodness(shape: tuple[int, int]) -> tuple[int, int]:
        across, down = (count * p.tile_pixels for count in shape)
        scale = min(across / width, down / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - across * down

    return max(p.shapes, key=goodness)  # of equal ones the first


def filled(image: PIL.Image.Image, width: int, height: int, p: ViewPreprocessing) -> npt.NDArray[np.uint8]:
    """A picture scaled into width x height and put in the middle, uint8 [height, width, 3].

    Source: ImageOps.pad of Pillow.
    """
    across, down = within(image.size, width, height)
    left, top = round((width - across) / 2), round((height - down) / 2)
    view = np.full((height, width, 3), p.fill, np.uint8)
    view[top : top + down, left : left + across] = scaled_levels(image, across, down, p)
    return view


def within(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture of this size after it is scaled into width x height."""
    if size[0] * height > size[1] * width:
        return width, max(1, round(size[1] / size[0] * width))
    if size[0] * height < size[1] * width:
        return max(1, round(size[0] / size[1] * height)), height
    return width, height


def content(width: int, height: int, p: ViewPreprocessing) -> tuple[int, int, int, int]:
    """The first view's tokens that show a picture: its first row and column, and the first row and column behind it."""
    scale = min(p.tile_pixels / width, p.tile_pixels / height)
    left, top = ((p.tile_pixels - int(extent * scale)) // 2 for extent in (width, height))
    right, bottom = left + int(width * scale), top + int(height * scale)
    firsts = (top // p.token_side, left // p.token_side)
    down, across = (min(p.tile_side, -(-end // p.token_side)) for end in (bottom, right))  # there are no patches beyond
    return *firsts, down, across


def token_source(columns: int, rows: int, side: int) -> npt.NDArray[np.int32]:
    """What each visual token of so many tiles is; see the contract."""
    tokens = 2 + np.arange((1 + rows * columns) * side**2).reshape(-1, side, side)
    large = tokens[1:].reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    views = [np.pad(view, ((0, 0), (0, 1))).ravel() for view in (tokens[0], large)]
    return np.concatenate([views[0], [1], views[1]]).astype(np.int32)


@dataclass(frozen=True)
class ViewEncoder(Encoder):
    """The encoder. hidden_size: width of the projector's output, which is the decoder's."""

    pictures: TwoViews
    sizes: ViewSizes
    hidden_size: int

    def graph(self, g: Graph) -> ir.Value:
        """SigLIP over tiles, the projector (2 x 2 patches for each token), and the tokens in their order with
        separators.

        Source: Zhai et al. 2023 (SigLIP); MlpProjector and prepare_inputs_embeds of the model's own code.
        """
        sizes, hidden = self.sizes, self.hidden_size
        width, side = sizes.width, sizes.side
        pixels = g.inputs["pixel_values"]
        frames = g.extent(pixels, 0)
        block = EncoderBlock(
            width=width,
            heads=sizes.heads,
            mlp_size=sizes.mlp_size,
            epsilon=NORM_EPSILON,
            activation=gelu_tanh,
            norms=("norm1", "norm2"),
            qkv=("attn.qkv",),
            out="attn.proj",
        )
        with g.scope("embeddings"):
            used = side * sizes.patch
            if used != sizes.image:
                pixels = g.op("Slice", pixels, g.ints(0, 0), g.ints(used, used), g.ints(2, 3))
            name, kernel = "visual.patch_embed.proj", (width, 3, sizes.patch, sizes.patch)
            weight = g.weight(f"{name}.weight", (width, 3 * sizes.patch**2), kernel)
            x = g.op(
                "Gemm",
                pixel_patches(g, pixels, used, sizes.patch),
                weight,
                g.weight(f"{name}.bias", (width,)),
                transB=1,
            )
            x = g.reshape(x, -1, side**2, width)
            x = g.reshape(g.op("Add", x, g.weight("visual.pos_embed", (1, side**2, width))), -1, width)
        for i in range(sizes.layers):
            with g.scope(f"layers.{i}"):
                x = block.add(g, f"visual.blocks.{i}", x, frames)
        with g.scope("projector"):
            x = layer_norm(g, x, "visual.norm", width, NORM_EPSILON)
            merged = MERGE**2 * width
            x = self._blocks(g, g.reshape(x, -1, side**2, width), frames)
            x = g.reshape(g.transpose(x, 0, 1, 3, 2), -1, merged)
            x = gelu(g, g.linear(x, "projector.linear_1", hidden, merged, bias=True))
            x = g.linear(x, "projector.linear_2", hidden, hidden, bias=True)
        with g.scope("views"):
            separators = [g.weight(f"visual.{end}_separator", (1, hidden), (hidden,)) for end in ("row", "view")]
            x = g.op("Gather", g.op("Concat", *separators, x, axis=0), g.inputs["token_source"], axis=0)
            return g.op("Unsqueeze", x, g.ints(0))

    def _blocks(self, g: Graph, x: ir.Value, frames: ir.Value) -> ir.Value:
        """Each token's 2 x 2 patches, with zeros beyond the end of a tile.

        x: [B, side^2, width]; returns [B, tokens^2, 4, width].
        """
        sizes = self.sizes
        side, tokens, padded = sizes.side, sizes.tokens, MERGE * sizes.tokens
        place = np.full((padded, padded), side**2)
        place[:side, :side] = np.arange(side**2).reshape(side, side)
        if padded > side:
            zeros = g.to_graph_dtype(g.constant(np.zeros((1, 1, 1)), FLOAT))
            row = g.op("Expand", zeros, g.op("Concat", frames, g.ints(1, sizes.width), axis=0))
            x = g.op("Concat", x, row, axis=1)
        order = place.reshape(tokens, MERGE, tokens, MERGE).transpose(0, 2, 1, 3).ravel()
        x = g.op("Gather", x, g.ints(*order.tolist()), axis=1)
        return g.reshape(x, -1, tokens**2, MERGE**2, sizes.width)
