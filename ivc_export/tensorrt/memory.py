"""Finds how much memory this machine has."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int | None:
    """Memory that programs can still allocate, from Linux. None on other systems."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return sum(1024 * int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree"))
