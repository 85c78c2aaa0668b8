"""TensorRT's and TensorRT-RTX's Python packages, which share an interface: loaded late, and listened to."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ivc_export.errors import UserError

Target = Literal["tensorrt", "tensorrt-rtx"]
MODULES: Mapping[Target, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PACKAGES: Mapping[Target, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}


def load_tensorrt(target: Target) -> Any:
    """The Python package of `target`.

    Raises:
        UserError: it is not installed, or does not load.
    """
    try:
        module: ModuleType = importlib.import_module(MODULES[target])
    except ImportError as error:
        hint = " (on a Jetson, JetPack's python3-libnvinfer)" if target == "tensorrt" else ""
        raise UserError(f"{target} does not load ({error}): install {PACKAGES[target]}{hint}") from error
    return module


def major(trt: Any) -> int:
    """TensorRT's major version."""
    return int(trt.__version__.split(".")[0])


def load_plugin(path: Path) -> None:
    """Load our plugin's library, which registers its operators.

    Raises:
        UserError: it is missing, or does not load.
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
            "TensorRT builds on the GPU that its engines are for, and there is none: build there, or use "
            "--target tensorrt-rtx, which needs no GPU to build"
        )
    return f"{parts[0].value}.{parts[1].value}"


def make_logger(trt: Any, verbose: bool = False) -> Any:
    """A logger that keeps the last error, and prints nothing unless it is verbose."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """As trt.Logger."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            """Keep an error."""
            if verbose and severity <= trt.ILogger.INFO:
                print(f"TensorRT: {message}", file=sys.stderr)
            if severity <= trt.ILogger.ERROR:
                self.last = message.splitlines()[0]

    return Logger()
