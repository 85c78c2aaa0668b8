"""Random pictures of coloured, textured shapes and plates with codes on cluttered grounds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageChops
import PIL.ImageDraw
import PIL.ImageFont

SHAPES = (
    "circle", "square", "triangle", "ring", "star", "cross", "diamond", "hexagon", "heart", "moon", "arrow", "bar",
)  # fmt: skip
PLATE = "plate"
COLORS = {
    "red": (214, 40, 40),
    "orange": (244, 128, 24),
    "yellow": (240, 212, 40),
    "green": (36, 150, 60),
    "cyan": (32, 196, 204),
    "blue": (36, 72, 208),
    "purple": (128, 44, 176),
    "pink": (244, 128, 188),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = {"small": (30, 44), "large": (64, 92)}
CODE_LETTERS = "ACEFHJKLMNPRTUVWXY34679"  # none looks like another
SIDES = (224, 448)
ANGLES = (-12, -8, -4, 0, 4, 8, 12)
SUPERSAMPLING = 4
MARGIN = 3


@dataclass(frozen=True)
class Item:
    """One object: its words, and its box (x0, y0, x1, y1) in pixels. Plates have a code, no texture and no size."""

    shape: str
    color: str
    texture: str
    size: str
    box: tuple[int, int, int, int]
    code: str = ""

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it."""

    picture: PIL.Image.Image
    items: tuple[Item, ...]


def outline(shape: str, side: float) -> list[tuple[float, float]]:
    """Corners of a shape that fills a square of `side`."""

    def turn(corners: int, radius: float, start: float) -> list[tuple[float, float]]:
        return [
            (math.cos(start + 2 * math.pi * i / corners) * radius, math.sin(start + 2 * math.pi * i / corners) * radius)
            for i in range(corners)
        ]

    up = -math.pi / 2
    if shape == "star":
        outer, inner = turn(5, 1.0, up), turn(5, 0.42, up + math.pi / 5)
        unit = [point for pair in zip(outer, inner, strict=True) for point in pair]
    elif shape == "heart":
        unit = []
        for i in range(40):
            t = 2 * math.pi * i / 40
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            unit.append((math.sin(t) ** 3, -(y + 2.5) / 14.5))
    else:
        unit = {
            "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
            "triangle": [(0.0, -0.9), (1.0, 0.85), (-1.0, 0.85)],
            "diamond": [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)],
            "hexagon": turn(6, 1.0, 0.0),
            "cross": [
                (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
                (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
            ],
            "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
            "bar": [(-1.0, -0.35), (1.0, -0.35), (1.0, 0.35), (-1.0, 0.35)],
        }[shape]  # fmt: skip
    return [((x + 1) * side / 2, (y + 1) * side / 2) for x, y in unit]


@functools.lru_cache(maxsize=20000)
def mask_of(shape: str, pixels: int, angle: int) -> PIL.Image.Image:
    """Coverage of a shape as an 8-bit picture, cropped to what it covers."""
    side = pixels * SUPERSAMPLING
    mask = PIL.Image.new("L", (side, side))
    draw = PIL.ImageDraw.Draw(mask)
    if shape in ("circle", "ring", "moon"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            hole = int(side * 0.24)
            draw.ellipse((hole, hole, side - 1 - hole, side - 1 - hole), fill=0)
        elif shape == "moon":
            draw.ellipse((int(side * 0.38), int(-side * 0.05), int(side * 1.3), int(side * 0.87)), fill=0)
    else:
        draw.polygon(outline(shape, side - 1), fill=255)
    mask = mask.rotate(angle, PIL.Image.Resampling.BILINEAR, expand=True)
    width, height = (math.ceil(n / SUPERSAMPLING) * SUPERSAMPLING for n in mask.size)
    padded = PIL.Image.new("L", (width, height))
    padded.paste(mask)
    small = padded.reduce(SUPERSAMPLING)
    return small.crop(small.point(lambda level: 255 if level > 96 else 0).getbbox())


@functools.lru_cache(maxsize=64)
def texture_of(texture: str, period: int) -> PIL.Image.Image:
    """Where a texture shows its second colour, 128 x 128."""
    y, x = np.mgrid[0:128, 0:128]
    half = period // 2
    on = {
        "striped": (x + y) % period < half,
        "dotted": ((x % period - half) ** 2 + (y % period - half) ** 2) <= (0.33 * period) ** 2,
        "checked": (x // half + y // half) % 2 == 0,
    }[texture]
    return PIL.Image.fromarray((on * 255).astype(np.uint8))


@functools.lru_cache(maxsize=16)
def font_of(pixels: int) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    """Pillow's own font."""
    return PIL.ImageFont.load_default(pixels)


@functools.lru_cache(maxsize=1)
def grains() -> list[PIL.Image.Image]:
    """Noise to crop grounds from."""
    generator = np.random.default_rng(7)
    found = []
    for cell in (2, 3, 4, 6, 10, 16, 28, 40):
        coarse = generator.integers(0, 256, (640 // cell + 1, 640 // cell + 1), np.uint8)
        found.append(PIL.Image.fromarray(coarse).resize((640, 640), PIL.Image.Resampling.BICUBIC))
    return found


def muted(generator: np.random.Generator) -> tuple[int, int, int]:
    """A greyish colour that no object has."""
    level = int(generator.integers(70, 225))
    red, green, blue = (level + n for n in generator.integers(-18, 19, 3).tolist())
    return red, green, blue


def draw_ground(width: int, height: int, generator: np.random.Generator) -> PIL.Image.Image:
    """Two muted colours blended by noise, with lines and blobs over it."""
    images = grains()
    grain = images[int(generator.integers(len(images)))]
    left, top = (int(n) for n in generator.integers(0, 640 - 448, 2))
    blend = grain.crop((left, top, left + width, top + height))
    first, second = (PIL.Image.new("RGB", (width, height), muted(generator)) for _ in range(2))
    ground = PIL.Image.composite(first, second, blend)
    draw = PIL.ImageDraw.Draw(ground)
    for _ in range(int(generator.integers(4, 14))):
        x0, x1 = sorted(int(n) for n in generator.integers(-40, width + 40, 2))
        y0, y1 = sorted(int(n) for n in generator.integers(-40, height + 40, 2))
        kind, color, line = int(generator.integers(3)), muted(generator), int(generator.integers(1, 6))
        if kind == 0:
            draw.line((x0, y0, x1, y1) if generator.integers(2) else (x0, y1, x1, y0), fill=color, width=line)
        elif kind == 1:
            draw.arc((x0, y0, x1 + 1, y1 + 1), int(generator.integers(360)), int(generator.integers(360)), color, line)
        else:
            draw.line((x0, y0, x0 + 14, y0 + 10, x0 + 22, y0 - 8, x0 + 40, y0), fill=color, width=line)
    return ground


def render_item(
    shape: str, color: str, texture: str, size: str, code: str, generator: np.random.Generator
) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """An object's colours and its mask."""
    jitter = generator.integers(-14, 15, 3).tolist()
    paint = tuple(min(max(level + j, 0), 255) for level, j in zip(COLORS[color], jitter, strict=True))
    if shape == PLATE:
        font = font_of(int(generator.integers(24, 33)))
        left, top, right, bottom = font.getbbox(code)
        width, height = int(right - left) + 18, int(bottom - top) + 18
        picture = PIL.Image.new("RGB", (width, height), paint)
        draw = PIL.ImageDraw.Draw(picture)
        draw.rectangle((5, 5, width - 6, height - 6), fill=(246, 246, 240))
        draw.text((9 - left, 9 - top), code, fill=(16, 16, 20), font=font)
        return picture, PIL.Image.new("L", picture.size, 255)
    low, high = SIZES[size]
    mask = mask_of(shape, int(generator.integers(low, high + 1)), ANGLES[int(generator.integers(len(ANGLES)))])
    picture = PIL.Image.new("RGB", mask.size, paint)
    if texture != "plain":
        period = int(generator.integers(4, 6 if size == "small" else 8)) * 2
        shift = int(generator.integers(0, 128 - mask.width if mask.width < 128 else 1))
        second = tuple(level * 3 // 10 for level in paint)
        picture.paste(second, mask=texture_of(texture, period).crop((shift, 0, shift + mask.width, mask.height)))
    return picture, mask


def draw_scene(generator: np.random.Generator, width: int | None = None, height: int | None = None) -> Scene:
    """A random scene; its sides are drawn from 224 to 448 pixels if not given.

    Few colours, shapes and textures are taken for each scene, so that there is something to count and to tell apart.
    """
    width = width or int(generator.integers(SIDES[0], SIDES[1] + 1))
    height = height or int(generator.integers(SIDES[0], SIDES[1] + 1))
    picture = draw_ground(width, height, generator)
    shapes = generator.choice(SHAPES, int(generator.integers(2, 6)), replace=False).tolist()
    colors = generator.choice(list(COLORS), int(generator.integers(2, 6)), replace=False).tolist()
    textures = generator.choice(TEXTURES, int(generator.integers(1, 4)), replace=False).tolist()
    count = int(generator.integers(3, 10))
    plates = int(generator.choice(3, p=(0.45, 0.4, 0.15)))
    plate_colors = generator.choice(list(COLORS), 2, replace=False).tolist()
    items: list[Item] = []
    for number in range(plates + count):
        code = ""
        if number < plates:
            shape, color, texture, size = PLATE, plate_colors[number], "", ""
            code = "".join(generator.choice(list(CODE_LETTERS), int(generator.integers(2, 5))))
        else:
            shape, color, texture = (parts[int(generator.integers(len(parts)))] for parts in (shapes, colors, textures))
            size = "small" if generator.random() < 0.6 else "large"
        paint, mask = render_item(shape, color, texture, size, code, generator)
        for _ in range(12):
            x = int(generator.integers(0, width - mask.width + 1))
            y = int(generator.integers(0, height - mask.height + 1))
            box = (x, y, x + mask.width, y + mask.height)
            if all(
                box[2] + MARGIN <= other.box[0]
                or other.box[2] + MARGIN <= box[0]
                or box[3] + MARGIN <= other.box[1]
                or other.box[3] + MARGIN <= box[1]
                for other in items
            ):
                picture.paste(paint, (x, y), mask)
                items.append(Item(shape, color, texture, size, box, code))
                break
    return Scene(picture, tuple(items))
