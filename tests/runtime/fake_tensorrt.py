"""A stand-in for TensorRT and a GPU: engines run in onnxruntime, on host memory by its addresses.

Only what the runtime calls is here; whether TensorRT does the same is for tests/gpu to say.
"""

from __future__ import annotations

import ctypes
import enum
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.names import GRAPH_NAMES
from ivc_export.dtypes import FloatName
from ivc_export.errors import UserError
from ivc_export.tensorrt.graphs import choose_graphs, lowered
from ivc_export.tensorrt.profiles import profile_names
from ivc_export.tensorrt.recipe import EngineRecipe
from ivc_export.tensorrt.store import RECORD, BuiltEngine, EngineRecord, engine_folder, make_record
from tests.lowering.spelled import spell_out

Array = npt.NDArray[Any]
CAPABILITY = "9.0"
TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int32)": "INT32"}


class DataType(enum.Enum):
    FLOAT = np.float32
    HALF = np.float16
    INT32 = np.int32
    INT64 = np.int64


class HostDevice:
    """Host memory in the place of a device's, with a guard behind every allocation."""

    stream = 7
    GUARD = 64

    def __init__(self) -> None:
        self.memory: dict[int, tuple[Array, int]] = {}
        self.downloads: list[int] = []
        self.replays = 0

    def allocate(self, size: int) -> int:
        block = np.full(size + self.GUARD, 0xA5, np.uint8)
        block[:size] = 0
        self.memory[block.ctypes.data] = (block, size)
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        block, size = self.memory.pop(address)
        assert (block[size:] == 0xA5).all(), "something wrote behind its memory"

    def check(self) -> None:
        for block, size in self.memory.values():
            assert (block[size:] == 0xA5).all(), "something wrote behind its memory"

    def upload(self, address: int, array: Array) -> None:
        assert array.flags.c_contiguous
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def write(self, address: int, size: int, fill: Callable[[Array], object]) -> None:
        fill(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))

    def download(self, address: int, array: Array) -> None:
        self.downloads.append(array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def look(self, address: int, size: int) -> Array:
        found = np.empty(size, np.uint8)
        self.download(address, found)
        return found

    def copy(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    def copy_blocks(self, target: int, target_step: int, source: int, source_step: int, size: int, count: int) -> None:
        for number in range(count):
            ctypes.memmove(target + number * target_step, source + number * source_step, size)

    def synchronize(self) -> None:
        pass

    def seconds(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def capture(self, work: Callable[[], object]) -> Callable[[], object] | None:
        """Runs that begin meanwhile are not done, but kept with their shapes and addresses."""
        runs: list[Callable[[], object]] = []
        Context.captured = runs
        try:
            work()
        except UserError:
            return None
        finally:
            Context.captured = None

        def replay() -> None:
            self.replays += 1
            for run in runs:
                run()

        return replay


class Context:
    """An execution context for one profile. It cannot be captured until it has run with the newest shapes."""

    captured: list[Callable[[], object]] | None = None
    """Runs of the capture that is under way."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.started, self.fresh = engine, 0, True
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.device_memory = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index < 2

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = self.engine.shapes[name]
        self.shapes[name], self.fresh = shape, True
        return len(wanted) == len(shape) and all(
            isinstance(w, str) or w == s for w, s in zip(wanted, shape, strict=True)
        )

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def array(self, name: str, shape: tuple[int, ...]) -> Array:
        dtype = np.dtype(self.engine.get_tensor_dtype(name).value)
        size = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        axes: dict[str, int] = {}
        for key, shape in self.shapes.items():
            axes |= {a: s for a, s in zip(self.engine.shapes[key], shape, strict=True) if isinstance(a, str)}
        if "keep_count" in self.shapes and "T" in axes:
            axes["M"] = axes["T"] + int(self.array("keep_count", (1,))[0])
            among, least = (axes["V"], 0) if "V" in axes else (axes.get("H", axes["L"]), 1)
            axes["seeds"] = max(least, round(among / 100))
        if "keep_index" in self.shapes:
            axes["M"] = self.shapes["keep_index"][0]
        if "patches" in axes:
            axes["visual"] = axes["patches"] // 4
        return tuple(axes.get(a, -1) if isinstance(a, str) else a for a in self.engine.shapes[name])

    def execute_async_v3(self, stream: int) -> bool:
        assert self.device_memory and stream == HostDevice.stream
        if self.shapes.keys() != {*self.engine.inputs} or self.addresses.keys() != {*self.engine.names}:
            return False
        self.started += 1
        if self.captured is not None:
            self.captured.append(partial(self.compute, {**self.shapes}, {**self.addresses}))
            return not self.fresh
        self.fresh = False
        self.compute(self.shapes, self.addresses)
        return True

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Run with these shapes of inputs, and these addresses of all tensors."""
        bound, (self.shapes, self.addresses) = (self.shapes, self.addresses), (shapes, addresses)
        feeds = {name: self.array(name, shape).copy() for name, shape in self.shapes.items()}
        outputs = self.engine.session.run(None, feeds)
        for tensor, value in zip(self.engine.session.get_outputs(), outputs, strict=True):
            assert value.shape == self.get_tensor_shape(tensor.name), tensor.name
            memory = np.ascontiguousarray(value)
            ctypes.memmove(self.addresses[tensor.name], memory.ctypes.data, memory.nbytes)
        self.shapes, self.addresses = bound


class FakeEngine:
    device_memory_size = 1024

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.inputs = [tensor.name for tensor in session.get_inputs()]
        tensors = [*session.get_inputs(), *session.get_outputs()]
        self.names: list[str] = [tensor.name for tensor in tensors]
        self.shapes = {tensor.name: tuple(tensor.shape) for tensor in tensors}
        self.types = {tensor.name: DataType[TYPES[tensor.type]] for tensor in tensors}
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.shapes[name])

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.types[name]

    def get_tensor_mode(self, name: str) -> Any:
        return FakeTensorrt.TensorIOMode.INPUT if name in self.inputs else "output"

    def create_execution_context_without_device_memory(self) -> Context:
        return Context(self)


class FakeTensorrt:
    """The module `tensorrt`, as of version 8.6."""

    __version__ = "8.6.0"

    class ILogger:
        ERROR = 1

        def __init__(self) -> None:
            pass

    class TensorIOMode:
        INPUT = "input"

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def Runtime(self, logger: Any) -> FakeTensorrt:  # noqa: N802
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        if not plan.startswith(b"\x08"):  # an ONNX file begins with its IR version
            return None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.bundle.folder)
        )
        return FakeEngine(onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"]))


def put_engines(
    bundle: Bundle, dtype: FloatName = "float32", plugin: Path | None = None, **maxima: Any
) -> EngineRecord:
    """Write what ivc-build would, with graphs in the place of plans; returns the record.

    plugin: a file that stands for its library; the plugin's nodes are spelled out.
    """
    recipe = EngineRecipe(dtype=dtype, opt_visual=1, opt_text=1, plugin=plugin, **maxima)
    choices = choose_graphs(bundle, recipe, FakeTensorrt, CAPABILITY)
    folder = engine_folder(bundle, FakeTensorrt, "tensorrt", CAPABILITY)
    folder.mkdir(parents=True, exist_ok=True)
    built = {}
    for name in GRAPH_NAMES:
        model = lowered(bundle, name, choices)
        if plugin is not None:
            spell_out(model)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.LazyTensor):  # converted weights have no file
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        plan = ir.to_proto(model).SerializeToString()
        (folder / f"{name}.plan").write_bytes(plan)
        built[name] = BuiltEngine(file=f"{name}.plan", bytes=len(plan), profiles=profile_names(name))
    record = make_record(bundle, recipe, FakeTensorrt, CAPABILITY, choices).model_copy(update={"engines": built})
    (folder / RECORD).write_text(record.model_dump_json(), encoding="utf-8")
    return record


def folder_of(bundle: Bundle) -> Path:
    return engine_folder(bundle, FakeTensorrt, "tensorrt", CAPABILITY)
