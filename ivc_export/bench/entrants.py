"""Chooses the sides of a benchmark run, and writes its report."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ivc_export.bench.facts import machine
from ivc_export.bench.footprint import Footprints, device_counter, host_peak_bytes
from ivc_export.bench.measure import Bench, Contestant, Row, noted
from ivc_export.bench.sides import BundleSide
from ivc_export.bundle.bundle import Bundle
from ivc_export.contract.preprocessing import PatchPreprocessing
from ivc_export.errors import UserError
from ivc_export.runtime.backends import find_backend, open_session

PEERS = ("torch-eager", "torch-compiled")


@dataclass(frozen=True)
class Entrants:
    """Who takes part. backends: names of runtimes. peers: keys of PEERS, which run the stock model in `checkpoint`."""

    backends: Sequence[str]
    peers: Sequence[str] = ()
    checkpoint: Path | None = None
    compile_prefill: bool = False
    """Whether torch-compiled compiles its prefill too."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of open_session. Each backend gets those that it takes."""


def check_entrants(entrants: Entrants) -> None:
    """Check, before any work, that every side can run here.

    Raises:
        UserError: there is no such backend or peer, torch is missing, or no side takes an option that was given.
    """
    backends = [find_backend(name) for name in entrants.backends]
    for option in entrants.options:
        if not any(backend.takes(option) for backend in backends):
            raise UserError(f"{', '.join(entrants.backends)} takes no {option}: leave it out")
    for name in entrants.peers:
        if name not in PEERS:
            raise UserError(f"there is no peer {name}: give one of {', '.join(PEERS)}")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if entrants.peers and missing:
        raise UserError(
            f"ivc-bench --against needs {' and '.join(missing)}: install ivc-export[check], or leave out --against"
        )


def open_contestants(
    bundle: Bundle, entrants: Entrants, progress: Callable[[str], None], failures: dict[str, str] | None = None
) -> list[Contestant]:
    """Open every side, and measure its memory meanwhile.

    failures: collects sides that cannot be opened, if the run can go on without them.

    Raises:
        UserError: see open_session, check_entrants and oracle.check_same_model.
    """
    check_entrants(entrants)
    cuda = bool(entrants.peers) or any(find_backend(name).device == "cuda" for name in entrants.backends)
    counter = device_counter() if cuda else None
    found: list[Contestant] = []
    for name in entrants.backends:
        progress(f"opening {name}")
        with noted(failures, name):
            memory = Footprints(counter)
            with memory.grow():
                backend = find_backend(name)
                options = {key: value for key, value in entrants.options.items() if backend.takes(key)}
                side = BundleSide(open_session(bundle, name, **options))
            found.append(Contestant(side, memory))
    if entrants.peers and entrants.checkpoint is not None:
        progress("opening the checkpoint in PyTorch")
        with noted(failures, "PyTorch"):
            from ivc_export.bench import peers
            from ivc_export.verify.oracle import check_same_model

            check_same_model(bundle, entrants.checkpoint)
            memory = Footprints(counter)
            with memory.grow():
                model = peers.load(entrants.checkpoint)
            for name in entrants.peers:
                more = {"compile_prefill": entrants.compile_prefill} if name == "torch-compiled" else {}
                found.append(Contestant(peers.PEERS[name](bundle, model, **more), memory.copy()))
    return found


def report(bench: Bench, contestants: Sequence[Contestant], rows: Sequence[Row], command: str) -> dict[str, Any]:
    """The content of the file of --json. Times are in milliseconds, sizes in bytes."""
    m = bench.bundle.manifest
    settings: Mapping[str, Any] = asdict(bench.settings)
    return {
        "command": command,
        **machine(any(one.side.device == "cuda" for one in contestants)),
        "bundle": {
            "family": m.family,
            "dtype": m.dtype,
            "layers": m.decoder.layers,
            "selection_layer": m.selection_layer,
            "parameters": dict(bench.workload.parameters),
            "weight_bytes": sum(file.size for file in m.weights),
            "pictures": "patches" if isinstance(m.preprocessing, PatchPreprocessing) else "tiles",
        },
        "settings": {**settings, "ratios": bench.settings.all_ratios},
        "sides": {one.side.name: one.side.notes for one in contestants if one.side.notes},
        "ceilings": [
            {
                "device": device,
                "dtype": dtype,
                "copy_gb_per_second": round(found.bytes_per_second / 1e9, 2),
                "matmul_tflops": round(found.flops_per_second / 1e12, 3),
                "source": found.source,
            }
            for (device, dtype), found in bench.ceilings.items()
        ],
        "process_peak_bytes": host_peak_bytes(),
        "rows": [row.to_dict() for row in rows],
        "failures": bench.failures or {},
    }
