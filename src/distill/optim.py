"""AdamW, learning-rate schedules as pure functions of the step, and clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn


class Schedule(StrEnum):
    """How the learning rate goes after the warm-up."""

    cosine = "cosine"
    """Half a cosine down to the final fraction (Loshchilov and Hutter, 2017, arXiv:1608.03983, eq. 5)."""
    wsd = "wsd"
    """Constant, then down like 1 - sqrt (Hu et al., 2024, arXiv:2404.06395; shape of Hägele et al., 2024,
    arXiv:2405.18392)."""
    constant = "constant"


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101) and its schedule."""

    learning_rate: float = 1e-4
    """The peak, reached after the warm-up."""
    final_fraction: float = 0.1
    """The learning rate at the last step, as a fraction of the peak."""
    warmup_steps: int = 100
    """Steps of linear rise; at most half of all steps are used for it."""
    schedule: Schedule = Schedule.cosine
    decay_fraction: float = 0.2
    """The last part of all steps, in which ``wsd`` goes down; at most all after the warm-up, 0: it stays up."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """For matrices that multiply. Norm gains and embeddings, tied ones too, are not decayed."""
    clip_norm: float = 1.0
    """The gradient's largest global norm; ``inf`` clips nothing."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be > 0 and finite, got {getattr(self, name)}")
        if not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm must be > 0, got {self.clip_norm}")
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be in 0..1, 1 excluded, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be >= 0 and finite, got {getattr(self, name)}")


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step ``step`` of 1..``steps``."""
    warmup = min(config.warmup_steps, steps // 2)
    if step <= warmup:
        return config.learning_rate * step / warmup
    match config.schedule:
        case Schedule.constant:
            share = 1.0
        case Schedule.cosine:
            share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        case Schedule.wsd:
            decay = min(math.ceil(config.decay_fraction * steps), steps - warmup)
            share = 1 - math.sqrt(max(0, step - (steps - decay)) / decay) if decay else 1.0
    if config.schedule is Schedule.constant:
        return config.learning_rate
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * share)


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """An optimiser over the parameters of ``model``, each once, the decayed ones first.

    Decay pulls towards zero what the loss does not hold. A norm's gain has its neutral value at one, and an
    embedding's rare rows would shrink with no token to restore them (OLMo 2, 2025, arXiv:2501.00656), so
    neither is decayed.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def clip(parameters: Iterable[Tensor], largest: float) -> float:
    """Scale all gradients so that their global norm is at most ``largest``; returns the norm before that.

    A norm that is not finite is returned and nothing is scaled.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = norm.item()
    if math.isfinite(value):
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return value
