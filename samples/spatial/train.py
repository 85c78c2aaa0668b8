"""Train Spatial-VL on one GPU.

    python -m samples.spatial.train --steps 6600 --output FIRST [--stop-after SECONDS]
    python -m samples.spatial.train --start FIRST --steps 1600 --rate 6e-4 --output SECOND

A run saves its state in the output folder from time to time, and when it is stopped; the same command resumes it.
Pictures and questions are drawn during training, seeded by the number of the step, so a resumed run sees the same ones.
The first phase trains answers, and extra heads by which each visual token names what it shows; these heads are then
dropped. The second phase hides a random part of the visual tokens, as pruning does.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from samples.spatial.batches import Batch, Batches, frame
from samples.spatial.checkpoint import write_checkpoint
from samples.spatial.held_out import Answering, held_out
from samples.spatial.language import word_tokenizer
from samples.spatial.learning import Muon, Probe, loss_of
from samples.spatial.network import CONFIG, Network

AUXILIARY = 0.5
"""Weight of the extra heads at the start of the first phase; it falls to a tenth."""
WARMUP = 300
SAVED_EVERY = 2000


@dataclass
class TrainingRun:
    """What is trained, and how far."""

    network: Network
    probe: Probe
    optimizers: list[torch.optim.Optimizer]
    step: int = 0

    @staticmethod
    def start(arguments: argparse.Namespace, device: torch.device) -> TrainingRun:
        """Fresh weights or given ones, or what an earlier call saved."""
        network, probe = Network(), Probe(CONFIG["hidden_size"])
        network.reset(arguments.seed)
        if arguments.start:
            network.load_state_dict(load_file(arguments.start / "model.safetensors"))
        network, probe = network.to(device), probe.to(device)
        matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and "embed" not in name]
        inside = set(map(id, matrices))
        others = [p for p in (*network.parameters(), *probe.parameters()) if id(p) not in inside]
        muon = Muon(matrices, lr=arguments.rate, momentum=0.95, weight_decay=0.05)
        adam = torch.optim.AdamW(others, lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0.0)
        run = TrainingRun(network, probe, [muon, adam])
        if (arguments.output / "state.pt").exists():
            state = torch.load(arguments.output / "state.pt", map_location=device)
            run.step = state["step"]
            network.load_state_dict(state["network"])
            probe.load_state_dict(state["probe"])
            for optimizer, kept in zip(run.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            print(f"resuming at step {run.step}", flush=True)
        return run

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all."""
        state = {"step": self.step, "network": self.network.state_dict(), "probe": self.probe.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, folder / "state.partial")
        (folder / "state.partial").replace(folder / "state.pt")

    def learn(self, batch: Batch, shared: tuple[list[int], list[int]], arguments: argparse.Namespace) -> Tensor:
        """One step; the rate rises, then falls linearly to zero. Returns the two losses."""
        progress, warm = self.step / arguments.steps, min(1.0, (self.step + 1) / WARMUP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = arguments.rate * warm * (1 - progress)
        auxiliary = 0.0 if arguments.start else AUXILIARY * (1 - 0.9 * progress)
        on_gpu = batch.tokens.is_cuda
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=on_gpu):
            answers, shown = loss_of(self.network, self.probe, batch, shared, hide=bool(arguments.start))
        torch.autograd.backward(answers + auxiliary * shown)
        torch.nn.utils.clip_grad_norm_([*self.network.parameters(), *self.probe.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.stack([answers.detach(), shown.detach()])


class Log:
    """A line every so many steps, printed and appended to log.jsonl; every fourth with held-out accuracy."""

    def __init__(self, file: TextIO, answering: Answering, each: int) -> None:
        self.file, self.answering, self.exam = file, answering, held_out("calibration", each)
        self.losses: list[Tensor] = []
        self.mark, self.waited = time.monotonic(), 0.0

    def write(self, step: int, examine: bool) -> None:
        """Write what was learned since the last line."""
        count = len(self.losses)
        answers, shown = torch.stack(self.losses).mean(0).tolist()
        seconds = time.monotonic() - self.mark
        line: dict[str, object] = {"step": step, "loss": round(answers, 4), "shown": round(shown, 4)}
        line |= {"ms_a_step": round(seconds / count * 1e3, 1), "ms_waited": round(self.waited / count * 1e3, 1)}
        if examine:
            self.answering.network.eval()
            line |= {task: round(part.accuracy, 3) for task, part in self.answering.score(self.exam).items()}
            self.answering.network.train()
        for file in (self.file, None):
            print(json.dumps(line), file=file, flush=True)
        self.losses, self.mark, self.waited = [], time.monotonic(), 0.0


def train(arguments: argparse.Namespace) -> None:
    """Train until the last step or until time is up."""
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer()
    run = TrainingRun.start(arguments, device)
    if arguments.compile:
        for block in (*run.network.visual.blocks, *run.network.model.layers):
            block.compile(dynamic=True)
    loader = DataLoader(
        Batches(tokenizer.to_str(), arguments.batch, arguments.steps, arguments.seed),
        batch_size=None,
        sampler=range(run.step, arguments.steps),
        num_workers=arguments.workers,
        prefetch_factor=4 if arguments.workers else None,
        pin_memory=device.type == "cuda",
    )
    shared, batches, began = frame(tokenizer), iter(loader), time.monotonic()
    with (arguments.output / "log.jsonl").open("a") as file:
        log = Log(file, Answering(run.network, tokenizer), arguments.exam)
        while run.step < arguments.steps:
            asked = time.monotonic()
            batch = Batch(*[tensor.to(device, non_blocking=True) for tensor in vars(next(batches)).values()])
            log.waited += time.monotonic() - asked
            log.losses.append(run.learn(batch, shared, arguments))
            stopping = time.monotonic() - began > arguments.stop_after
            pausing = stopping or run.step == arguments.steps
            if pausing or run.step % arguments.every == 0:
                log.write(run.step, examine=pausing or run.step % (4 * arguments.every) == 0)
            if pausing or run.step % SAVED_EVERY == 0:
                run.save(arguments.output)
            if stopping:
                print(
                    f"stopped after {run.step} of {arguments.steps} steps: the same command resumes the run", flush=True
                )
                return
    write_checkpoint(arguments.output, run.network.state_dict())
    print(f"the trained checkpoint is in {arguments.output}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint and the run's state")
    parser.add_argument("--start", type=Path, help="checkpoint to start from, for the second phase")
    parser.add_argument("--steps", type=int, default=12000, help="steps of the run (default: 12000)")
    parser.add_argument("--batch", type=int, default=128, help="pictures per step (default: 128)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (default: 0.002)")
    parser.add_argument("--workers", type=int, default=15, help="processes that draw pictures (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and pictures (default: 0)")
    parser.add_argument("--every", type=int, default=100, help="steps between lines of the log (default: 100)")
    parser.add_argument(
        "--exam", type=int, default=30, help="held-out questions of each task to test with (default: 30)"
    )
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, help="seconds after which the run stops and can be resumed"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the network with torch.compile"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
