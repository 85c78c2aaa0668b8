"""Loads the Python packages of TensorRT and TensorRT-RTX late, and collects their messages. They share an interface."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ivc_export.errors import UserError

Target = Literal["tensorrt", "tensorrt-rtx"]
MODULES: Mapping[Target, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PACKAGES: Mapping[Target, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}


def load_tensorrt(target: Target) -> Any:
    """Import the Python package of `target`.

    Raises:
        UserError: it is not installed, or cannot be loaded.
    """
    try:
        module: ModuleType = importlib.import_module(MODULES[target])
    except ImportError as error:
        hint = " (on a Jetson, JetPack's python3-libnvinfer)" if target == "tensorrt" else ""
        raise UserError(f"{target} does not load ({error}): install {PACKAGES[target]}{hint}") from error
    return module


@contextmanager
def polygraphy(target: Target, logger: Any, what: str) -> Iterator[Any]:
    """Polygraphy's loaders for `target`, whose messages all go to `logger`. what: the beginning of an error's sentence.

    A process has them for TensorRT or for TensorRT-RTX, because Polygraphy chooses when it is imported.

    Raises:
        UserError: Polygraphy is not installed, or loaded for the other library, or it or TensorRT refuses something.
    """
    try:
        settings: Any = importlib.import_module("polygraphy.config")
        if "polygraphy.backend.trt" not in sys.modules:
            settings.USE_TENSORRT_RTX = target == "tensorrt-rtx"
        loaders: Any = importlib.import_module("polygraphy.backend.trt")
    except ImportError as error:
        raise UserError(
            f"Polygraphy does not load ({error}), but building engines needs it: install ivc-export[tensorrt]"
        ) from error
    if (target == "tensorrt-rtx") != settings.USE_TENSORRT_RTX:
        raise UserError(
            f"this process has already built for another library than {target}: build for {target} in a new process"
        )
    log = importlib.import_module("polygraphy.logger").G_LOGGER
    refusal = importlib.import_module("polygraphy.exception").PolygraphyException
    loaders.util.TRT_LOGGER = logger  # what get_trt_logger gives
    try:
        with log.verbosity(log.CRITICAL + 1):
            yield loaders
    except refusal as error:
        reason = str(logger.last or error).splitlines()[0]
        raise UserError(f"{what} ({reason}): see docs/tensorrt.md") from error


def major(trt: Any) -> int:
    """TensorRT's major version."""
    return int(trt.__version__.split(".")[0])


def version(trt: Any) -> tuple[int, int]:
    """TensorRT's major and minor version."""
    first, second = trt.__version__.split(".")[:2]
    return int(first), int(second)


def load_plugin(path: Path) -> None:
    """Load our plugin's library, which registers its operators.

    Raises:
        UserError: it is missing, or cannot be loaded.
    """
    try:
        ctypes.CDLL(str(path.resolve()), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"the plugin does not load ({error}): build it with cmake from graphs/plugin") from error


def own_capability(trt: Any) -> str:
    """This machine's compute capability, from the CUDA driver.

    Raises:
        UserError: there is no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        parts = [ctypes.c_int(), ctypes.c_int()]
        device = ctypes.c_int()
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
        for part, attribute in zip(
            parts, (75, 76), strict=True
        ):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
    except OSError:
        failed = 1
    if failed:
        raise UserError(
            "this machine has no GPU, but TensorRT builds on the GPU that runs the engines: build on that "
            "machine, or use --target tensorrt-rtx, which can build without a GPU"
        )
    return f"{parts[0].value}.{parts[1].value}"


def device_bytes() -> int | None:
    """Memory of this machine's GPU, from the CUDA driver. A Jetson shares it with programs. None without a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, size = ctypes.c_int(), ctypes.c_size_t()
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return None if failed else size.value


def make_logger(trt: Any, verbose: bool = False) -> Any:
    """A logger that keeps the last error, and prints nothing unless it is verbose."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """As trt.Logger."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            """Keep an error."""
            if verbose and severity <= trt.ILogger.INFO:
                print(f"TensorRT: {message}", file=sys.stderr)
            if severity <= trt.ILogger.ERROR:
                self.last = message.splitlines()[0]

    return Logger()
