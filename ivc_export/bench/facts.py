"""Describes the machine on which a measurement was made."""

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
    """Versions of packages, whether they are installed or only importable."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in sys.modules:
                found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return found


def gpu() -> dict[str, str] | None:
    """Name, driver and memory of the first GPU, from nvidia-smi. None without a GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    parts = [part.strip() for part in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(("name", "driver", "memory"), parts, strict=True)) if len(parts) == 3 else None


def board(root: Path = Path("/")) -> dict[str, str] | None:
    """A Jetson's module, its L4T and JetPack versions and power mode, as far as the system tells them. None
    elsewhere."""
    release = root / "etc/nv_tegra_release"
    if not release.is_file():
        return None
    found = {"l4t": release.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip("# ")}
    model = root / "proc/device-tree/model"
    if model.is_file():
        found["model"] = model.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    for name, command in (
        ("jetpack", ["dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack"]),
        ("power_mode", ["nvpmodel", "-q"]),
    ):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip():
                found[name] = " ".join(done.stdout.split())
    return found


def processor() -> str:
    """The CPU's name and how many cores this process may use."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def machine(cuda: bool) -> dict[str, Any]:
    """All facts of the machine. memory_bytes is the machine's. cuda: whether a GPU took part."""
    load = [round(value, 2) for value in os.getloadavg()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "gpu": gpu() if cuda else None,
        "board": board(),
        "cpu": processor(),
        "memory_bytes": memory,
        "load_average": load,
        "versions": versions(),
    }
