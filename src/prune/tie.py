"""One matrix in the place of an embedding and an output matrix.

Shape letters: V = vocabulary, D = hidden size of the source, d = of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamita.prune.basis import Basis, widened
from llamita.prune.plan import Plan
from llamita.prune.target import Tie

CHUNK_ROWS = 16384
COVARIANCE_WEIGHT = 4.0
"""Pull towards the embedding where two matrices become one, in mean eigenvalues of the head input's covariance."""


@torch.no_grad()
def tied(embedding_VD: Tensor, head_VD: Tensor, gain_D: Tensor, plan: Plan, scale: float) -> Tensor:
    """The shared matrix [V, d] along the plan's axes; the final norm's gain is multiplied by ``scale``.

    E is the embedding and U the output matrix seen along the axes, n the final norm's output and n' what the cut
    norm gives of it. ``mean``: (E + U / s) / 2. ``least_squares``: the minimiser W of

        a |W - E|^2 + E |s W n' - U_D n|^2, which is (a E + s U_D E[n n'^T]) (a I + s^2 E[n' n'^T])^-1:

    the second term is the squared error of the logits, and a is ``COVARIANCE_WEIGHT`` times the mean of the diagonal
    of s^2 E[n' n'^T].
    """
    basis, wide = plan.basis, torch.float64 if embedding_VD.dtype == torch.float64 else torch.float32
    of_head, of_embedding = _mixture(gain_D, plan, scale)
    result = torch.empty(len(embedding_VD), len(plan.hidden), dtype=embedding_VD.dtype)
    for first in range(0, len(embedding_VD), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        part = torch.zeros_like(result[rows], dtype=wide)
        if of_embedding is not None:
            part += basis.states(embedding_VD[rows].to(wide)) @ of_embedding.to(wide)
        if of_head is not None:
            part += head_VD[rows].to(wide) @ of_head.to(wide)
        result[rows] = part.to(result.dtype)
    return result


def _mixture(gain_D: Tensor, plan: Plan, scale: float) -> tuple[Tensor | None, Tensor | None]:
    """What the output matrix [D, d] and the embedding along the axes [d, d] are multiplied by, in float64."""
    seen_Dd = plan.basis.embed(gain_D.double())
    one_dd = torch.eye(seen_Dd.shape[1], dtype=torch.float64)
    match plan.tie:
        case Tie.embedding:
            return None, one_dd
        case Tie.head:
            return seen_Dd / scale, None
        case Tie.mean:
            return seen_Dd / (2 * scale), one_dd / 2
        case _:
            assert plan.tie is Tie.least_squares
            assert plan.head_covariance is not None
    cut_dD = _cut(gain_D.double(), plan.basis)
    covariance_DD = plan.head_covariance.double()
    cross_Dd = gain_D.double()[:, None] * covariance_DD @ cut_dD.T
    inner_dd = scale**2 * cut_dD @ covariance_DD @ cut_dD.T
    weight = COVARIANCE_WEIGHT * float(inner_dd.diagonal().mean())
    inverse_dd = torch.linalg.inv(one_dd + inner_dd / weight)
    return scale / weight * cross_Dd @ inverse_dd, inverse_dd


def _cut(gain_D: Tensor, basis: Basis) -> Tensor:
    """[d, D]: the cut norm's output by the whole norm's output before its gain."""
    if basis.directions is not None:
        return basis.directions.double().T
    return torch.diag(gain_D)[basis.channels]


def scale(embedding_VD: Tensor, head_VD: Tensor, gain_D: Tensor, basis: Basis) -> float:
    """Root mean square of the output matrix over that of the embedding, both along the axes."""
    squares = [0.0, 0.0]
    for first in range(0, len(embedding_VD), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        squares[0] += float(widened(basis.states(embedding_VD[rows])).double().square().sum())
        squares[1] += float(widened(basis.reads(head_VD[rows], gain_D)).double().square().sum())
    return (squares[1] / squares[0]) ** 0.5 if squares[0] and squares[1] else 1.0
