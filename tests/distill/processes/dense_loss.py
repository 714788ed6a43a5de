"""The losses as their definitions say, from whole logits, and a small problem to compute them on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llamita.distill.losses import IGNORE, Divergence, LossConfig, TeacherStates

ROWS, LENGTH, HIDDEN, VOCABULARY = 3, 7, 6, 37


def dense(p: Tensor, q: Tensor, config: LossConfig) -> Tensor:
    """The divergence as its definition says, differentiated by autograd."""
    a, b = config.skew, config.jsd_beta

    def kl(x: Tensor, y: Tensor) -> Tensor:
        return (x * (x.log() - y.log())).sum()

    match config.divergence:
        case Divergence.forward_kl:
            return kl(p, q)
        case Divergence.reverse_kl:
            return kl(q, p)
        case Divergence.jsd:
            m = b * p + (1 - b) * q
            return b * kl(p, m) + (1 - b) * kl(q, m)
        case Divergence.skew_forward_kl:
            return kl(p, a * p + (1 - a) * q)
        case Divergence.skew_reverse_kl:
            return kl(q, (1 - a) * p + a * q)
        case Divergence.total_variation:
            return 0.5 * (p - q).abs().sum()


def oracle(
    hidden: Tensor, head: Tensor, labels: Tensor, teachers: list[TeacherStates], config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Loss and cross-entropy from whole logits."""
    keep = labels[:, 1:] != IGNORE
    logits = (hidden @ head.T)[:, :-1][keep]
    ce = functional.cross_entropy(logits, labels[:, 1:][keep], reduction="sum")
    if not teachers:
        return ce, ce
    total = sum(teacher.weight for teacher in teachers)
    p = sum(
        (teacher.weight / total) * ((t.hidden @ t.head.T)[:, :-1][keep] / config.temperature).softmax(-1)
        for teacher in teachers
        for t in [teacher]
    )
    assert isinstance(p, Tensor)
    kd = dense(p, (logits / config.temperature).softmax(-1), config) * config.temperature**2
    return config.ce_weight * ce + (1 - config.ce_weight) * kd, ce


def example(num_teachers: int = 1, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple:
    torch.manual_seed(1)
    hidden = scale * torch.randn(ROWS, LENGTH, HIDDEN, dtype=dtype)
    head = torch.randn(VOCABULARY, HIDDEN, dtype=dtype)
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH))
    labels[0, 3:5] = IGNORE
    labels[2] = IGNORE
    sizes = [5, 9, 4][:num_teachers]
    teachers = [
        TeacherStates(
            scale * torch.randn(ROWS, LENGTH, size, dtype=dtype), torch.randn(VOCABULARY, size, dtype=dtype), 0.5 + size
        )
        for size in sizes
    ]
    return hidden.requires_grad_(), head.requires_grad_(), labels, teachers
