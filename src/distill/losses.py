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
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from llamita.distill import sparse
from llamita.distill.divergences import Divergence, Objective
from llamita.distill.fused import FusedLoss, Job
from llamita.distill.hidden import HiddenConfig
from llamita.distill.sparse import SparseTargets

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
    """Memory for the logits at any time and what is made of them; unset: 1024 on an accelerator, 128 on a CPU."""
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
    layers: Sequence[Tensor] = ()
    """What some of its layers gave, where the student is to match them."""


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


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def distillation_loss(
    hidden_BSH: Tensor,
    head_VH: Tensor,
    labels_BS: Tensor,
    teachers: Sequence[Targets],
    config: LossConfig,
    *,
    compute_dtype: torch.dtype | None = None,
    measure: bool = True,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss summed over supervised positions, and the sums that :func:`statistics` names.

    Differentiable with respect to ``hidden_BSH`` and ``head_VH``, once. The projections run in ``compute_dtype``
    (that of the head when ``None``), everything after them in float32 or better. With several teachers, p is the
    mixture of their probabilities; for the forward KL the gradient is then that of the weighted sum of divergences.
    Entropies, agreement and the KL to each teacher are zeros without ``measure``. Nothing is divided by a count: only
    the caller knows how many tokens the whole optimiser step holds.

    Of every head only the first ``vocabulary`` rows are ids; the others, padding, have no probability and no gradient.
    ``None``: all rows are ids.

    Raises:
        ValueError: heads do not fit each other or ``vocabulary``; there are sparse targets, and the divergence is not
            the forward KL or a label has none.
    """
    dense = [teacher for teacher in teachers if isinstance(teacher, TeacherStates)]
    stored = [teacher for teacher in teachers if isinstance(teacher, SparseTargets)]
    if stored:
        config.check_sparse("with sparse targets", config.temperature)
    picked_BS = supervised(labels_BS)
    total = sum(teacher.weight for teacher in teachers)
    job = Job(
        labels=labels_BS[:, 1:][picked_BS],
        dense=[(teacher.hidden[:, :-1][picked_BS], teacher.head) for teacher in dense],
        entries=[sparse.pick(teacher, picked_BS) for teacher in stored],
        entry_shares=[teacher.weight / total for teacher in stored],
        is_sparse=[isinstance(teacher, SparseTargets) for teacher in teachers],
        objective=Objective(
            divergence=config.divergence,
            temperature=config.temperature if teachers else 1.0,
            ce_weight=config.ce_weight if teachers else 1.0,
            jsd_beta=config.jsd_beta,
            skew=config.skew,
            shares=tuple(teacher.weight / total for teacher in dense),
            has_teacher=bool(teachers),
            measure=measure,
        ),
        compute_dtype=compute_dtype or head_VH.dtype,
        vocabulary=_vocabulary(vocabulary, [head_VH, *(teacher.head for teacher in dense)]),
        chunk_mebibytes=config.chunk_mebibytes,
        differentiate=torch.is_grad_enabled(),
    )
    loss, sums = FusedLoss.apply(hidden_BSH[:, :-1][picked_BS], head_VH, job)  # type: ignore[no-untyped-call]
    return loss, sums


def _vocabulary(given: int | None, heads: Sequence[Tensor]) -> int:
    """How many rows of the heads are ids."""
    rows = [len(head) for head in heads]
    if given is None and len(set(rows)) > 1:
        raise ValueError(f"the heads of student and teachers have {rows} rows: say how many of them are ids")
    if given is not None and given > min(rows):
        raise ValueError(f"the heads of student and teachers have {rows} rows, fewer than the {given} ids")
    return given or rows[0]
