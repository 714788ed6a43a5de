"""Heads, divergence and both gradients in one pass over chunks of positions.

Shape letters: N = supervised positions of a micro-batch, C = positions of a chunk, V = vocabulary, W = columns of the
logits: V, or more where the matrices have padding, H = hidden size of the student, E = of a teacher.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamita.distill import divergences
from llamita.distill.divergences import CE, KD, KL, Objective, Rows
from llamita.distill.sparse import Entries, Stored

CHUNK_MEBIBYTES = {"cpu": 128}
"""Default budget by type of device."""
CHUNK_MEBIBYTES_ELSEWHERE = 1024
TILE = 128
"""Rows and columns of a matrix product on a GPU come in multiples of this, where there is a choice."""
CACHE_BYTES = 2**22
"""What the plain path may touch at a time on a CPU."""


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_kernels(device: torch.device) -> bool:
    """Whether Triton does the work between the matrix products: on CUDA, and anywhere in its interpreter."""
    return _has_triton() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the loss needs besides the two tensors that it is differentiated by."""

    labels: Tensor
    """``[N]``."""
    dense: list[tuple[Tensor, Tensor]]
    """Hidden states ``[N, E]`` and heads of the teachers that give them."""
    entries: list[Entries]
    """Those of each teacher that gives sparse targets."""
    entry_shares: list[float]
    is_sparse: list[bool]
    """For each teacher in the order in which they were given."""
    objective: Objective
    compute_dtype: torch.dtype
    vocabulary: int
    """Ids that exist; rows of a head beyond them are padding."""
    chunk_mebibytes: int | None
    differentiate: bool
    """Whether gradients are wanted at all: autograd asks for them of parameters where nothing is recorded as well."""

    @property
    def exact(self) -> torch.dtype:
        """The dtype of everything that is not an input of a matrix product."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    def columns(self, head_rows: int, device: torch.device) -> int:
        """How many rows of the heads are applied: on a GPU some of the padding too, for the sake of alignment."""
        if not uses_kernels(device):
            return self.vocabulary
        tiles = math.ceil(self.vocabulary / TILE) * TILE
        return min(tiles, head_rows, *(len(head) for _, head in self.dense))

    def chunk_rows(self, num_rows: int, columns: int, device: torch.device) -> tuple[int, int]:
        """Positions of a chunk, as many as the byte budget holds, and how many to work on at once in plain PyTorch.

        What that work needs on the way takes at most half of the budget, and on a CPU stays small enough for a cache.
        """
        budget = (self.chunk_mebibytes or default_mebibytes(device.type)) * 2**20
        row = columns * self.exact.itemsize
        buffers = (1 + len(self.dense)) * row
        if uses_kernels(device):
            rows_at_once = 0
            buffers += columns * self.compute_dtype.itemsize if self.compute_dtype != self.exact else 0
            rows = max(1, budget // buffers)
        else:
            scratch = divergences.scratch_buffers(len(self.dense)) * row
            rows_at_once = max(1, min(budget // 2, CACHE_BYTES if device.type == "cpu" else budget) // scratch)
            rows = max(1, (budget - rows_at_once * scratch) // buffers)
        even = math.ceil(num_rows / max(1, math.ceil(num_rows / rows)))
        tile = TILE if device.type == "cuda" else 1
        return max(1, min(rows, math.ceil(even / tile) * tile)), rows_at_once

    def select(self, sums: Tensor, soft_ce: Tensor) -> Tensor:
        """The sums that ``losses.statistics`` names, in its order."""
        if not self.is_sparse:
            return sums[: CE + 2]
        whole = sums[: KD + 1] if self.entries else sums[:KL]
        kls, soft = iter(sums[KL:]), iter(soft_ce)
        return torch.cat([whole, *(next(soft if is_sparse else kls)[None] for is_sparse in self.is_sparse)])


def default_mebibytes(device_type: str) -> int:
    """The budget where none is set."""
    return CHUNK_MEBIBYTES.get(device_type, CHUNK_MEBIBYTES_ELSEWHERE)


class FusedLoss(torch.autograd.Function):
    """Loss and statistics of hidden states ``[N, H]`` and a head; both gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, job: Job) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_head = (job.differentiate and needs for needs in ctx.needs_input_grad[:2])
        with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
            work = _Pass.of(hidden_NH, head_VH, job, wants_hidden=wants_hidden, wants_head=wants_head)
            sums, soft_ce = work.run()
        ctx.gradients = (work.grad_hidden, work.grad_head)
        ctx.dtype = head_VH.dtype
        c = job.objective.ce_weight
        chosen = job.select(sums, soft_ce)
        ctx.mark_non_differentiable(chosen)
        return (c * sums[CE] + (1 - c) * sums[KD]).to(job.exact), chosen

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


@dataclass(frozen=True)
class _Pass:
    """One pass over the chunks of a micro-batch, and the buffers that all chunks share."""

    job: Job
    hidden: Tensor
    head: Tensor
    heads: list[Tensor]
    """The teachers'."""
    grad_hidden: Tensor | None
    grad_head: Tensor | None
    logits: Tensor
    teacher_logits: Tensor
    slope: Tensor | None
    rows_at_once: int

    @classmethod
    def of(cls, hidden_NH: Tensor, head_VH: Tensor, job: Job, *, wants_hidden: bool, wants_head: bool) -> _Pass:
        """Allocate everything; nothing is computed."""
        device, exact = hidden_NH.device, job.exact
        columns = job.columns(len(head_VH), device)
        rows, rows_at_once = job.chunk_rows(len(hidden_NH), columns, device)
        rows = min(rows, len(hidden_NH))
        logits = torch.empty(rows, columns, dtype=exact, device=device)
        slope = None
        if wants_hidden or wants_head:
            apart = uses_kernels(device) and job.compute_dtype != exact
            slope = torch.empty_like(logits, dtype=job.compute_dtype) if apart else logits
        return cls(
            job,
            hidden_NH,
            head_VH[:columns].to(job.compute_dtype),
            [head[:columns] for _, head in job.dense],
            torch.zeros_like(hidden_NH) if wants_hidden else None,
            torch.zeros_like(head_VH, dtype=exact) if wants_head else None,
            logits,
            logits.new_empty(len(job.dense), rows, columns),
            slope,
            rows_at_once,
        )

    def run(self) -> tuple[Tensor, Tensor]:
        """The sums of :class:`Rows`, and the soft cross-entropy of each sparse teacher; fills the gradients."""
        job, rows = self.job, max(1, len(self.logits))
        sums = self.hidden.new_zeros(KL + len(job.dense), dtype=torch.float64)
        soft_ce = sums.new_zeros(len(job.entries))
        stored = Stored.of(
            job.entries, job.entry_shares, rows, len(self.hidden), job.vocabulary, measure=job.objective.measure
        )
        for number, start in enumerate(range(0, len(self.hidden), rows)):
            self._chunk(number, slice(start, min(start + rows, len(self.hidden))), stored, sums, soft_ce)
        sums[KD] *= job.objective.temperature**2
        return sums, soft_ce

    def _chunk(self, number: int, chunk: slice, stored: Stored, sums: Tensor, soft_ce: Tensor) -> None:
        job, num_rows = self.job, chunk.stop - chunk.start
        hidden_CH, labels_C = self.hidden[chunk].to(job.compute_dtype), job.labels[chunk]
        logits_CW, teachers_CW = self.logits[:num_rows], self.teacher_logits[:, :num_rows]
        matmul(hidden_CH, self.head.T, logits_CW)
        for (hidden_NE, _), head, out in zip(job.dense, self.heads, teachers_CW, strict=True):
            matmul(hidden_NE[chunk], head.T, out)
        taken = stored.take(number, logits_CW, teachers_CW)
        slope_CW = None if self.slope is None else self.slope[:num_rows]
        found = self._evaluate(logits_CW, teachers_CW, labels_C, slope_CW)
        sums += found.sums
        if taken is not None:
            added, soft = taken.finish(found, labels_C, job.objective, slope_CW)
            sums[KD] += added
            soft_ce += soft
        if slope_CW is not None and self.grad_hidden is not None:
            out = torch.empty(hidden_CH.shape, dtype=job.exact, device=hidden_CH.device)
            self.grad_hidden[chunk] = matmul(slope_CW, self.head, out)
        if slope_CW is not None and self.grad_head is not None:
            _add_matmul(self.grad_head[: len(self.head)], slope_CW.T, hidden_CH)

    def _evaluate(self, logits_CW: Tensor, teachers_CW: Tensor, labels_C: Tensor, slope_CW: Tensor | None) -> Rows:
        objective = self.job.objective
        if uses_kernels(logits_CW.device):
            from llamita.distill import kernels  # needs Triton, which comes with torch for CUDA only

            return kernels.evaluate(
                logits_CW, teachers_CW, labels_C, objective, slope_CW, vocabulary=self.job.vocabulary
            )
        return divergences.evaluate(
            logits_CW, teachers_CW, labels_C, objective, slope_CW, rows_at_once=self.rows_at_once
        )


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` with inputs in the dtype of ``b``, accumulated in that of ``out``."""
    a = a.to(b.dtype)
    if b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return out
    # No kernel for the CPU takes bfloat16 in and gives float32 out; the product of two bfloat16 is exact in float32.
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` with inputs in the dtype of ``b``, accumulated in that of ``total``."""
    a = a.to(b.dtype)
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
