"""Gradient steps on the weights of one layer, or on what comes behind the last one.

Shape letters: B = rows, S = positions, T = tokens, D = hidden size, H = query heads, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor

from llamita.prune.stream import summed

Objective = Callable[[int, bool], tuple[Tensor, int]]
"""(number of a batch, whether to add the sum's gradients) -> a sum over the batch's tokens, and their number."""

WARMUP = 0.1
HELD_OUT = 8
"""One batch in so many is not trained on but decides whether the steps are kept."""


@dataclass(frozen=True)
class Tuned:
    """Mean objective over tokens of the held-out batches before and after the steps."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the steps lowered it; where not, the weights are as they were."""
        return self.after < self.before


def tune(
    parameters: Mapping[str, Tensor], objective: Objective, *, batches: int, steps: int, learning_rate: float, seed: int
) -> Tuned:
    """Lower the mean of ``objective`` by Adam (Kingma and Ba, 2015, arXiv:1412.6980); ``parameters`` change in place.

    One step takes one batch from each process, in an order drawn from ``seed``; the gradient of the sum is divided by
    the tokens of all. Each tensor moves by ``learning_rate`` times its own root mean square per step at the peak, which
    is reached after a tenth of the steps and falls along a cosine to zero. The last batch in eight is held out: unless
    it gained as well, everything stays as it was. With a single batch there is nothing to hold out: it decides itself.
    """
    held = max(1, batches // HELD_OUT)
    check = range(batches - held, batches)
    train = range(batches - held) if batches > held else check
    before = _mean(objective, check)
    start = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    sizes = {name: float(tensor.detach().float().square().mean().sqrt()) for name, tensor in parameters.items()}
    groups = [{"params": [tensor], "lr": learning_rate * sizes[name]} for name, tensor in parameters.items()]
    for tensor in parameters.values():
        tensor.requires_grad_()
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(train), generator=draw).tolist()
        optimiser.zero_grad(set_to_none=False)
        with torch.enable_grad():
            _, count = objective(train[order.pop()], True)
        _share(parameters, count)
        optimiser.step()
        rate.step()
    for tensor in parameters.values():
        tensor.requires_grad_(False).grad = None
    tuned = Tuned(before, _mean(objective, check))
    if not tuned.kept:
        for name, tensor in parameters.items():
            tensor.copy_(start[name])
    return tuned


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


@torch.no_grad()
def _mean(objective: Objective, batches: range) -> float:
    parts = [objective(batch, False) for batch in batches]
    sums = torch.stack([torch.stack([total.double(), total.new_tensor(count).double()]) for total, count in parts])
    total, count = summed(sums.sum(0)).tolist()
    return float(total / count)


@torch.no_grad()
def _share(parameters: Mapping[str, Tensor], count: int) -> None:
    """Gradients of the sum over all processes' tokens, divided by their number."""
    tokens = torch.tensor(float(count), device=next(iter(parameters.values())).device)
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    total = float(summed(tokens))
    for tensor in parameters.values():
        assert tensor.grad is not None
        if several:
            summed(tensor.grad)
        tensor.grad.div_(max(total, 1.0))
