"""Reads picture files into RGB pictures, as Pillow converts them. Files that cannot be read exactly are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from ivc_export.errors import UserError

PIXELS = 80_000_000
"""The most pixels of a picture file. Pillow takes 320 MB for them, twice as much while it converts a picture to RGB,
rotates or scales it, and three times as much for a strip. A model gets a million."""

CONVERTED = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"))
"""Pillow's modes that become RGB. Others have more than 8 bits for each channel, or a colour space that needs a
profile."""

SIXTEEN_BITS = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))

Note = Callable[[str], None]
"""Called with a sentence about what was done to a picture."""


def no_note(sentence: str) -> None:
    """Say nothing."""


def open_picture(image: Path | PIL.Image.Image, note: Note = no_note) -> PIL.Image.Image:
    """Read an RGB picture, and apply its EXIF orientation.

    Raises:
        UserError: the file is missing, is not a picture, or its colours are not clear; see check_picture.
    """
    if isinstance(image, Path) and not image.is_file():
        raise UserError(f"there is no picture at {image}: check the path")
    try:
        with warnings.catch_warnings():
            # Pillow itself refuses more than twice the limit
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(image) if isinstance(image, Path) else nullcontext(image) as opened:
                check_picture(opened, str(image) if isinstance(image, Path) else "the picture", note)
                return upright(opened)
    except UserError:
        raise
    except Exception as error:  # damaged files make Pillow's readers raise almost anything
        raise UserError(f"{image} cannot be read as a picture ({error}): give a PNG or JPEG file") from error


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in RGB with its EXIF orientation applied. It is the same object if nothing changes."""
    image.load()
    if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_picture(image: PIL.Image.Image, name: str, note: Note = no_note) -> None:
    """Check, before pixels are decoded, that the picture is not ambiguous and does not take too much memory.

    note: called if other programs may show the picture in other colours.

    Raises:
        UserError: it is one pixel, too large, animated, or in colours that Pillow does not turn into RGB.
    """
    width, height = image.size
    if max(width, height) < 2:
        raise UserError(f"{name} is a single pixel, which shows nothing: give a larger picture")
    if width * height > PIXELS:
        raise UserError(
            f"{name} has {width * height / 1e6:.0f} megapixels, but the limit is {PIXELS / 1e6:.0f}: scale it down"
        )
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones store previews behind the picture
        raise UserError(f"{name} has {image.n_frames} frames: give one frame as a picture")  # type: ignore[attr-defined]
    if image.mode == "CMYK":
        note(f"{name} is CMYK. It is converted to RGB without its colour profile, so its colours are approximate")
    elif image.mode in SIXTEEN_BITS:
        note(f"{name} has 16 bits per pixel. Values above 255 become white: convert it to 8 bits if that matters")
    elif image.mode not in CONVERTED:
        raise UserError(f"{name} has colours of mode {image.mode}: convert it to RGB with 8 bits a channel")
