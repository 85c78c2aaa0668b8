"""Runs prefix and decoder in a prefill. Where the form of a short one comes again, each of them is one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.manifest import Manifest
from ivc_export.contract.names import GraphName
from ivc_export.errors import UserError
from ivc_export.runtime.failures import known
from ivc_export.runtime.interface import Turn
from ivc_export.runtime.onnxruntime.fused_graphs import SHORT
from ivc_export.runtime.onnxruntime.picture_graphs import REMEMBERED, PictureGraphs
from ivc_export.runtime.onnxruntime.session_options import GraphOptions
from ivc_export.runtime.onnxruntime.stream import Place, Shapes, StageTimes, address_of, place_of
from ivc_export.runtime.onnxruntime.workspace import Arrays, DeviceCache, Inputs, Values, Workspace, on_host

if TYPE_CHECKING:
    from onnxruntime import OrtValue

MOST_ROWS = 704
"""Rows of a short prefill. Up to about so many, onnxruntime takes longer to launch the kernels of Qwen2-VL-2B's prefix
and decoder than a fast GPU to run them. For more, CUDA graphs would save little time, and their scratch memory would be
large."""
MOST_FORMS = 8
"""How many forms are captured. Prefills of further forms are launched: onnxruntime never frees a captured graph."""

Form = tuple[Any, ...]
"""A thread, since onnxruntime captures for each of its own; the capacity of caches, and which of them are read; and the
shapes and numbers from which onnxruntime computes on the host. The numbers tell how many rows the caches have."""


@dataclass(frozen=True)
class PrefillCall:
    """A run of prefix or decoder in a prefill.

    rows: inputs on the device that the runs before have made: inputs_embeds, and features for pictures' rows. arrays:
    inputs to upload. numbers: inputs that onnxruntime reads in host memory. fixed: inputs that lie in the workspace.
    """

    graph: GraphName
    cache: DeviceCache
    arrays: Arrays
    numbers: Arrays
    fixed: Inputs
    rows: Values

    def inputs(self, more: Inputs) -> Inputs:
        """All inputs, with these in the place of rows and arrays."""
        numbers = {name: on_host(array) for name, array in self.numbers.items()}
        return {**self.cache.inputs(), **self.fixed, **more, **numbers}


def calls_of(
    m: Manifest, turn: Turn, cache: DeviceCache, rows: Values, answer: Inputs
) -> tuple[PrefillCall, PrefillCall]:
    """The runs of prefix and decoder for a turn.

    rows: see PrefillCall. answer: the workspace's inputs through which decoder answers, if it does.
    """
    plan, arrays = turn.plan, turn.inputs
    count = arrays.pop("keep_count")

    def call(graph: GraphName, run: int, numbers: Arrays, fixed: Inputs, rows: Values) -> PrefillCall:
        read = {tensor.name for tensor in m.graphs[graph].inputs}
        given, lengths = {name: arrays[name] for name in arrays if name in read}, cache.lengths(run).items()
        given |= {f"seqlens_k{suffix}": np.array([length - 1], np.int32) for suffix, length in lengths}
        totals = {f"total_sequence_length{suffix}": np.array(length, np.int32) for suffix, length in lengths}
        return PrefillCall(graph, cache, given, numbers | totals, fixed, rows)

    prefix = call("prefix", plan.rows, {"keep_count": count}, {**cache.placed_rows(plan.kept)}, rows)
    decoder = call("decoder", turn.kept, {}, answer, {})
    if turn.keep_index is not None:
        decoder.arrays.update(keep_index=turn.keep_index, cache_index=cache.index(turn.keep_index))
    return prefix, decoder


@dataclass(frozen=True)
class CapturedCall:
    """A captured run: where it reads rows and arrays, and writes outputs other than caches."""

    binding: Any
    rows: Mapping[str, Place]
    arrays: Mapping[str, Place]
    outputs: Mapping[str, Place]


@dataclass(frozen=True)
class CapturedPrefill:
    """Captured runs of prefix and decoder, and the number of their CUDA graphs."""

    number: int
    prefix: CapturedCall
    decoder: CapturedCall


class PrefillGraphs(PictureGraphs):
    """PictureGraphs that run prefills; see there.

    Prompts of one length, with pictures of the same sizes, come again from cameras, in videos, and where only the
    pictures or some words change. Workspaces go from conversation to conversation, so their caches come again, too. The
    first prefill of a form is launched. The second one is captured, with all addresses and all numbers that the host
    knows. From then on, what a prefill reads is copied to where the captured runs read it.
    """

    def __init__(self, bundle: Bundle, options: GraphOptions) -> None:
        super().__init__(bundle, options)
        self._forms: dict[Form, tuple[Shapes, Shapes]] = {}
        """Outputs of prefix and decoder that are not caches, by forms that came before."""
        self._prefills = 0
        """How many are captured."""

    def prefill(
        self, workspace: Workspace, prefix: PrefillCall, decoder: PrefillCall, times: StageTimes
    ) -> tuple[Inputs, OrtValue]:
        """Run prefix and decoder in a workspace. The caller keeps both calls until it has waited for them.

        Returns prefix's outputs that are not caches, which the next prefill may overwrite, and logits.

        Raises:
            UserError: see run.
        """
        short = self.captures_prefills and prefix.arrays["position_ids"].shape[-1] <= MOST_ROWS
        form = form_of(prefix, decoder) if short else ()
        if form in self._forms and form not in workspace.prefills and self._prefills < MOST_FORMS:
            self.captures_prefills = False  # unless it can: memory may be short, or CUDA not capture a part of a run
            with suppress(UserError, *known()):
                workspace.prefills[form] = self._capture(prefix, decoder, *self._forms[form])
                self.captures_prefills = True
        if form in workspace.prefills and self.captures_prefills:
            return self._replay(workspace.prefills[form], prefix, decoder, times)
        with times.stage("prefill.prefix"):
            given = self.values(prefix.arrays)
            found = self._launch(prefix, {**prefix.rows, **given})
        with times.stage("prefill.decoder"):
            others = {name: array for name, array in decoder.arrays.items() if array is not prefix.arrays.get(name)}
            logits = self._launch(decoder, {**given, **found, **self.values(others)})
        if short:
            self._forms.pop(form, None)
            if len(self._forms) == REMEMBERED:
                del self._forms[next(iter(self._forms))]
            self._forms[form] = shapes_of(found), shapes_of(logits)
        return found, logits["logits"]

    def _launch(self, call: PrefillCall, given: Inputs) -> Values:
        """Run a graph. given: its rows and arrays on the device. Returns its outputs that are not caches."""
        caches = call.cache.outputs()
        binding = self.bind(call.graph, call.inputs(given), caches)
        found = self.run(call.graph, binding, wait=False)
        return {name: value for name, value in found.items() if name not in caches}

    def _capture(self, prefix: PrefillCall, decoder: PrefillCall, found: Shapes, logits: Shapes) -> CapturedPrefill:
        """Capture both graphs. This runs them, with no other effect than that of the run that follows."""
        rows, below, hidden, above, last = self.captured_places(
            [shapes_of(prefix.rows), arrays_of(prefix), found, arrays_of(decoder), logits]
        )
        caches = prefix.cache.outputs()
        bindings = (
            self.bind(SHORT["prefix"], prefix.inputs({**rows, **below}), caches | hidden),
            self.bind(SHORT["decoder"], decoder.inputs({**hidden, **above}), caches | last),
        )
        self._prefills += 1
        first, second = CapturedCall(bindings[0], rows, below, hidden), CapturedCall(bindings[1], {}, above, last)
        captures = CapturedPrefill(self._prefills, first, second)
        self._run_again(prefix, first, captures.number)
        self._run_again(decoder, second, captures.number)
        return captures

    def _replay(
        self, captures: CapturedPrefill, prefix: PrefillCall, decoder: PrefillCall, times: StageTimes
    ) -> tuple[Inputs, OrtValue]:
        """Run what was captured on other rows and arrays. Logits are copied to memory of their own."""
        assert self.stream is not None  # captures_prefills says so
        with times.stage("prefill.prefix"):
            self._run_again(prefix, captures.prefix, captures.number)
        with times.stage("prefill.decoder"):
            self._run_again(decoder, captures.decoder, captures.number)
            (last,) = captures.decoder.outputs.values()
            logits = self.memory(last.shape, last.dtype)
            self.stream.copy(address_of(logits), last.address, last.nbytes)
        return {**captures.prefix.outputs}, logits

    def _run_again(self, call: PrefillCall, capture: CapturedCall, number: int) -> None:
        """Copy what a run reads to where its captured run does, and replay that. The first time it is captured."""
        assert self.stream is not None and self._staging is not None
        for name, place in capture.rows.items():
            self.stream.copy(place.address, address_of(call.rows[name]), place.nbytes)
        self._staging.put(call.arrays, next(iter(capture.arrays.values())).address)
        self.run_bound(SHORT[call.graph], capture.binding, number, wait=False)


def form_of(prefix: PrefillCall, decoder: PrefillCall) -> Form:
    """The form of a prefill."""
    cache, calls = prefix.cache, (prefix, decoder)
    return (
        threading.get_ident(),
        (cache.capacity, cache.swapped),
        *((name, *value.shape()) for name, value in prefix.rows.items()),
        *((name, *array.shape) for call in calls for name, array in call.arrays.items()),
        *((name, int(array.item())) for call in calls for name, array in call.numbers.items()),
    )


def shapes_of(values: Values) -> Shapes:
    """Shapes and types of values, by name."""
    places = {name: place_of(value) for name, value in values.items()}
    return {name: (place.shape, place.dtype) for name, place in places.items()}


def arrays_of(call: PrefillCall) -> Shapes:
    """The same of a call's arrays."""
    return {name: (array.shape, array.dtype) for name, array in call.arrays.items()}
