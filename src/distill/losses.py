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
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamita.distill import divergences, sparse
from llamita.distill.divergences import CE, KD, KL, Divergence, Objective
from llamita.distill.sparse import Entries, SparseTargets, Stored

IGNORE = -100
"""The label of a position where nothing is to be predicted, as everywhere in Hugging Face."""


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
        for setting in fields(self):
            value = getattr(self, setting.name)
            plain = setting.name == "chunk_mebibytes" or (setting.name == "ce_weight" and value == 1)
            if not plain and value != setting.default:
                raise ValueError(
                    f"loss.{setting.name}={value} needs a teacher: set teachers.<name>.path, or leave it at "
                    f"{setting.default} to train on the data alone"
                )

    def check_sparse(self, teacher: str, temperature: float = 1.0) -> None:
        """Refuse what cannot be learnt from sparse targets that were taken at ``temperature``.

        Only the gradient of the forward KL is linear in p, so that unbiased estimates of p make it unbiased; and
        estimates of p at one temperature say nothing about another.

        Raises:
            ValueError: naming the setting and the teacher.
        """
        if self.divergence is not Divergence.forward_kl:
            raise ValueError(
                f"loss.divergence={self.divergence} needs whole distributions, and teacher {teacher} has sparse "
                "targets: use forward_kl, or the teacher itself"
            )
        if self.temperature != temperature:
            raise ValueError(
                f"loss.temperature={self.temperature} is not the temperature {temperature} at which the targets of "
                f"teacher {teacher} were taken: set loss.temperature={temperature}, or make another cache"
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


Targets = TeacherStates | SparseTargets
"""What a teacher says about one micro-batch."""


def statistics(teachers: Sequence[str], sparse: Collection[str] = ()) -> list[str]:
    """Names of the sums that :func:`distillation_loss` returns beside the loss, for teachers of these names.

    ``sparse`` are those of them that give :class:`SparseTargets`. Such a teacher has no KL that could be measured:
    the value of its loss, a part of ``kd``, is biased, because it contains the entropy of the stored entries. In place
    of ``kl_<name>`` it has ``soft_ce_<name>``, minus the sum of t log q, which is unbiased. Entropy and best token of
    a mixture with such a teacher are unknown.
    """
    if not teachers:
        return ["ce", "student_entropy"]
    whole = [] if sparse else ["teacher_entropy", "top1_agree"]
    each = [f"soft_ce_{name}" if name in sparse else f"kl_{name}" for name in teachers]
    return ["ce", "student_entropy", "kd", *whole, *each]


def supervised(labels_BS: Tensor) -> Tensor:
    """Where a label is predicted, ``[B, S - 1]``: position s predicts the label of s + 1."""
    return labels_BS[:, 1:] != IGNORE


def distillation_loss(
    hidden_BSH: Tensor,
    head_VH: Tensor,
    labels_BS: Tensor,
    teachers: Sequence[Targets],
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

    Raises:
        ValueError: there are sparse targets, and the divergence is not the forward KL or a label has none.
    """
    picked_BS = supervised(labels_BS)
    job = _Job.of(labels_BS, picked_BS, teachers, config, compute_dtype or head_VH.dtype, measure)
    loss, sums = _FusedLoss.apply(hidden_BSH[:, :-1][picked_BS], head_VH, job)  # type: ignore[no-untyped-call]
    return loss, sums


@dataclass(frozen=True)
class _Job:
    """What the loss needs besides the two tensors that it is differentiated by."""

    labels: Tensor
    dense: list[TeacherStates]
    """Teachers that give hidden states, here ``[N, E]``."""
    entries: list[Entries]
    """Those of each teacher that gives sparse targets."""
    entry_shares: list[float]
    is_sparse: list[bool]
    """For each teacher in the order in which they were given."""
    objective: Objective
    compute_dtype: torch.dtype
    chunk_mebibytes: int | None

    @classmethod
    def of(
        cls,
        labels_BS: Tensor,
        picked_BS: Tensor,
        teachers: Sequence[Targets],
        config: LossConfig,
        compute_dtype: torch.dtype,
        measure: bool,
    ) -> _Job:
        """Pick the supervised positions of everything, and divide the weights by their sum."""
        total = sum(teacher.weight for teacher in teachers)
        dense = [
            TeacherStates(teacher.hidden[:, :-1][picked_BS], teacher.head, teacher.weight / total)
            for teacher in teachers
            if isinstance(teacher, TeacherStates)
        ]
        stored = [teacher for teacher in teachers if isinstance(teacher, SparseTargets)]
        if stored:
            config.check_sparse("targets", config.temperature)
        objective = Objective(
            divergence=config.divergence,
            temperature=config.temperature if teachers else 1.0,
            ce_weight=config.ce_weight if teachers else 1.0,
            jsd_beta=config.jsd_beta,
            skew=config.skew,
            shares=tuple(teacher.weight for teacher in dense),
            has_teacher=bool(teachers),
            measure=measure,
        )
        return cls(
            labels_BS[:, 1:][picked_BS],
            dense,
            [sparse.pick(teacher, picked_BS) for teacher in stored],
            [teacher.weight / total for teacher in stored],
            [isinstance(teacher, SparseTargets) for teacher in teachers],
            objective,
            compute_dtype,
            config.chunk_mebibytes,
        )

    def chunk_rows(self, vocabulary: int, device: torch.device, element_bytes: int) -> tuple[int, int]:
        """Rows whose logits fit the byte budget, and how many of them to work on at once.

        What the work needs on the way takes at most half of the budget, and on a CPU stays small enough for a cache.
        """
        on_cpu = device.type == "cpu"
        budget = (self.chunk_mebibytes or (64 if on_cpu else 1024)) * 2**20
        row = vocabulary * element_bytes
        scratch = (divergences.SCRATCH_BUFFERS + 2 * len(self.dense)) * row
        rows_at_once = max(1, min(budget // 2, 2**23 if on_cpu else budget) // scratch)
        return max(1, (budget - rows_at_once * scratch) // ((1 + len(self.dense)) * row)), rows_at_once

    def select(self, sums: Tensor, soft_ce: Tensor) -> Tensor:
        """The sums that :func:`statistics` names, in its order."""
        if not self.is_sparse:
            return sums[: CE + 2]
        whole = sums[: KD + 1] if self.entries else sums[:KL]
        kls, soft = iter(sums[KL:]), iter(soft_ce)
        return torch.cat([whole, *(next(soft if is_sparse else kls)[None] for is_sparse in self.is_sparse)])


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
        rows, rows_at_once = job.chunk_rows(head_VH.shape[0], hidden_NH.device, exact.itemsize)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_NH) if wants_hidden else None
        grad_head = torch.zeros_like(head_VH, dtype=exact) if wants_head else None
        sums = hidden_NH.new_zeros(KL + len(job.dense), dtype=torch.float64)
        soft_ce = sums.new_zeros(len(job.entries))
        stored = Stored.of(
            job.entries, job.entry_shares, rows, len(hidden_NH), len(head), measure=job.objective.measure
        )
        for number, start in enumerate(range(0, len(hidden_NH), rows)):
            chunk = slice(start, start + rows)
            hidden_CH, labels_C = hidden_NH[chunk].to(job.compute_dtype), job.labels[chunk]
            teachers_CV = [project(t.hidden[chunk], t.head, exact) for t in job.dense]
            logits_CV = project(hidden_CH, head, exact)
            slope_CV = logits_CV if wants_hidden or wants_head else None
            taken = stored.take(number, logits_CV, teachers_CV)
            found = divergences.evaluate(
                logits_CV, teachers_CV, labels_C, job.objective, slope_CV, rows_at_once=rows_at_once
            )
            sums += found.sums
            if taken is not None:
                added, soft = taken.finish(found, labels_C, job.objective, slope_CV)
                sums[KD] += added
                soft_ce += soft
            if slope_CV is None:
                continue
            if grad_hidden is not None:
                grad_hidden[chunk] = _matmul(slope_CV, head, exact)
            if grad_head is not None:
                _add_matmul(grad_head, slope_CV.T, hidden_CH)
        sums[KD] *= job.objective.temperature**2
        c = job.objective.ce_weight
        loss = c * sums[CE] + (1 - c) * sums[KD]
        ctx.gradients = (grad_hidden, grad_head)
        ctx.dtype = head_VH.dtype
        chosen = job.select(sums, soft_ce)
        ctx.mark_non_differentiable(chosen)
        return loss.to(exact), chosen

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
