"""Runs lmms-eval with one GPU for each process: torchrun --nproc-per-node COUNT -m ivc_export.evaluate OPTIONS.

onnxruntime and TensorRT compute on the first GPU that a process sees. So each process must see only its own. The
processes communicate over the CPU.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import MutableMapping


def take_gpu(environment: MutableMapping[str, str]) -> None:
    """Leave this process only one of the visible GPUs: the one with the process's number on this machine.

    environment: torchrun's, or accelerate's.
    """
    rank, visible = int(environment.get("LOCAL_RANK", 0)), environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        environment["CUDA_VISIBLE_DEVICES"] = str(rank)
    elif visible:
        gpus = visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[rank % len(gpus)]
    environment.setdefault("ACCELERATE_USE_CPU", "true")


def main() -> None:
    """lmms-eval's command."""
    if "LOCAL_RANK" in os.environ:
        take_gpu(os.environ)
    importlib.import_module("lmms_eval.cli.dispatch").main()


if __name__ == "__main__":
    main()
