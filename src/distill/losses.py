"""Divergences between teachers and a student, computed so that ``[tokens, vocabulary]`` never exists for a batch.

The last hidden states of the supervised positions are cut into chunks. For each chunk the heads of student and
teachers are applied, the value and its gradient with respect to the student's logits are written down in closed form,
and the gradient is at once carried back to the hidden states and the head. So every projection runs once, nothing is
recomputed in the backward pass, and memory is a few chunks plus one gradient of the head.

Shape letters: B = rows, S = positions, N = supervised positions of a micro-batch, C = positions of a chunk,
V = vocabulary, H = hidden size of the student, E = of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llamita.distill.hidden import HiddenConfig

IGNORE = -100
"""The label of a position where nothing is to be predicted, as everywhere in Hugging Face."""


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


@dataclass(kw_only=True)
class LossConfig:
    """What the student is pulled towards."""

    divergence: Divergence = Divergence.forward_kl
    temperature: float = 1.0
    """Softens both distributions; the divergence is multiplied by its square."""
    ce_weight: float = 0.0
    """Weight c of the cross-entropy with the data: loss = c CE + (1 - c) divergence. Without a teacher it is 1."""
    jsd_beta: float = 0.5
    """The teacher's share b of the mixture in ``jsd``."""
    skew: float = 0.1
    """The share a that a skewed divergence mixes in."""
    chunk_mebibytes: int | None = None
    """Memory for the logits at any time; unset: 1024 on an accelerator, 8 on a CPU, where chunks should fit a cache."""
    hidden: HiddenConfig = field(default_factory=HiddenConfig)

    def __post_init__(self) -> None:
        if not self.temperature > 0 or math.isinf(self.temperature):
            raise ValueError(f"loss.temperature must be > 0, got {self.temperature}")
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"loss.ce_weight must be in 0..1, got {self.ce_weight}")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                f"loss.jsd_beta must be between 0 and 1, got {self.jsd_beta}; "
                "the divergence vanishes at both ends: use forward_kl or reverse_kl"
            )
        if not 0 <= self.skew < 1:
            raise ValueError(f"loss.skew must be in 0..1, 1 excluded, got {self.skew}")
        if self.chunk_mebibytes is not None and self.chunk_mebibytes < 1:
            raise ValueError(f"loss.chunk_mebibytes must be at least 1, got {self.chunk_mebibytes}")

    def check_without_teacher(self) -> None:
        """Refuse settings that say how to learn from a teacher where there is none: it may have been forgotten.

        Raises:
            ValueError: naming the setting.
        """
        if self.hidden.weight:
            raise ValueError(f"loss.hidden.weight={self.hidden.weight} needs a teacher: set teachers.<name>.path")
        for setting in fields(self):
            value = getattr(self, setting.name)
            plain = setting.name in ("chunk_mebibytes", "hidden") or (setting.name == "ce_weight" and value == 1)
            if not plain and value != setting.default:
                raise ValueError(
                    f"loss.{setting.name}={value} needs a teacher: set teachers.<name>.path, or leave it at "
                    f"{setting.default} to train on the data alone"
                )


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's part of one micro-batch: hidden states from which its head makes logits."""

    hidden: Tensor
    """``[B, S, E]``, or ``[N, E]`` once the supervised positions are picked."""
    head: Tensor
    """``[V, E]``."""
    weight: float = 1.0
    """Share in the mixture of teachers; shares are divided by their sum."""
    layers: Sequence[Tensor] = ()
    """What some of its layers gave, where the student is to match them."""


def statistics(teachers: Sequence[str]) -> list[str]:
    """Names of the sums that :func:`distillation_loss` returns beside the loss, for teachers of these names."""
    if not teachers:
        return ["ce", "student_entropy"]
    return ["ce", "student_entropy", "kd", "teacher_entropy", "top1_agree", *(f"kl_{name}" for name in teachers)]


def supervised(labels_BS: Tensor) -> Tensor:
    """Where a label is predicted, ``[B, S - 1]``: position s predicts the label of s + 1."""
    return labels_BS[:, 1:] != IGNORE


def distillation_loss(
    hidden_BSH: Tensor,
    head_VH: Tensor,
    labels_BS: Tensor,
    teachers: Sequence[TeacherStates],
    config: LossConfig,
    *,
    compute_dtype: torch.dtype | None = None,
    measure: bool = True,
) -> tuple[Tensor, Tensor]:
    """The loss summed over supervised positions, and the sums that :func:`statistics` names.

    Differentiable with respect to ``hidden_BSH`` and ``head_VH``, once. The projections run in ``compute_dtype``
    (that of the head when ``None``), everything after them in float32 or better. With several teachers, p is the
    mixture of their probabilities; for the forward KL the gradient is then that of the weighted sum of divergences.
    Entropies, agreement and the KL to each teacher are zeros without ``measure``. Nothing is divided by a count: only
    the caller knows how many tokens the whole optimiser step holds.
    """
    picked_BS = supervised(labels_BS)
    total = sum(teacher.weight for teacher in teachers)
    chosen = [
        TeacherStates(teacher.hidden[:, :-1][picked_BS], teacher.head, teacher.weight / total) for teacher in teachers
    ]
    job = _Job(labels_BS[:, 1:][picked_BS], chosen, config, compute_dtype or head_VH.dtype, measure)
    loss, sums = _FusedLoss.apply(hidden_BSH[:, :-1][picked_BS], head_VH, job)  # type: ignore[no-untyped-call]
    return loss, sums


@dataclass(frozen=True)
class _Job:
    """What the loss needs besides the two tensors that it is differentiated by."""

    labels: Tensor
    teachers: list[TeacherStates]
    config: LossConfig
    compute_dtype: torch.dtype
    measure: bool

    def chunk_rows(self, vocabulary: int, device: torch.device, element_bytes: int) -> int:
        """Rows whose logits, log-probabilities and gradients fit the byte budget."""
        mebibytes = self.config.chunk_mebibytes or (8 if device.type == "cpu" else 1024)
        buffers = 6 + 2 * len(self.teachers)
        return max(1, mebibytes * 2**20 // (buffers * vocabulary * element_bytes))


class _FusedLoss(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of positions."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
            return _FusedLoss._forward(ctx, hidden_NH, head_VH, job)

    @staticmethod
    def _forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(job.compute_dtype, torch.float32)
        head = head_VH.to(job.compute_dtype)
        rows = job.chunk_rows(head_VH.shape[0], hidden_NH.device, exact.itemsize)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_NH) if wants_hidden else None
        grad_head = torch.zeros_like(head_VH, dtype=exact) if wants_head else None
        loss = hidden_NH.new_zeros((), dtype=torch.promote_types(exact, torch.float64))
        sums = loss.new_zeros(len(statistics(["one"] * len(job.teachers))))
        for start in range(0, len(hidden_NH), rows):
            chunk = slice(start, start + rows)
            hidden_CH = hidden_NH[chunk].to(job.compute_dtype)
            teacher_logits = [project(t.hidden[chunk], t.head, exact) for t in job.teachers]
            value, parts, slope_CV = _values_and_slope(
                project(hidden_CH, head, exact), job.labels[chunk], teacher_logits, job, wants_hidden or wants_head
            )
            loss += value
            sums += parts
            if slope_CV is None:
                continue
            if grad_hidden is not None:
                grad_hidden[chunk] = _matmul(slope_CV, head, exact)
            if grad_head is not None:
                _add_matmul(grad_head, slope_CV.T, hidden_CH)
        ctx.gradients = (grad_hidden, grad_head)
        ctx.dtype = head_VH.dtype
        ctx.mark_non_differentiable(sums)
        return loss.to(exact), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # Scaled in place: the head's gradient of a real vocabulary takes a gigabyte. So it can be taken only once.
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden.mul_(scale)
        if grad_head is not None:
            grad_head = grad_head.mul_(scale).to(ctx.dtype)
        return grad_hidden, grad_head, None


def project(hidden_CH: Tensor, head_VH: Tensor, exact: torch.dtype) -> Tensor:
    """Logits ``[C, V]`` in ``exact``, accumulated at that precision."""
    return _matmul(hidden_CH.to(head_VH.dtype), head_VH.T, exact)


def _matmul(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """``a @ b`` in the dtype of ``b`` with a result in ``exact``."""
    if b.dtype == exact:
        return a.to(exact) @ b
    if a.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=exact)
    # No kernel for the CPU takes bfloat16 in and gives float32 out; the product of two bfloat16 is exact in float32.
    return a.to(b.dtype).to(exact) @ b.to(exact)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, accumulated in the dtype of ``total``."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)
    else:
        total += _matmul(a, b, total.dtype)


def _values_and_slope(
    logits_CV: Tensor, labels_C: Tensor, teacher_logits: list[Tensor], job: _Job, wants_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of a chunk, its statistics, and d loss / d logits."""
    config, teachers = job.config, job.teachers
    temperature = config.temperature if teachers else 1.0
    ce_weight = config.ce_weight if teachers else 1.0
    log_q1 = functional.log_softmax(logits_CV, dim=-1)
    index_C1 = labels_C[:, None]
    ce = -log_q1.gather(1, index_C1).sum(dtype=torch.float64)
    sums = torch.zeros(len(statistics(["one"] * len(teachers))), dtype=torch.float64, device=log_q1.device)
    sums[0] = ce
    value, slope, q1 = ce * ce_weight, None, None
    if job.measure or (wants_slope and ce_weight > 0):
        q1 = log_q1.exp()
        sums[1] = -_dot(q1, log_q1) if job.measure else 0
    if teachers:
        log_q = log_q1 if temperature == 1 else _log_probabilities(logits_CV, temperature)
        log_ps = [_log_probabilities(logits_CV, temperature) for logits_CV in teacher_logits]
        log_p = _mixture(log_ps, [teacher.weight for teacher in teachers])
        p = log_p.exp()
        q = log_q.exp() if q1 is None or temperature != 1 else q1.clone()
        kd, u = divergence(p, log_p, q, log_q, config)
        sums[2] = kd * temperature**2
        value = value + sums[2] * (1 - ce_weight)
        if job.measure:
            sums[3] = -_dot(p, log_p)
            sums[4] = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            for place, one in enumerate(log_ps):
                sums[5 + place] = _dot(p if len(log_ps) == 1 else one.exp(), one - log_q)
        if wants_slope and ce_weight < 1:
            slope = _through_softmax(p, q, u).mul_(temperature * (1 - ce_weight))
    if q1 is not None and wants_slope and ce_weight > 0:
        q1.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=q1.dtype))
        slope = q1.mul_(ce_weight) if slope is None else slope.add_(q1, alpha=ce_weight)
    return value, sums, slope


def _log_probabilities(logits_CV: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature); overwrites the logits."""
    return functional.log_softmax(logits_CV if temperature == 1 else logits_CV.div_(temperature), dim=-1)


def _mixture(log_ps: list[Tensor], weights: list[float]) -> Tensor:
    """log of the weighted mean of probabilities."""
    if len(log_ps) == 1:
        return log_ps[0]
    mixed = log_ps[0] + math.log(weights[0])
    for log_p, weight in zip(log_ps[1:], weights[1:], strict=True):
        mixed = torch.logaddexp(mixed, log_p + math.log(weight))
    return mixed


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)


def divergence(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, config: LossConfig) -> tuple[Tensor, Tensor | None]:
    """Sum over rows of the divergence of p and q, and its derivative u by q; ``None`` stands for the ratio -p / q.

    The forms are those of Hinton et al. (2015, arXiv:1503.02531, section 2; forward KL), Gu et al. (2024,
    arXiv:2306.08543; reverse KL), Agarwal et al. (2024, arXiv:2306.13649; generalised JSD), Ko et al. (2024,
    arXiv:2402.03898; skewed KL) and Wen et al. (2023, arXiv:2307.15190; total variation). A constant in u does not
    matter, because q sums to one.
    """
    match config.divergence:
        case Divergence.forward_kl:
            return _dot(p, log_p - log_q), None
        case Divergence.reverse_kl:
            u = log_q - log_p
            return _dot(q, u), u
        case Divergence.jsd:
            beta = config.jsd_beta
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            u = log_q - log_m
            value = beta * _dot(p, log_p - log_m) + (1 - beta) * _dot(q, u)
            return value, u.mul_(1 - beta)
        case Divergence.skew_forward_kl:
            u = log_p - _skewed(log_p, log_q, config.skew)
            return _dot(p, u), u.exp_().mul_(config.skew - 1)
        case Divergence.skew_reverse_kl:
            u = log_q - _skewed(log_q, log_p, config.skew)
            return _dot(q, u), u - config.skew * u.exp()
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
