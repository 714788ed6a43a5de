"""The same values and derivatives as :mod:`llamita.distill.divergences`, in Triton: two reads and one write of logits.

One kernel finds each row's log-sum-exp. A second reads the logits again, sums the loss and its statistics, and writes
the derivative in the dtype in which it will be multiplied. Divergences other than the forward KL need the sum of q u
first, and read once more. Each program owns one row, so nothing is added across programs and results repeat exactly.

Shape letters: C = positions of a chunk, V = vocabulary, W = columns of the logits, padding included.
"""

# The arguments of kernels have Triton's types, not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: SIM108  (Triton takes the branches of an if apart at compile time, those of an expression not)

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamita.distill.divergences import KD, KL, Divergence, Objective, Rows

BLOCK = 4096
"""Most columns at a time: with 16 warps each thread holds eight, two loads of 16 bytes."""
NUM_WARPS = 16


@triton.jit
def _log_z_kernel(
    logits, log_z, log_z1, vocabulary, width, TEMPERATURE: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Log-sum-exp of a row at the temperature, and with ``BOTH`` at 1 as well."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * width
    dtype = logits.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    top = tl.full([], float("-inf"), dtype)
    total = tl.full([], 0.0, dtype)
    total1 = tl.full([], 0.0, dtype)
    for first in range(0, vocabulary, BLOCK):
        z = tl.load(start + first + columns, mask=first + columns < vocabulary, other=float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp((top - higher) / TEMPERATURE) + tl.sum(tl.exp((z - higher) / TEMPERATURE), 0)
        if BOTH:
            total1 = total1 * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    tl.store(log_z + row, top / TEMPERATURE + tl.log(total))
    if BOTH:
        tl.store(log_z1 + row, top + tl.log(total1))


@triton.jit
def _log_add(a, b):
    """log(exp a + exp b)."""
    high = tl.maximum(a, b)
    return high + tl.log(1 + tl.exp(tl.minimum(a, b) - high))


@triton.jit
def _skewed(log_a, log_b, SHARE: tl.constexpr, LOG_SHARE: tl.constexpr, LOG_REST: tl.constexpr):
    """log(share a + (1 - share) b)."""
    if SHARE == 0:
        mixed = log_b
    else:
        mixed = _log_add(log_a + LOG_SHARE, log_b + LOG_REST)
    return mixed


@triton.jit
def _log_mixture(
    teachers,
    log_zs,
    log_shares,
    row,
    columns,
    inside,
    num_rows,
    width,
    plane,
    TEMPERATURE: tl.constexpr,
    NUM: tl.constexpr,
):
    """log of the weighted sum of the teachers' probabilities."""
    place = teachers + row.to(tl.int64) * width + columns
    mixed = tl.load(place, mask=inside, other=0.0) / TEMPERATURE - tl.load(log_zs + row) + tl.load(log_shares)
    for teacher in tl.static_range(1, NUM):
        place += plane
        z = tl.load(place, mask=inside, other=0.0)
        log_z = tl.load(log_zs + teacher * num_rows + row)
        mixed = _log_add(mixed, z / TEMPERATURE - log_z + tl.load(log_shares + teacher))
    return mixed


@triton.jit
def _terms(
    log_p, p, log_q, q, KIND: tl.constexpr, SHARE: tl.constexpr, LOG_SHARE: tl.constexpr, LOG_REST: tl.constexpr
):
    """A column's part of the divergence, and q times the derivative of the divergence by q."""
    if KIND == "forward_kl":
        value = p * (log_p - log_q)
        weighed = -p
    elif KIND == "reverse_kl":
        value = q * (log_q - log_p)
        weighed = value
    elif KIND == "jsd":
        log_m = _log_add(log_p + LOG_SHARE, log_q + LOG_REST)
        weighed = (1 - SHARE) * q * (log_q - log_m)
        value = SHARE * p * (log_p - log_m) + weighed
    elif KIND == "skew_forward_kl":
        log_m = _skewed(log_p, log_q, SHARE, LOG_SHARE, LOG_REST)
        value = p * (log_p - log_m)
        weighed = (SHARE - 1) * p * tl.exp(log_q - log_m)
    elif KIND == "skew_reverse_kl":
        log_m = _skewed(log_q, log_p, SHARE, LOG_SHARE, LOG_REST)
        value = q * (log_q - log_m)
        weighed = value - SHARE * q * tl.exp(log_q - log_m)
    else:
        value = 0.5 * tl.abs(q - p)
        weighed = 0.5 * q * tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
    return value, weighed


@triton.jit
def _evaluate_kernel(
    student,
    teachers,
    labels,
    slope,
    sums,
    log_z,
    log_z1,
    log_zs,
    log_shares,
    num_rows,
    vocabulary,
    width,
    plane,
    KIND: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CE_WEIGHT: tl.constexpr,
    SHARE: tl.constexpr,
    LOG_SHARE: tl.constexpr,
    LOG_REST: tl.constexpr,
    NUM: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    MEASURE: tl.constexpr,
    WANTS_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of a row, in the order of ``Rows.sums``, and its slope.

    Columns from ``vocabulary`` to ``width`` get a slope of zero.
    """
    row = tl.program_id(0)
    dtype = student.dtype.element_ty
    start = student + row.to(tl.int64) * width
    label = tl.load(labels + row)
    z_label = tl.load(start + label)  # before a slope may be written over it
    z_sum = tl.load(log_z + row)
    z1_sum = tl.load(log_z1 + row)
    range_ = tl.arange(0, BLOCK)
    mean = tl.full([], 0.0, dtype)
    if NUM > 0 and WANTS_SLOPE and KIND != "forward_kl":
        weighed_sum = tl.zeros([BLOCK], dtype)
        for first in range(0, vocabulary, BLOCK):
            columns = first + range_
            inside = columns < vocabulary
            log_q = tl.load(start + columns, mask=inside, other=0.0) / TEMPERATURE - z_sum
            log_p = _log_mixture(
                teachers, log_zs, log_shares, row, columns, inside, num_rows, width, plane, TEMPERATURE, NUM
            )
            p = tl.where(inside, tl.exp(log_p), 0.0)
            q = tl.where(inside, tl.exp(log_q), 0.0)
            value, weighed = _terms(log_p, p, log_q, q, KIND, SHARE, LOG_SHARE, LOG_REST)
            weighed_sum += weighed
        mean = tl.sum(weighed_sum, 0)
    kd = tl.zeros([BLOCK], dtype)
    kl = tl.zeros([BLOCK], dtype)
    student_entropy = tl.zeros([BLOCK], dtype)
    teacher_entropy = tl.zeros([BLOCK], dtype)
    top_p = tl.full([], float("-inf"), dtype)
    top_q = tl.full([], float("-inf"), dtype)
    best_p = tl.full([], 0, tl.int32)
    best_q = tl.full([], 0, tl.int32)
    for first in range(0, width, BLOCK):
        columns = first + range_
        inside = columns < vocabulary
        z = tl.load(start + columns, mask=inside, other=0.0)
        log_q = z / TEMPERATURE - z_sum
        q = tl.where(inside, tl.exp(log_q), 0.0)
        log_q1 = z - z1_sum
        q1 = tl.where(inside, tl.exp(log_q1), 0.0)
        gradient = tl.zeros([BLOCK], dtype)
        if MEASURE:
            student_entropy -= q1 * log_q1
        if HAS_TEACHER and NUM == 0:
            gradient = q
        if NUM > 0:
            log_p = _log_mixture(
                teachers, log_zs, log_shares, row, columns, inside, num_rows, width, plane, TEMPERATURE, NUM
            )
            p = tl.where(inside, tl.exp(log_p), 0.0)
            value, weighed = _terms(log_p, p, log_q, q, KIND, SHARE, LOG_SHARE, LOG_REST)
            kd += value
            if KIND == "forward_kl":
                gradient = q - p
            else:
                gradient = weighed - q * mean
            if MEASURE:
                kl += p * (log_p - log_q)
                teacher_entropy -= p * log_p
                seen_p = tl.where(inside, log_p, float("-inf"))
                seen_q = tl.where(inside, log_q, float("-inf"))
                here_p = tl.max(seen_p, 0)
                here_q = tl.max(seen_q, 0)
                first_p = tl.min(tl.where(seen_p == here_p, columns, vocabulary), 0)
                first_q = tl.min(tl.where(seen_q == here_q, columns, vocabulary), 0)
                best_p = tl.where(here_p > top_p, first_p, best_p)
                best_q = tl.where(here_q > top_q, first_q, best_q)
                top_p = tl.maximum(top_p, here_p)
                top_q = tl.maximum(top_q, here_q)
        if WANTS_SLOPE:
            gradient = gradient * (TEMPERATURE * (1 - CE_WEIGHT))
            if CE_WEIGHT > 0:
                gradient += CE_WEIGHT * (q1 - tl.where(columns == label, 1.0, 0.0))
            place = slope + row.to(tl.int64) * width + columns
            tl.store(place, gradient.to(slope.dtype.element_ty), mask=columns < width)
    out = sums + row * 6
    tl.store(out, z1_sum - z_label)
    tl.store(out + 1, tl.sum(student_entropy, 0))
    tl.store(out + 2, tl.sum(kd, 0))
    tl.store(out + 3, tl.sum(teacher_entropy, 0))
    tl.store(out + 4, tl.where((best_p == best_q) & MEASURE, 1.0, 0.0))
    tl.store(out + 5, tl.sum(kl, 0))


def evaluate(
    logits_CW: Tensor,
    teachers_CW: Tensor,
    labels_C: Tensor,
    objective: Objective,
    slope_CW: Tensor | None,
    *,
    vocabulary: int,
) -> Rows:
    """As :func:`llamita.distill.divergences.evaluate`, with a slope of any floating dtype, which may be the logits.

    ``teachers_CW`` is ``[number of teachers, C, W]``. Only the first ``vocabulary`` columns count; the others, padding,
    get a slope of zero.
    """
    num_teachers, temperature = len(teachers_CW), objective.temperature
    log_z = logits_CW.new_empty(1 + num_teachers, len(logits_CW))
    log_z1 = log_z[0] if temperature == 1 else torch.empty_like(log_z[0])
    _log_z(logits_CW, log_z[0], log_z1, vocabulary, temperature)
    for one_CW, one in zip(teachers_CW, log_z[1:], strict=True):
        _log_z(one_CW, one, one, vocabulary, temperature)
    rows = Rows(logits_CW.new_zeros(KL + num_teachers, dtype=torch.float64), log_z[0], log_z1, list(log_z[1:]))
    is_one = objective.shares == (1.0,)
    if objective.measure and not is_one:
        alone = replace(objective, divergence=Divergence.forward_kl, shares=(1.0,), measure=False)
        for i in range(num_teachers):
            part = _sums(logits_CW, teachers_CW[i : i + 1], labels_C, alone, None, rows, log_z[1 + i], vocabulary)
            rows.sums[KL + i] = part[KD]
    sums = _sums(logits_CW, teachers_CW, labels_C, objective, slope_CW, rows, log_z[1:], vocabulary)
    known = KL + is_one
    rows.sums[:known] = sums[:known]
    return rows


def _log_z(logits_CW: Tensor, log_z: Tensor, log_z1: Tensor, vocabulary: int, temperature: float) -> None:
    rows, width = logits_CW.shape
    _log_z_kernel[(rows,)](
        logits_CW,
        log_z,
        log_z1,
        vocabulary,
        width,
        TEMPERATURE=temperature,
        BOTH=log_z1.data_ptr() != log_z.data_ptr(),
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        num_warps=NUM_WARPS,
    )


def _sums(
    logits_CW: Tensor,
    teachers_CW: Tensor,
    labels_C: Tensor,
    objective: Objective,
    slope_CW: Tensor | None,
    rows: Rows,
    teachers_log_z: Tensor,
    vocabulary: int,
) -> Tensor:
    """Sums over the chunk for these teachers; ``KL`` is that of the mixture."""
    num_rows, width = logits_CW.shape
    share = objective.jsd_beta if objective.divergence is Divergence.jsd else objective.skew
    sums = logits_CW.new_empty(num_rows, KL + 1)
    _evaluate_kernel[(num_rows,)](
        logits_CW,
        teachers_CW,
        labels_C,
        logits_CW if slope_CW is None else slope_CW,
        sums,
        rows.log_z,
        rows.log_z1,
        teachers_log_z,
        logits_CW.new_tensor([math.log(share) for share in objective.shares]),
        num_rows,
        vocabulary,
        width,
        teachers_CW.stride(0),
        KIND=objective.divergence.value,
        TEMPERATURE=objective.temperature,
        CE_WEIGHT=objective.ce_weight,
        SHARE=share,
        LOG_SHARE=math.log(share) if share > 0 else 0.0,
        LOG_REST=math.log1p(-share),
        NUM=len(teachers_CW),
        HAS_TEACHER=objective.has_teacher,
        MEASURE=objective.measure,
        WANTS_SLOPE=slope_CW is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        num_warps=NUM_WARPS,
    )
    return sums.sum(0, dtype=torch.float64)
