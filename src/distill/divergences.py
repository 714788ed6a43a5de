"""Values and derivatives of divergences between teachers and a student, from the logits of a few positions.

This is the path in plain PyTorch. It works through a chunk a few rows at a time, so that what it makes on the way
stays small, and writes the derivative over the student's logits.

Shape letters: C = positions of a chunk, R = positions at a time, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional


class Divergence(StrEnum):
    """What is summed over tokens; p = teacher (mixture), q = student, both at the same temperature."""

    forward_kl = "forward_kl"
    """KL(p, q)."""
    reverse_kl = "reverse_kl"
    """KL(q, p)."""
    jsd = "jsd"
    """b KL(p, m) + (1 - b) KL(q, m) with m = b p + (1 - b) q."""
    skew_forward_kl = "skew_forward_kl"
    """KL(p, a p + (1 - a) q)."""
    skew_reverse_kl = "skew_reverse_kl"
    """KL(q, (1 - a) p + a q)."""
    total_variation = "total_variation"
    """Half the sum of abs(p - q)."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is computed of each chunk: the loss is c CE + (1 - c) T^2 D."""

    divergence: Divergence
    temperature: float
    ce_weight: float
    jsd_beta: float
    skew: float
    shares: tuple[float, ...]
    """Of the teachers whose logits are given. They sum to one, or to less where sparse targets hold the rest."""
    has_teacher: bool
    """False: only the cross-entropy."""
    measure: bool
    """Whether entropies, agreement and the KL to each teacher are wanted."""


CE, STUDENT_ENTROPY, KD, TEACHER_ENTROPY, AGREE, KL = range(6)
"""Places in :attr:`Rows.sums`; from ``KL`` on there is one for each teacher."""
DOT_VALUES = 2**16
"""Products that are summed in the logits' own precision."""


@dataclass(frozen=True)
class Rows:
    """What is known of a chunk once its slope is written."""

    sums: Tensor
    """``[KL + number of teachers]``, float64, summed over positions. ``KD`` lacks the factor T^2."""
    log_z: Tensor
    """``[C]``: log-sum-exp of the student's logits / T."""
    log_z1: Tensor
    """``[C]``: the same at T = 1."""
    teachers_log_z: list[Tensor]
    """``[C]`` for each teacher, at T."""


def scratch_buffers(num_teachers: int) -> int:
    """At most so many tensors of ``[R, V]`` exist at once, besides the logits."""
    return 8 + 2 * num_teachers


def evaluate(
    logits_CV: Tensor,
    teachers_CV: Tensor,
    labels_C: Tensor,
    objective: Objective,
    slope_CV: Tensor | None,
    *,
    rows_at_once: int,
) -> Rows:
    """Sums over the chunk; the derivative by the student's logits goes to ``slope_CV``, which may be the logits.

    ``teachers_CV`` is ``[number of teachers, C, V]``. Overwrites all logits.
    """
    parts = [
        _evaluate(
            logits_CV[start : start + rows_at_once],
            teachers_CV[:, start : start + rows_at_once],
            labels_C[start : start + rows_at_once],
            objective,
            None if slope_CV is None else slope_CV[start : start + rows_at_once],
        )
        for start in range(0, len(logits_CV), rows_at_once)
    ]
    return Rows(
        torch.stack([part.sums for part in parts]).sum(0),
        torch.cat([part.log_z for part in parts]),
        torch.cat([part.log_z1 for part in parts]),
        [torch.cat(several) for several in zip(*(part.teachers_log_z for part in parts), strict=True)],
    )


def _evaluate(
    logits_RV: Tensor,
    teachers_RV: Tensor,
    labels_R: Tensor,
    objective: Objective,
    slope_RV: Tensor | None,
) -> Rows:
    temperature, ce_weight = objective.temperature, objective.ce_weight
    sums = torch.zeros(KL + len(teachers_RV), dtype=torch.float64, device=logits_RV.device)
    log_q1 = functional.log_softmax(logits_RV, dim=-1)
    log_z1 = _log_z(logits_RV, log_q1)
    index_R1 = labels_R[:, None]
    sums[CE] = -log_q1.gather(1, index_R1).sum(dtype=torch.float64)
    slope, q1, log_z, teachers_log_z = None, None, log_z1, []
    if objective.measure or (slope_RV is not None and ce_weight > 0):
        q1 = log_q1.exp()
        sums[STUDENT_ENTROPY] = -_dot(q1, log_q1) if objective.measure else 0
    if objective.has_teacher:
        log_q = log_q1
        if temperature != 1:
            log_q = functional.log_softmax(logits_RV.div_(temperature), dim=-1)
            log_z = _log_z(logits_RV, log_q)
        q = q1 if q1 is not None and temperature == 1 else log_q.exp()
        if q is q1 and ce_weight > 0:
            q = q.clone()  # the slope is written over it; that of the cross-entropy reads q1 after that
        log_ps = [functional.log_softmax(one if temperature == 1 else one.div_(temperature), -1) for one in teachers_RV]
        teachers_log_z = [_log_z(one, log_p) for one, log_p in zip(teachers_RV, log_ps, strict=True)]
        slope = _add_divergence(sums, q, log_q, log_ps, objective, slope_RV is not None) if log_ps else q
        if slope is not None and (factor := temperature * (1 - ce_weight)) != 1:
            slope.mul_(factor)
    if slope_RV is None:
        return Rows(sums, log_z, log_z1, teachers_log_z)
    if q1 is not None and ce_weight > 0:
        q1.scatter_add_(1, index_R1, torch.full_like(index_R1, -1, dtype=q1.dtype))
        slope = q1.mul_(ce_weight) if slope is None else slope.add_(q1, alpha=ce_weight)
    assert slope is not None
    slope_RV.copy_(slope)
    return Rows(sums, log_z, log_z1, teachers_log_z)


def _add_divergence(
    sums: Tensor, q: Tensor, log_q: Tensor, log_ps: list[Tensor], objective: Objective, wants_slope: bool
) -> Tensor | None:
    """Add the divergence from the mixture of teachers and its statistics to ``sums``; the slope, over ``q``."""
    log_p = _mixture(log_ps, objective.shares)
    p = log_p.exp()
    kd, u = divergence(p, log_p, q, log_q, objective)
    sums[KD] = kd
    if objective.measure:
        sums[TEACHER_ENTROPY] = -_dot(p, log_p)
        best_R1 = log_p.argmax(-1, keepdim=True)
        sums[AGREE] = (log_q.gather(1, best_R1)[:, 0] == log_q.amax(-1)).sum()
        for place, one in enumerate(log_ps):
            if one is log_p and objective.divergence is Divergence.forward_kl:
                sums[KL + place] = kd
            else:
                sums[KL + place] = _dot(p if one is log_p else one.exp(), one - log_q)
    return _through_softmax(p, q, u) if wants_slope else None


def _log_z(logits: Tensor, log_probabilities: Tensor) -> Tensor:
    """The log-sum-exp, from the largest entries, where the difference is exact to a rounding."""
    return logits.amax(-1) - log_probabilities.amax(-1)


def _mixture(log_ps: list[Tensor], shares: Sequence[float]) -> Tensor:
    """log of the weighted sum of probabilities."""
    mixed = log_ps[0] if shares[0] == 1 else log_ps[0] + math.log(shares[0])
    for log_p, share in zip(log_ps[1:], shares[1:], strict=True):
        mixed = torch.logaddexp(mixed, log_p + math.log(share))
    return mixed


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products; each block by one call that makes no tensor of products, the blocks in float64."""
    blocks = zip(*(torch.split(values.reshape(-1), DOT_VALUES) for values in (a, b)), strict=True)
    return torch.stack([torch.dot(one, other) for one, other in blocks]).sum(dtype=torch.float64)


def divergence(
    p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, objective: Objective
) -> tuple[Tensor, Tensor | None]:
    """Sum over rows of the divergence of p and q, and its derivative u by q; ``None`` stands for the ratio -p / q.

    The forms are those of Hinton et al. (2015, arXiv:1503.02531, section 2; forward KL), Gu et al. (2024,
    arXiv:2306.08543; reverse KL), Agarwal et al. (2024, arXiv:2306.13649; generalised JSD), Ko et al. (2024,
    arXiv:2402.03898; skewed KL) and Wen et al. (2023, arXiv:2307.15190; total variation). A constant in u does not
    matter, because q sums to one.
    """
    match objective.divergence:
        case Divergence.forward_kl:
            return _dot(p, log_p - log_q), None
        case Divergence.reverse_kl:
            u = log_q - log_p
            return _dot(q, u), u
        case Divergence.jsd:
            beta = objective.jsd_beta
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            u = log_q - log_m
            value = beta * _dot(p, log_p - log_m) + (1 - beta) * _dot(q, u)
            return value, u.mul_(1 - beta)
        case Divergence.skew_forward_kl:
            u = log_p - _skewed(log_p, log_q, objective.skew)
            return _dot(p, u), u.exp_().mul_(objective.skew - 1)
        case Divergence.skew_reverse_kl:
            u = log_q - _skewed(log_q, log_p, objective.skew)
            return _dot(q, u), u - objective.skew * u.exp()
        case Divergence.total_variation:
            gap = q - p
            return 0.5 * gap.abs().sum(dtype=torch.float64), gap.sign_().mul_(0.5)


def _skewed(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    if share == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _through_softmax(p: Tensor, q: Tensor, u: Tensor | None) -> Tensor:
    """The derivative by the student's logits from the derivative ``u`` by q: q (u - sum q u); overwrites its input."""
    if u is None:
        return q.sub_(p)  # u = -p / q would divide by probabilities that may be zero
    return u.sub_((q * u).sum(-1, keepdim=True)).mul_(q)
