"""Teachers' distributions of which only some entries are known, as a cache stores them.

The stored values t are unbiased estimates of the teacher's probabilities p: their expectation over the cache's random
numbers is p, so that of the gradient q - t is the gradient q - p of the forward KL. They are never renormalised.

Shape letters: B = rows, S = positions, N = supervised positions of a micro-batch, C = positions of a chunk,
M = entries of any number of positions, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamita.distill.divergences import Objective, Rows


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's part of one micro-batch: the entries of its distributions that were stored.

    Raises:
        ValueError: ids and values differ in number.
    """

    ids: Tensor
    """``[M]``, int64: entries of all positions in row-major order, ids rising within a position."""
    values: Tensor
    """``[M]``, float32: unbiased estimates of probabilities; those of a position need not sum to one."""
    lengths: Tensor
    """``[B, S]``, int64: entries of each position, M in total. Position s holds the distribution of token s + 1; 0
    where nothing is stored."""
    weight: float = 1.0
    """Share in the mixture of teachers; shares are divided by their sum."""

    def __post_init__(self) -> None:
        if self.ids.shape != self.values.shape or self.ids.dim() != 1:
            raise ValueError(
                f"ids and values must be two lists of one length, got {list(self.ids.shape)} and "
                f"{list(self.values.shape)}"
            )


@dataclass(frozen=True)
class Entries:
    """Entries of supervised positions, sorted by position and id."""

    rows: Tensor
    """``[M]``: to which supervised position each belongs."""
    ids: Tensor
    values: Tensor

    def chunks(self, rows: int, num_rows: int) -> list[Entries]:
        """The entries of every ``rows`` positions, their rows counted from the first of the chunk."""
        starts = range(0, num_rows, rows)
        edges = self.rows.new_tensor([*starts, num_rows])
        cuts: list[int] = torch.searchsorted(self.rows, edges).tolist()
        return [
            Entries(self.rows[a:b] - start, self.ids[a:b], self.values[a:b])
            for start, a, b in zip(starts, cuts[:-1], cuts[1:], strict=True)
        ]


def pick(targets: SparseTargets, picked_BS: Tensor) -> Entries:
    """The entries of the positions where ``picked_BS``, ``[B, S - 1]``, is true.

    Raises:
        ValueError: a picked position has none. Its gradient would be q itself, which pulls every logit down.
    """
    keep = torch.nn.functional.pad(picked_BS, (0, 1)).flatten()
    lengths = targets.lengths.flatten()
    if bare := int((keep & (lengths == 0)).sum()):
        raise ValueError(f"{bare} positions with a label have no stored distribution: the targets are of other labels")
    size = len(targets.ids)
    keep_M = keep.repeat_interleave(lengths, output_size=size)
    rows_M = (keep.cumsum(0) - 1).repeat_interleave(lengths, output_size=size)
    return Entries(rows_M[keep_M], targets.ids[keep_M], targets.values[keep_M])


def merge(several: Sequence[Entries], shares: Sequence[float], vocabulary: int) -> Entries:
    """The weighted sum of sparse distributions; ids that several of them hold become one entry."""
    values = torch.cat([one.values * share for one, share in zip(several, shares, strict=True)])
    if len(several) == 1:
        return Entries(several[0].rows, several[0].ids, values)
    keys = torch.cat([one.rows * vocabulary + one.ids for one in several])
    found, place = torch.unique(keys, sorted=True, return_inverse=True)
    summed = values.new_zeros(len(found)).index_add_(0, place, values)
    return Entries(found // vocabulary, found % vocabulary, summed)


@dataclass(frozen=True)
class Gathered:
    """Logits at a chunk's entries, taken before the slope is written over them."""

    student: Tensor
    teachers: list[Tensor]

    @classmethod
    def at(cls, entries: Entries, logits_CV: Tensor, teachers_CV: Iterable[Tensor]) -> Gathered:
        """Gather from the student's and the dense teachers' logits."""
        where = (entries.rows, entries.ids)
        return cls(logits_CV[where], [one[where] for one in teachers_CV])


def correct(
    entries: Entries, logits: Gathered, rows: Rows, labels_C: Tensor, objective: Objective, slope_CV: Tensor | None
) -> Tensor:
    """What sparse entries add to the sum of forward KLs that the dense teachers have given; rewrites their slopes.

    With s = sum w_i p_i over the dense teachers only, whose shares sum to d, and m = s + t, a position's loss is
    ``sum m log m - sum m z + log Z``, whose derivative by z is q - m for any sum of t (Sparse Logit Sampling, 2025,
    arXiv:2503.16870, has the case of sum t = 1). Of this the dense part has been counted as ``sum s (log s - log q)``
    and q - s. A slope is written anew, not added to: in bfloat16 the difference of q and t would be lost.
    """
    temperature = objective.temperature
    here = entries.rows
    values = entries.values.to(logits.student.dtype)
    log_q = logits.student / temperature - rows.log_z[here]
    dense = torch.zeros_like(values)
    for one, log_z, share in zip(logits.teachers, rows.teachers_log_z, objective.shares, strict=True):
        dense += share * (one / temperature - log_z[here]).exp()
    mixed = dense + values
    lacking = torch.full_like(rows.log_z, 1 - sum(objective.shares)).index_add_(0, here, values, alpha=-1)
    added = torch.xlogy(mixed, mixed) - torch.xlogy(dense, dense) - values * log_q
    if slope_CV is not None:
        slope = (log_q.exp() - mixed) * (temperature * (1 - objective.ce_weight))
        if objective.ce_weight > 0:
            q1 = (logits.student - rows.log_z1[here]).exp()
            slope += objective.ce_weight * (q1 - (entries.ids == labels_C[here]).to(q1.dtype))
        slope_CV[here, entries.ids] = slope.to(slope_CV.dtype)
    return added.sum(dtype=torch.float64) + (lacking * rows.log_z).sum(dtype=torch.float64)


def soft_cross_entropy(entries: Entries, logits: Gathered, rows: Rows, objective: Objective) -> Tensor:
    """Minus the sum of t log q, an unbiased estimate of the cross-entropy of teacher and student."""
    log_q = logits.student / objective.temperature - rows.log_z[entries.rows]
    return -(entries.values.to(log_q.dtype) * log_q).sum(dtype=torch.float64)


@dataclass(frozen=True)
class Stored:
    """The sparse targets of a micro-batch, by chunk."""

    mixture: list[Entries]
    """Their weighted sum; without any sparse target the list is empty."""
    each: list[list[Entries]]
    """Those of every teacher, where its statistics are wanted."""

    @classmethod
    def of(
        cls,
        entries: Sequence[Entries],
        shares: Sequence[float],
        rows: int,
        num_rows: int,
        vocabulary: int,
        *,
        measure: bool,
    ) -> Stored:
        """Cut the entries of all sparse teachers into chunks of ``rows`` positions."""
        if not entries:
            return cls([], [])
        mixture = merge(entries, shares, vocabulary).chunks(rows, num_rows)
        return cls(mixture, [one.chunks(rows, num_rows) for one in entries] if measure else [])

    def take(self, number: int, logits_CV: Tensor, teachers_CV: Iterable[Tensor]) -> Taken | None:
        """What the chunk of this number needs once its logits are overwritten."""
        if not self.mixture:
            return None
        mixture, each = self.mixture[number], [chunks[number] for chunks in self.each]
        return Taken(
            mixture,
            Gathered.at(mixture, logits_CV, teachers_CV),
            [(entries, Gathered.at(entries, logits_CV, [])) for entries in each],
        )


@dataclass(frozen=True)
class Taken:
    """A chunk's entries with the logits at them."""

    mixture: Entries
    logits: Gathered
    each: list[tuple[Entries, Gathered]]

    def finish(
        self, rows: Rows, labels_C: Tensor, objective: Objective, slope_CV: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the entries add to the divergence, and each teacher's soft cross-entropy; rewrites slopes."""
        soft_ce = [soft_cross_entropy(entries, logits, rows, objective) for entries, logits in self.each]
        added = correct(self.mixture, self.logits, rows, labels_C, objective, slope_CV)
        return added, torch.stack(soft_ce) if soft_ce else added.new_zeros(())
