"""Least squares over calibration tokens, and the singular value decomposition that narrows a head's values.

Shape letters: T = tokens, C = inputs, O = outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamita.prune.obs import damp
from llamita.prune.stream import summed


class LeastSquares:
    """argmin_W sum_t w_t ||y_t - W x_t||^2 + lambda |W|^2 = (sum w y x^T) (sum w x x^T + lambda I)^-1.

    lambda is ``ridge`` times the mean of the diagonal of sum w x x^T. Products are in the inputs' dtype, sums in
    float64, and taken over all processes. To pull W towards some W_0 instead of zero, fit what W_0 leaves of y.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str) -> None:
        self._inner_CC = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._cross_OC = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self._square = torch.zeros((), dtype=torch.float64, device=device)
        self.left = 1.0
        """Share of sum_t w_t |y_t|^2 that the last solution leaves: what it could not make up for."""

    def add(self, x_TC: Tensor, y_TO: Tensor, weight_T: Tensor | None = None) -> None:
        """Count tokens."""
        weighted_TC = x_TC if weight_T is None else x_TC * weight_T[:, None]
        self._inner_CC += weighted_TC.T @ x_TC
        self._cross_OC += y_TO.T @ weighted_TC
        square_T = y_TO.square().sum(-1)
        self._square += (square_T if weight_T is None else weight_T * square_T).sum()

    def solve(self, ridge: float) -> Tensor:
        """W [O, C] in float64; zero where no input ever was other than zero."""
        inner_CC, cross_OC, square = (summed(part) for part in (self._inner_CC, self._cross_OC, self._square))
        if not inner_CC.diagonal().any():
            return torch.zeros_like(cross_OC)
        factor_CC = torch.linalg.cholesky(damp(inner_CC, ridge))
        solution_OC = torch.cholesky_solve(cross_OC.T, factor_CC).T
        # As W (C + lambda I) = sum w y x^T, what is left is sum w y^2 - <W, sum w y x^T> - lambda |W|^2.
        damping = ridge * inner_CC.diagonal().mean()
        left = square - (solution_OC * cross_OC).sum() - damping * solution_OC.square().sum()
        self.left = float((left / square).clamp(min=0)) if square else 1.0
        return solution_OC


def narrow_values(value_ED: Tensor, out_OE: Tensor, covariance_DD: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Maps down [size, E] and up [E, size] of a KV head's values, so that little of what its queries write is lost.

    For ``out_OE``, the columns of o_proj of all query heads of the group below one another, it minimises E ||out (I -
    up down) value x||^2 over all maps through ``size`` channels, x of second moment ``covariance_DD``: the singular
    value decomposition of out value covariance^(1/2) (Lin et al., 2024, arXiv:2408.09632, section 3.3; Eckart and
    Young, 1936), taken in E dimensions. There is no rotation between values and output, so both fold into weights.
    """
    triangle_EE = torch.linalg.qr(out_OE.double()).R
    moved_EE = triangle_EE @ value_ED.double()
    energy_EE = moved_EE @ covariance_DD.double() @ moved_EE.T
    best_Ek = torch.linalg.eigh(energy_EE).eigenvectors.flip(1)[:, :size]
    return best_Ek.T @ triangle_EE, torch.linalg.pinv(triangle_EE) @ best_Ek
