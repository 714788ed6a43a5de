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

    def add(self, x_TC: Tensor, y_TO: Tensor, weight_T: Tensor | None = None) -> None:
        """Count tokens."""
        weighted_TC = x_TC if weight_T is None else x_TC * weight_T[:, None]
        self._inner_CC += weighted_TC.T @ x_TC
        self._cross_OC += y_TO.T @ weighted_TC

    def solve(self, ridge: float) -> Tensor:
        """W [O, C] in float64; zero where no input ever was other than zero."""
        inner_CC, cross_OC = summed(self._inner_CC), summed(self._cross_OC)
        if not inner_CC.diagonal().any():
            return torch.zeros_like(cross_OC)
        factor_CC = torch.linalg.cholesky(damp(inner_CC, ridge))
        return torch.cholesky_solve(cross_OC.T, factor_CC).T


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
