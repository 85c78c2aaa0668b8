"""Pixels made of levels, emulated on the host."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ivc_export.contract.preprocessing import Scaling
from ivc_export.families.pictures import Levels
from ivc_export.runtime.onnxruntime.stream import Pixels
from tests.native.kernels import Kernels


def extents(levels: Levels) -> Pixels:
    outer, _, given, inner = levels.values.shape
    found = Pixels(outer, given, levels.frames, inner, levels.scaling.rescale_factor)
    found.mean[:], found.std[:] = levels.scaling.mean, levels.scaling.std
    return found


@pytest.mark.parametrize(
    ("outer", "given", "frames", "inner"), [(5, 1, 2, 196), (1, 1, 1, 333), (3, 2, 2, 7), (1, 2, 6, 64)]
)
def test_pixels_are_the_hosts(kernels: Kernels, outer: int, given: int, frames: int, inner: int) -> None:
    """To the last bit. Frames are repeated, as the host does it, if there is one."""
    scaling = Scaling(rescale_factor=1 / 255, mean=(0.48, 0.45, 0.41), std=(0.26, 0.27, 0.28))
    values = np.random.default_rng(0).integers(0, 256, (outer, 3, given, inner), np.uint8)
    levels = Levels(values, scaling, (outer, 3, frames, inner), frames)
    found = np.full(levels.shape, np.nan, np.float32)
    kernels.call("ivcScalePixels", ctypes.pointer(extents(levels)), values, found)
    one_by_one = Levels(np.tile(values, (1, 1, frames // given, 1)), scaling, levels.shape, frames)
    np.testing.assert_array_equal(found, one_by_one.pixel_values)


def test_impossible_pixels_are_refused(kernels: Kernels) -> None:
    nothing = np.zeros(1, np.uint8)
    for sizes in ((0, 1, 1, 5), (1, 0, 1, 5), (1, 2, 3, 5), (1, 1, 0, 5), (1, 1, 1, 0)):
        with pytest.raises(AssertionError, match="ivcScalePixels returned 1"):
            kernels.call("ivcScalePixels", ctypes.pointer(Pixels(*sizes)), nothing, nothing)
