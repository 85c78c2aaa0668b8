"""Runs vision on pictures. Where the size of a small picture comes again, its launches are one CUDA graph."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.preprocessing import Scaling
from ivc_export.errors import UserError
from ivc_export.families.pictures import PIXELS, Levels, Visual
from ivc_export.runtime.failures import known
from ivc_export.runtime.onnxruntime.fused_graphs import SMALL_VISION, FusedGraphs
from ivc_export.runtime.onnxruntime.session_options import GraphOptions
from ivc_export.runtime.onnxruntime.small_graphs import pixels_graph
from ivc_export.runtime.onnxruntime.stream import Place, Shapes, address_of, places_from
from ivc_export.runtime.onnxruntime.workspace import Inputs, PictureRows, on_host

if TYPE_CHECKING:
    from onnxruntime import OrtValue

MOST_TOKENS = 640
"""Visual tokens of a small picture. Up to about so many, a slow host takes longer to launch the kernels of Qwen2-VL's
vision than a fast GPU to run them. For more, a CUDA graph would save no time, and its scratch memory would be large."""
MOST_SIZES = 8
"""How many sizes are captured. Pictures of further sizes are launched: onnxruntime never frees a captured graph."""
REMEMBERED = 32
"""How many sizes, or forms of prefills, that came once are remembered."""

Key = tuple[Any, ...]
"""A thread, since onnxruntime captures for each of its own, and all of vision's inputs but pixels, of which it is only
the shape. So what onnxruntime computes from inputs on the host is the same wherever a graph is replayed."""


@dataclass(frozen=True)
class Capture:
    """A captured run: the number of its CUDA graph, and where it reads pixels and writes outputs."""

    number: int
    binding: Any
    pixels: Place
    outputs: Mapping[str, Place]


class PictureGraphs(FusedGraphs):
    """FusedGraphs that run vision on pictures; see there.

    Sizes come again in videos and from cameras. The first picture of a size is launched like any other.
    """

    def __init__(self, bundle: Bundle, options: GraphOptions) -> None:
        super().__init__(bundle, options)
        self._pixels: dict[Scaling, str] = {}
        """Sessions that normalise pixels, by the way they do it."""
        self._once: deque[Key] = deque(maxlen=REMEMBERED)
        self._captured: dict[Key, Capture] = {}
        self._memory: list[OrtValue] = []
        """What captured runs read inputs from and write outputs to. All that fit use the last: runs are one after the
        other, and their outputs are copied in between."""

    def see(self, picture: Visual, rows: Mapping[str, PictureRows]) -> None:
        """Run vision on a picture. It writes its outputs to rows, where the next runs find them.

        Raises:
            UserError: see run.
        """
        if not self._see_again(picture, rows):
            self.run_bound("vision", self.bind("vision", self.picture_inputs(picture), rows), wait=False)

    def _see_again(self, picture: Visual, rows: Mapping[str, PictureRows]) -> bool:
        """The same for a small picture whose size has come before, as one CUDA graph. Returns whether it was one."""
        levels = picture.levels
        if not self.captures_vision or levels is None or picture.grid.visual > MOST_TOKENS:
            return False
        others = {name: picture.inputs[name] for name in picture.inputs if name != PIXELS}
        values = ((name, array.shape, array.tobytes()) for name, array in others.items())
        key = (threading.get_ident(), levels.shape, *values)
        if key in self._captured:
            self._replay_vision(self._captured[key], levels, rows)
            return True
        if key not in self._once:
            self._once.append(key)
            return False
        if len(self._captured) == MOST_SIZES:
            return False
        with suppress(UserError, *known()):
            capture = self._prepare(levels, others, rows)
            self._replay_vision(capture, levels, rows)
            self._captured[key] = capture
            return True
        self.captures_vision = False  # memory is short, or CUDA cannot capture a part of the run
        return False

    def _prepare(
        self, levels: Levels, others: Mapping[str, npt.NDArray[Any]], rows: Mapping[str, PictureRows]
    ) -> Capture:
        """Bind a run for pictures of one size. It is captured when it first runs."""
        shapes: Shapes = {PIXELS: (levels.shape, np.float32)} | {
            name: (to.shape, to.dtype) for name, to in rows.items()
        }
        (places,) = self.captured_places([shapes])
        pixels = places.pop(PIXELS)
        inputs = {PIXELS: pixels} | {name: self.value(array) for name, array in others.items()}
        return Capture(len(self._captured) + 1, self.bind(SMALL_VISION, inputs, places), pixels, places)

    def captured_places(self, groups: Sequence[Shapes]) -> list[dict[str, Place]]:
        """Places for groups of arrays, one behind the other, that captured runs read and write between others."""
        sizes = [places_from(0, shapes)[1] for shapes in groups]
        if not self._memory or self._memory[-1].shape()[0] < sum(sizes):
            self._memory.append(self.memory((sum(sizes),), np.uint8))
        starts = accumulate(sizes, initial=int(self._memory[-1].data_ptr()))
        return [places_from(start, shapes)[0] for start, shapes in zip(starts, groups, strict=False)]

    def _replay_vision(self, capture: Capture, levels: Levels, rows: Mapping[str, PictureRows]) -> None:
        """Run what was captured on other pixels, and copy its outputs to rows."""
        assert self.stream is not None  # captures_vision says so
        self._make_pixels(levels, capture.pixels)
        self.run_bound(SMALL_VISION, capture.binding, capture.number, wait=False)
        for name, place in capture.outputs.items():
            self.stream.copy(rows[name].address, place.address, place.nbytes)

    def _make_pixels(self, levels: Levels, to: OrtValue | Place) -> None:
        """Upload levels, and write their pixels to memory on the device."""
        assert self.stream is not None
        given = self.values({"levels": levels.values})["levels"]
        self._pending.append(given)
        self.stream.make_pixels(levels, address_of(given), address_of(to))

    def picture_inputs(self, picture: Visual) -> Inputs:
        """The vision graph's inputs for a picture. Its pixels are uploaded as 8-bit levels if these are known. On a
        stream they are there for the next runs, up to one that is waited for.
        """
        levels = picture.levels
        names = [name for name in picture.inputs if name != PIXELS or levels is None]
        feeds = self.values({name: picture.inputs[name] for name in names})
        if levels is None:
            return feeds
        if self.stream:
            pixels = self.memory(levels.shape, np.float32)
            self._make_pixels(levels, pixels)
            return feeds | {PIXELS: pixels}
        scaling = Scaling(**{name: getattr(levels.scaling, name) for name in Scaling.model_fields})
        if scaling not in self._pixels:
            self._pixels[scaling] = f"pixels.{len(self._pixels)}"
            self._sessions[self._pixels[scaling]] = self._open(pixels_graph(scaling))
        outer, channels, _, inner = levels.values.shape
        extents = {"expanded": (outer, channels, levels.frames, inner), "shape": levels.shape}
        inputs = {"levels": self.value(levels.values)}
        inputs |= {name: on_host(np.array(extent, np.int64)) for name, extent in extents.items()}
        name = self._pixels[scaling]
        return feeds | self.run(name, self.bind(name, inputs, {}), wait=False)
