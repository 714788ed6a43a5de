"""Few entries that stand for a whole next-token distribution, drawn so that their mean over seeds is the distribution.

Everything is drawn from probabilities in fixed point: integers of ``2**-48``, whose sums are exact in any order. So a
GPU's scan gives the same entries every time, and no rounding builds up along a vocabulary of 128,256.

Shape letters: C = positions of a chunk, N = positions, V = vocabulary, E = hidden size of the teacher, J = draws per
position, K = uniform numbers per position, M = stored entries of all positions together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from llamita.distill.fused import matmul
from llamita.distill.losses import TeacherStates

ONE = 2**48
"""The fixed-point number of probability 1: 63 times it still fits 64 bits, and V roundings stay below 1e-9."""
CHUNK_BYTES_PER_VALUE = 40
"""Logits, probabilities, their fixed-point numbers and running sums, and the temporaries between them."""


class Sampler(StrEnum):
    """Which entries of a distribution p are kept, and what stands for them; J = samples per token."""

    systematic = "systematic"
    """J ids at which the running sum of p crosses (u + j) / J, one u for all j; the value is count / J. Unbiased, of
    variance sum f (1 - f) / J^2 with f = frac(J p): every count is J p rounded up or down."""
    random = "random"
    """J independent draws (Random Sampling KD, arXiv:2503.16870); count / J. Unbiased, variance (1 - sum p^2) / J."""
    threshold = "threshold"
    """Every p >= 1/J itself in bfloat16, the others with probability J p and the value 1/J. Unbiased, of variance sum
    over the others of p (1/J - p). Values sum to one on average only."""
    top_k = "top_k"
    """The J largest, divided by their sum. Biased, for comparison."""

    @property
    def stores_values(self) -> bool:
        """Whether some entries need a value of their own beside their id."""
        return self in (Sampler.threshold, Sampler.top_k)

    def num_uniforms(self, samples: int) -> int:
        """How many uniform numbers a position needs."""
        match self:
            case Sampler.systematic:
                return 1
            case Sampler.random:
                return samples
            case Sampler.threshold:
                return 2
            case Sampler.top_k:
                return 0


@dataclass(frozen=True)
class Draws:
    """Entries of some positions, in their order, ids rising within each."""

    ids: Tensor
    """``[M]``, int64."""
    counts: Tensor
    """``[M]``, int64: how many of the J draws fell on the id; 0 where the value is one of its own."""
    values: Tensor
    """``[M]``, float32: what stands for p."""
    lengths: Tensor
    """``[C]``, int64: entries of each position, at least one."""


def draw(logits_CV: Tensor, sampler: Sampler, samples: int, uniform_CK: Tensor, *, temperature: float = 1.0) -> Draws:
    """Entries for each row of ``logits``, by uniform numbers in 0..1 that the caller chose.

    Raises:
        ValueError: a row has no finite distribution.
    """
    weight_CV = _fixed_point(logits_CV, temperature)
    match sampler:
        case Sampler.systematic:
            step_J = torch.arange(samples, device=uniform_CK.device)
            return _counted(_crossings(weight_CV, (uniform_CK + step_J) / samples), samples)
        case Sampler.random:
            return _counted(_crossings(weight_CV, uniform_CK).sort(-1).values, samples)
        case Sampler.threshold:
            return _threshold(weight_CV, samples, uniform_CK)
        case Sampler.top_k:
            return _top_k(weight_CV, samples)


def sample(
    teacher: TeacherStates,
    sampler: Sampler,
    samples: int,
    uniform_NK: Tensor,
    *,
    temperature: float,
    chunk_mebibytes: int,
) -> Draws:
    """Entries for hidden states ``[N, E]``, a chunk of positions at a time, so that ``[N, V]`` never exists."""
    rows = max(1, chunk_mebibytes * 2**20 // (CHUNK_BYTES_PER_VALUE * teacher.head.shape[0]))
    parts = [
        draw(
            logits(teacher.hidden[start : start + rows], teacher.head),
            sampler,
            samples,
            uniform_NK[start : start + rows],
            temperature=temperature,
        )
        for start in range(0, len(teacher.hidden), rows)
    ]
    return Draws(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "counts", "values", "lengths"))
    )


def logits(hidden_CE: Tensor, head_VE: Tensor) -> Tensor:
    """``[C, V]`` in float32 or better, accumulated at that precision."""
    exact = torch.promote_types(head_VE.dtype, torch.float32)
    return matmul(hidden_CE, head_VE.T, hidden_CE.new_empty(len(hidden_CE), len(head_VE), dtype=exact))


def _fixed_point(logits_CV: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) in units of ``1 / ONE``, int64."""
    p_CV = torch.softmax(logits_CV / temperature, dim=-1)
    if not torch.isfinite(p_CV.sum()):
        raise ValueError("the teacher's logits are not finite: look at its weights and at the dtype it runs in")
    return p_CV.double().mul_(ONE).round_().long()


def _crossings(weight_CV: Tensor, share_CJ: Tensor) -> Tensor:
    """The first id of each row whose running sum is above that share of the row's sum, ``[C, J]``."""
    sum_CV = weight_CV.cumsum(-1)
    total_C1 = sum_CV[:, -1:]
    at_CJ = (share_CJ * total_C1).floor().long()
    return torch.searchsorted(sum_CV, torch.minimum(at_CJ, total_C1 - 1), right=True)


def _counted(ids_CJ: Tensor, samples: int) -> Draws:
    """Runs of equal ids become one entry with their number."""
    begins_CJ = torch.ones_like(ids_CJ, dtype=torch.bool)
    begins_CJ[:, 1:] = ids_CJ[:, 1:] != ids_CJ[:, :-1]
    begin_M = begins_CJ.flatten().nonzero()[:, 0]
    counts_M = torch.diff(begin_M, append=begin_M.new_tensor([ids_CJ.numel()]))
    return Draws(ids_CJ.flatten()[begin_M], counts_M, counts_M.float() / samples, begins_CJ.sum(-1))


def _threshold(weight_CV: Tensor, samples: int, uniform_CK: Tensor) -> Draws:
    """The head exactly, the tail systematically in steps of 1/J: an id below the step is crossed at most once."""
    vocabulary = weight_CV.shape[1]
    total_C1 = weight_CV.sum(-1, keepdim=True)
    is_head_CV = weight_CV * samples >= total_C1
    top_weight_CJ, top_CJ = weight_CV.topk(min(samples, vocabulary), dim=-1)
    in_head_CJ = is_head_CV.gather(1, top_CJ)
    sum_CV = weight_CV.masked_fill(is_head_CV, 0).cumsum(-1)
    step_J = torch.arange(samples, device=uniform_CK.device)
    at_CJ = ((uniform_CK[:, :1] + step_J) / samples * total_C1).floor().long()
    # What lies behind the tail's mass finds the end of the vocabulary, which stands for no entry.
    tail_CJ = torch.searchsorted(sum_CV, at_CJ, right=True)
    exact_CJ = _dithered((top_weight_CJ / total_C1).float(), uniform_CK[:, 1:])
    ids = torch.cat([top_CJ.masked_fill(~in_head_CJ, vocabulary), tail_CJ], dim=1)
    values = torch.cat([exact_CJ, torch.full_like(tail_CJ, 1 / samples, dtype=torch.float32)], dim=1)
    counts = torch.cat([torch.zeros_like(top_CJ), torch.ones_like(tail_CJ)], dim=1)
    ids, place = ids.sort(-1)
    keep = ids < vocabulary
    return Draws(ids[keep], counts.gather(1, place)[keep], values.gather(1, place)[keep], keep.sum(-1))


def _dithered(value_CJ: Tensor, uniform_C1: Tensor) -> Tensor:
    """Positive float32 numbers rounded to bfloat16, up or down, so that their mean over the uniform is exact."""
    dither_C1 = (uniform_C1 * 2**16).to(torch.int32)
    return ((value_CJ.view(torch.int32) + dither_C1) & ~0xFFFF).view(torch.float32)


def _top_k(weight_CV: Tensor, samples: int) -> Draws:
    top_CJ, ids_CJ = weight_CV.topk(min(samples, weight_CV.shape[1]), dim=-1)
    ids_CJ, place_CJ = ids_CJ.sort(-1)
    top_CJ = top_CJ.gather(1, place_CJ)
    values_CJ = (top_CJ / top_CJ.sum(-1, keepdim=True)).float()
    lengths_C = torch.full_like(ids_CJ[:, 0], ids_CJ.shape[1])
    return Draws(ids_CJ.flatten(), torch.zeros_like(ids_CJ).flatten(), values_CJ.flatten(), lengths_C)
