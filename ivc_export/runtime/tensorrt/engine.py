"""One TensorRT engine, its execution contexts, and its inputs and outputs on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ivc_export.contract.graphs import TensorName
from ivc_export.contract.manifest import GraphInfo
from ivc_export.contract.names import GraphName
from ivc_export.dtypes import DTYPES
from ivc_export.errors import UserError
from ivc_export.runtime.tensorrt.device import Buffers, Device

TYPES = {one.tensorrt: one.numpy for one in DTYPES.values()}
"""NumPy's types, by TensorRT's names."""
"""NumPy's types by the names of TensorRT's."""
HANDED_OVER = {"image_embeds": "inputs_embeds"}
"""Outputs that are copied into an input of another name."""
REBUILD = "build the engines again with ivc-build"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor in device memory, or in host memory if TensorRT reads a shape from it."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    head_step: int | None = None
    """Bytes from head to head, for rows [1, heads, rows, size] within a cache. None if heads follow each other
    directly."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Engine:
    """One engine and an execution context for each of its profiles.

    info: the graph from which it was built, whose tensors it must have; None for an engine that belongs to no bundle.

    Raises:
        UserError: TensorRT cannot load it, or it is of another graph.
    """

    def __init__(
        self,
        trt: Any,
        path: Path,
        profiles: Sequence[str],
        device: Device,
        runtime: Any,
        info: GraphInfo | None = None,
    ) -> None:
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise UserError(f"{path} does not load in TensorRT {trt.__version__}: build it here with ivc-build")
        self._name, self.device = path.stem, device
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        types = {name: self._engine.get_tensor_dtype(name).name for name in names}
        for name, kind in types.items():
            if kind not in TYPES:
                raise UserError(
                    f"{path} has {name} in {kind}, a type that no graph of ivc-export has: build it with ivc-build"
                )
        self.dtypes = {name: TYPES[kind] for name, kind in types.items()}
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        self._shapes: dict[str, tuple[int | str, ...]] = {}  # of outputs, as the contract has them
        if info is not None:
            self._check(info, path)
            self._shapes = {tensor.name: tensor.shape for tensor in info.outputs}
        strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)  # from TensorRT 10 on
        if strategies is not None:
            contexts = [self._engine.create_execution_context(strategies.USER_MANAGED) for _ in profiles]
            self.scratch = int(self._engine.device_memory_size_v2)
        else:
            contexts = [self._engine.create_execution_context_without_device_memory() for _ in profiles]
            self.scratch = int(self._engine.device_memory_size)
        for number, context in enumerate(contexts):
            if context is None or not context.set_optimization_profile_async(number, device.stream):
                raise UserError(f"TensorRT cannot prepare {path}: check that the GPU has memory left")
        self.contexts = dict(zip(profiles, contexts, strict=True))

    def _check(self, info: GraphInfo, path: Path) -> None:
        """Compare its tensors with the graph's: inputs that it reads, all outputs, their types and known sizes."""
        wanted = {tensor.name: tensor for tensor in (*info.inputs, *info.outputs)}
        strange = {*self._inputs} - {t.name for t in info.inputs} or {*self._outputs} ^ {t.name for t in info.outputs}
        for name in self.dtypes:
            if name in wanted and not strange:
                shape, graph = tuple(self._engine.get_tensor_shape(name)), wanted[name].shape
                same = len(shape) == len(graph) and all(
                    isinstance(axis, str) or extent in (-1, axis) for extent, axis in zip(shape, graph, strict=True)
                )
                if not same or (self.dtypes[name] == np.int32) != (wanted[name].dtype == "int32"):
                    strange = {name}
        if strange:
            raise UserError(
                f"{path} is not an engine of this bundle's {path.stem} graph (its {min(strange)} differs): build "
                "it with ivc-build"
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of its outputs."""
        return tuple(self._outputs)

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its inputs, with -1 for sizes that a run decides."""
        return {name: tuple(self._engine.get_tensor_shape(name)) for name in self._inputs}

    def use_scratch(self, address: int) -> None:
        """Let all contexts share `scratch` bytes of memory: they run one after the other."""
        for context in self.contexts.values():
            if hasattr(context, "set_device_memory"):
                context.set_device_memory(address, self.scratch)
            else:
                context.device_memory = address

    def run(
        self,
        profile: str,
        inputs: Mapping[str, Tensor],
        buffers: Buffers,
        place: str,
        extents: Mapping[str, int] | None = None,
        bound: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Start a run, and return its outputs, which are in `buffers` under `place`. It does not wait for the run.

        inputs: by name; those that the engine does not read are left out. extents: sizes of the graph's symbolic axes,
        which outputs must have; the engine decides the others. bound: outputs at addresses that the caller chose.

        Raises:
            UserError: an input does not fit the engine's profile, an output does not fit the graph, or TensorRT cannot
                run it.
        """
        context = self.contexts[profile]
        for name in self._inputs:
            tensor = inputs[name]
            fits = context.set_input_shape(name, tensor.shape) and context.set_tensor_address(name, tensor.address)
            if not fits:
                raise UserError(
                    f"{name} of {list(tensor.shape)} does not fit the {self._name} engine: build engines with larger "
                    "maxima"
                )
        shapes = {name: self._shape(context, name, extents or {}) for name in self._outputs}
        outputs = {}
        for name, shape in shapes.items():
            size = math.prod(shape) * self.dtypes[name].itemsize
            given = (bound or {}).get(name)
            outputs[name] = given or Tensor(buffers.get(f"{place}/{name}", size), shape, self.dtypes[name])
            if not context.set_tensor_address(name, outputs[name].address):
                raise UserError(f"TensorRT refuses the memory for {name} of the {self._name} engine: {REBUILD}")
        self.start(profile)
        return outputs

    def start(self, profile: str) -> None:
        """Start a run with the tensors of the profile's newest `run`. It does not wait for the run.

        Raises:
            UserError: TensorRT cannot run it.
        """
        if not self.contexts[profile].execute_async_v3(self.device.stream):
            raise UserError(f"TensorRT cannot run the {self._name} engine: check that the GPU has memory left")

    def _shape(self, context: Any, name: str, extents: Mapping[str, int]) -> tuple[int, ...]:
        """An output's shape, once all inputs are set. It must be known and equal the graph's."""
        try:
            shape = tuple(context.get_tensor_shape(name))
        except ValueError:  # TensorRT's Dims of unknown rank have a length of -1
            shape = (-1,)
        if any(extent < 0 for extent in shape):
            raise UserError(f"the {self._name} engine does not give the size of {name}: {REBUILD}")
        graph = self._shapes.get(name, shape)
        wanted = [extents.get(axis) if isinstance(axis, str) else axis for axis in graph]
        if len(shape) != len(wanted) or any(w not in (None, s) for w, s in zip(wanted, shape, strict=True)):
            due = ", ".join(str(axis if extent is None else extent) for axis, extent in zip(graph, wanted, strict=True))
            raise UserError(f"the {self._name} engine gives {name} of {list(shape)} instead of [{due}]: {REBUILD}")
        return shape


def check_hand_over(engines: Mapping[GraphName, Engine]) -> None:
    """Check that tensors that go from engine to engine as bytes have one dtype on both sides.

    Raises:
        UserError: they have not, so the engines were not built together.
    """
    found: dict[str, tuple[str, np.dtype[Any]]] = {}
    for engine in engines.values():
        for name, dtype in engine.dtypes.items():
            parts = TensorName.of(name)
            group = "caches" if parts.kind else HANDED_OVER.get(parts.stem, parts.stem)
            other, wanted = found.setdefault(group, (name, dtype))
            if dtype != wanted:
                raise UserError(f"{name} is {dtype} in one engine and {other} {wanted} in another: {REBUILD}")
