"""Which units can leave when those that stay take over what they can: second-order elimination.

The output of a layer is y_t = W z_t, z the units. When a set of units leaves and the columns of the others are fitted
anew by least squares, sum_t ||W z_t - W' z_t||^2 rises; the units are removed one by one (or block by block), always
the one whose leaving raises it least.

Shape letters: D = outputs, F = units, n = units that are still there, N = blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAZY_UNITS = 128
"""Units that leave between two updates of the whole matrices: each is then one product of matrices, not 128 of
vectors, which at width 14,336 would move 10 TB per layer."""


@dataclass(frozen=True, eq=False)
class Inverse:
    """(C + lambda I)^-1 of the units' covariance C, lambda = ridge mean(diag C)."""

    matrix: Tensor
    """[F, F], float64"""
    damping: float
    """lambda"""

    @classmethod
    def of(cls, covariance_FF: Tensor, ridge: float) -> Inverse:
        """Of that covariance.

        Raises:
            ValueError: the units never fired, or their covariance is not finite.
        """
        factor_FF, failed = torch.linalg.cholesky_ex(damp(covariance_FF, ridge))
        if failed or not factor_FF.isfinite().all():
            raise ValueError(
                "the units' covariance on the calibration text is not positive definite: they are silent or not "
                "finite; use more text (calibration.tokens) or a wider dtype (calibration.dtype=float32)"
            )
        damping = ridge * float(covariance_FF.diagonal().double().mean())
        return cls(torch.cholesky_inverse(factor_FF), damping)

    def leverage(self) -> Tensor:
        """Ridge leverage [F]: diag C (C + lambda I)^-1 = 1 - lambda diag (C + lambda I)^-1; larger = keep.

        Lin et al., 2024, arXiv:2408.09632 (MoDeGPT), algorithm 1.
        """
        return 1 - self.damping * self.matrix.diagonal()


def damp(covariance_FF: Tensor, ridge: float) -> Tensor:
    """C + ridge mean(diag C) I, a new tensor in float64."""
    damped_FF = covariance_FF.double().clone()
    damped_FF.diagonal().add_(ridge * damped_FF.diagonal().mean())
    return damped_FF


def unit_order(inverse: Inverse, weight_DF: Tensor) -> tuple[Tensor, Tensor]:
    """The units [F] in the order in which they leave, and what each one's leaving adds to the squared error [F].

    With H = (C + lambda I)^-1 and W' the columns fitted to the units that are left, removing unit j adds
    ||W'[:, j]||^2 / H_jj, and then W' <- W' - W'[:, j] H[j, :] / H_jj and H <- H - H[:, j] H[j, :] / H_jj (Hassibi and
    Stork, 1993; Kurtic et al., 2023, arXiv:2302.04089, eq. 2-4; Meng et al., 2024, arXiv:2403.12983). Only the norms
    of W's columns matter for the choice, so its Gram matrix G = W'^T W' is carried along in its place. With v_j =
    H[:, j] / sqrt(H_jj) and u_j = G[:, j] / sqrt(H_jj) - v_j G_jj / (2 H_jj), one step is H <- H - v v^T and G <- G -
    v u^T - u v^T: ``LAZY_UNITS`` such vectors are gathered and then subtracted at once. The choice is the same as
    without the delay, because the diagonals and the columns that it needs are brought up to date at every step.
    """
    inverse_nn = inverse.matrix
    wide_DF = weight_DF.double()
    gram_nn = wide_DF.T @ wide_DF
    alive = torch.arange(len(inverse_nn), device=inverse_nn.device)
    order, costs = [], []
    while len(alive):
        gone, cost, v_nk, u_nk = _lazy_steps(inverse_nn, gram_nn)
        order.append(alive[gone])
        costs.append(cost)
        stay = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        stay[gone] = False
        v_nk, u_nk = v_nk[stay], u_nk[stay]
        inverse_nn = inverse_nn[stay][:, stay].addmm_(v_nk, v_nk.T, alpha=-1)
        gram_nn = gram_nn[stay][:, stay].addmm_(v_nk, u_nk.T, alpha=-1).addmm_(u_nk, v_nk.T, alpha=-1)
        alive = alive[stay]
    return torch.cat(order), torch.cat(costs)


def _lazy_steps(inverse_nn: Tensor, gram_nn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next units that leave, their costs, and the vectors v and u of each."""
    steps = min(LAZY_UNITS, len(inverse_nn))
    v_nk, u_nk = (inverse_nn.new_zeros(len(inverse_nn), steps) for _ in range(2))
    diagonal_n, norms_n = inverse_nn.diagonal().clone(), gram_nn.diagonal().clone()
    left_n = torch.zeros_like(diagonal_n)
    gone, costs = [], []
    for step in range(steps):
        cost_n = norms_n.clamp(min=0) / diagonal_n + left_n
        unit = cost_n.argmin()
        gone.append(unit)
        costs.append(cost_n[unit])
        v, u = v_nk[:, :step], u_nk[:, :step]
        row_v, row_u = v[unit], u[unit]
        column_n = inverse_nn[:, unit] - v @ row_v
        pivot = column_n[unit]
        v_n = column_n / pivot.sqrt()
        gram_n = gram_nn[:, unit] - v @ row_u - u @ row_v
        u_n = gram_n / pivot.sqrt() - v_n * (gram_n[unit] / (2 * pivot))
        v_nk[:, step], u_nk[:, step] = v_n, u_n
        diagonal_n -= v_n.square()
        norms_n -= 2 * v_n * u_n
        left_n[unit] = torch.inf
        diagonal_n[unit] = 1.0
    return torch.stack(gone), torch.stack(costs), v_nk, u_nk


def block_order(inverse: Inverse, weight_DF: Tensor, *, blocks: int, families: int) -> tuple[Tensor, Tensor]:
    """As :func:`unit_order`, for ``blocks`` runs of F / blocks neighbouring units: attention heads, or KV groups.

    A block B adds tr(W'_B (H_BB)^-1 W'_B^T). The blocks belong to ``families`` equal runs (KV heads whose query heads
    they are; 1 where any block may leave), and no family loses a second block before every other has lost as many:
    however many are removed in whole rounds, each family keeps the same number.

    Returns:
        the blocks [N] in the order in which they leave, and their costs [N].
    """
    inverse_FF, wide_DF = inverse.matrix.clone(), weight_DF.double().clone()
    size, members = len(inverse_FF) // blocks, blocks // families
    rows = torch.arange(blocks * size, device=inverse_FF.device).view(blocks, size)
    lost = [0] * families
    left = list(range(blocks))
    order, costs = [], []
    while left:
        fewest = min(lost[block // members] for block in left)
        candidates = [block for block in left if lost[block // members] == fewest]
        inside = rows[candidates]
        inverse_Ckk = torch.linalg.inv(inverse_FF[inside[:, :, None], inside[:, None, :]])
        columns_CDk = wide_DF[:, inside].transpose(0, 1)
        cost_C = ((columns_CDk @ inverse_Ckk) * columns_CDk).sum((1, 2))
        best = int(cost_C.argmin())
        block, among = candidates[best], rows[candidates[best]]
        removed_kF = inverse_Ckk[best] @ inverse_FF[among]
        wide_DF -= wide_DF[:, among] @ removed_kF
        inverse_FF -= inverse_FF[:, among] @ removed_kF
        inverse_FF[among] = inverse_FF[:, among] = 0.0
        inverse_FF[among, among] = 1.0
        wide_DF[:, among] = 0.0
        order.append(block)
        costs.append(cost_C[best])
        lost[block // members] += 1
        left.remove(block)
    return torch.tensor(order), torch.stack(costs)


def ranks(order_F: Tensor) -> Tensor:
    """For each unit when it leaves: 0 first, so that larger = keep."""
    ranks_F = torch.empty(len(order_F), dtype=torch.float64)
    ranks_F[order_F.cpu()] = torch.arange(len(order_F), dtype=torch.float64)
    return ranks_F
