"""The range of pixels, and their type where a vision graph takes them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ivc_export.contract.preprocessing import Scaling


def pixel_bounds(scaling: Scaling) -> npt.NDArray[np.float64]:
    """The least and the largest value of each channel of a normalised picture, [2, 3]."""
    pixels = np.array([[0.0], [255.0]])
    bounds: npt.NDArray[np.float64] = (pixels * scaling.rescale_factor - np.array(scaling.mean)) / np.array(scaling.std)
    return bounds


def take_float32(vision: ir.Model) -> None:
    """Let a vision graph take pixels in float32 and cast them itself. On the host, the cast takes tens of
    milliseconds."""
    graph = vision.graph
    (pixels,) = [value for value in graph.inputs if value.name == "pixel_values"]
    if pixels.dtype == ir.DataType.FLOAT:
        return
    given = ir.val("pixel_values", dtype=ir.DataType.FLOAT, shape=pixels.shape)
    pixels.name = "pixel_values/narrow"
    cast = ir.node("Cast", [given], {"to": int(pixels.dtype or 0)}, name="pixel_values/cast")
    graph.inputs[list(graph.inputs).index(pixels)] = given
    pixels.replace_all_uses_with(cast.outputs[0])
    cast.outputs[0].name = pixels.name
    graph.insert_before(graph[0], cast)
