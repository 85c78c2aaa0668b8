"""Where a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("ivc-export", "onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Versions of the packages that are installed, or imported from elsewhere."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in sys.modules:
                found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return found


def gpu() -> dict[str, str] | None:
    """Name, driver and memory of the first GPU, as nvidia-smi says; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    parts = [part.strip() for part in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(("name", "driver", "memory"), parts, strict=True)) if len(parts) == 3 else None


def processor() -> str:
    """The CPU's name and how many cores this process may use."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def machine(cuda: bool) -> dict[str, Any]:
    """All of it. cuda: whether a GPU took part."""
    load = [round(value, 2) for value in os.getloadavg()]
    return {"gpu": gpu() if cuda else None, "cpu": processor(), "load_average": load, "versions": versions()}
