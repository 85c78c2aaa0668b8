"""What Spatial-VL learns by: losses, hidden tokens, and the optimizer of its matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.spatial.batches import CLASSES, LETTERS, UNIT, Batch, normalise
from samples.spatial.network import Network
from samples.spatial.scenes import CODE_LETTERS


class Probe(nn.Module):
    """The extra heads: what a visual token shows, and where."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = [*CLASSES.values(), *[len(CODE_LETTERS) + 1] * LETTERS]
        self.heads = nn.Linear(hidden, sum(self.sizes) + 4)

    def forward(self, image: Tensor, batch: Batch) -> Tensor:
        """Loss over image embeddings [B, L, hidden]."""
        *kinds, box = self.heads(image.float()).split([*self.sizes, 4], dim=-1)
        loss = F.l1_loss(box, batch.box, reduction="none").mean(-1)
        inside = batch.shown[..., 1] >= 0
        total = 4 * (loss * inside).sum() / inside.sum()
        for i, logits in enumerate(kinds):
            wanted = batch.shown[..., i].flatten()
            summed = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=-100, reduction="sum")
            total = total + summed / (wanted >= 0).sum().clamp(min=1)
        return total


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, matrices of one shape together; the step's scale is as Adam's.

    Source: Jordan et al. 2024 (Newton-Schulz coefficients); Liu et al. 2025, arXiv 2502.16982, eq. 4 (scale).
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix once."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
                state = self.state[matrices[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradients)
                average = state["momentum"].mul_(group["momentum"]).add_(gradients)
                update = orthogonal(gradients.add(average, alpha=group["momentum"]).flatten(2)).view(-1, *shape)
                scale = 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                for matrix, change in zip(matrices, update, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrices, by five Newton-Schulz steps in bfloat16.

    matrices: [n, rows, columns].
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return cast(Tensor, x.mT if tall else x).type_as(matrices)


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return Batch(*[tensor.to(device, non_blocking=True) for tensor in vars(batch).values()])


def loss_of(
    network: Network, probe: Probe, batch: Batch, shared: tuple[list[int], list[int]], hide: bool
) -> tuple[Tensor, Tensor]:
    """Losses of the answers and of the extra heads."""
    device = batch.tokens.device
    size = len(batch.tokens)
    rows, columns = (side // UNIT for side in batch.pixels.shape[1:3])
    image = network.visual(normalise(batch.pixels))
    before, after = (torch.tensor(part, device=device).expand(size, -1) for part in shared)
    embed = network.model.embed_tokens
    embeds = torch.cat(
        [embed(before).type_as(image), image, embed(after).type_as(image), embed(batch.tokens).type_as(image)], dim=1
    )
    start = before.shape[1]
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
    visual = torch.cat([torch.zeros(1, rows * columns, dtype=torch.long), grid]) + start
    head = torch.cat([torch.arange(start).expand(3, -1), visual, torch.full((3, 1), start + max(rows, columns))], dim=1)
    text = batch.offset + start + max(rows, columns) + 1
    positions = torch.cat([head.to(device)[:, None].expand(-1, size, -1), text.expand(3, -1, -1)], dim=2)
    owner = F.pad(batch.branch, (head.shape[1], 0), value=-2)  # -2: shared by all
    slots = torch.arange(owner.shape[1], device=device)
    visible = (slots <= slots[:, None]) & ((owner[:, None] == -2) | (owner[:, None] == owner[:, :, None]))
    layers = hiding(batch, image, visible[:, None], start) if hide else lambda number: visible[:, None]
    hidden = network(embeds, positions, layers)[:, head.shape[1] :]
    answered = batch.weight[:, :-1] > 0
    logits = network.logits(hidden[:, :-1][answered]).float()
    losses = F.cross_entropy(logits, batch.tokens[:, 1:][answered], reduction="none")
    weight = batch.weight[:, :-1][answered]
    answers = (losses * weight).sum() / weight.sum()
    return answers, probe(image, batch)


def hiding(batch: Batch, image: Tensor, visible: Tensor, start: int) -> Callable[[int], Tensor]:
    """What each layer sees where visual tokens are hidden from a random layer on, and from answers in every layer.

    In three of four pictures 10% to 80% of the tokens go, half of the time at random and half of the time by a random
    direction of their embeddings, so that tokens of one look go together. That is how pruning hides them, whatever
    chooses; no method of choosing is trained for. visible: bool [B, 1, S, S].
    """
    size, length = image.shape[:2]
    device = image.device
    direction = torch.randn(size, image.shape[2], 1, device=device)
    likeness = (image.detach().float() @ direction)[:, :, 0]
    likeness = likeness / likeness.std(1, keepdim=True) + 0.3 * torch.randn(size, length, device=device)
    score = torch.where(torch.rand(size, 1, device=device) < 0.5, likeness, torch.rand(size, length, device=device))
    counts = (0.1 + 0.7 * torch.rand(size, 1, device=device)) * length * (torch.rand(size, 1, device=device) < 0.75)
    gone = score.argsort(1).argsort(1) < counts
    columns = F.pad(gone, (start, visible.shape[3] - start - length))[:, None, None]
    late = F.pad(batch.late, (visible.shape[2] - batch.late.shape[1], 0))[:, None, :, None]
    cut = torch.randint(2, 9, (size, 1, 1, 1), device=device)
    below, above = visible & ~(columns & late), visible & ~columns
    return lambda number: torch.where(cut <= number, above, below)
