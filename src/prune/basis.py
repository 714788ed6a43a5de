"""The axes of the residual stream that a smaller model keeps: some channels, or directions across all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is where it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def take(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Rows and columns of those indices (``None``: all) in the stored dtype; the tensor itself where all are kept."""
    for axis, index in enumerate((rows, columns)):
        if index is not None and not torch.equal(index, torch.arange(tensor.shape[axis])):
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """``tensor`` times ``factor``, multiplied in float32 or wider and rounded once."""
    if factor == 1.0:
        return tensor
    return (widened(tensor) * factor).to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Basis:
    """A map of the residual stream to fewer axes: x_D -> x_d = Q^T x_D.

    RMSNorm without a gain commutes with an orthogonal Q (Ashkboos et al., 2024, arXiv:2401.15024, eq. 2), so a
    directions' model has its gains folded into the matrices behind the norms, and all layers share one Q: nothing of
    it is left in the residual path.
    """

    channels: Tensor
    """[d], of the source; not read where there are directions."""
    directions: Tensor | None = None
    """Q [D, d] with orthonormal columns."""

    @property
    def rotates(self) -> bool:
        """Whether the axes go across channels."""
        return self.directions is not None

    def states(self, tensor: Tensor) -> Tensor:
        """[..., D] -> [..., d]: a state, or rows of an embedding, seen along the axes."""
        if self.directions is None:
            return tensor[..., self.channels.to(tensor.device)]
        return (widened(tensor) @ self._matrix(tensor)).to(tensor.dtype)

    def reads(self, weight: Tensor, gain_D: Tensor, factor: float = 1.0) -> Tensor:
        """[O, D] -> [O, d], times ``factor``: what reads the stream behind a norm of that gain.

        With channels the gain stays with the norm.
        """
        if self.directions is None:
            return scaled(take(weight, None, self.channels), factor)
        return (widened(weight) * (widened(gain_D) * factor) @ self._matrix(weight)).to(weight.dtype)

    def writes(self, weight: Tensor) -> Tensor:
        """[D, I] -> [d, I]: what writes into the stream."""
        if self.directions is None:
            return take(weight, self.channels, None)
        return (self._matrix(weight).T @ widened(weight)).to(weight.dtype)

    def gain(self, gain_D: Tensor) -> Tensor:
        """[D] -> [d]: the norm's gain that stays a norm's."""
        if self.directions is None:
            return take(gain_D, self.channels, None)
        return torch.ones(self.directions.shape[1], dtype=gain_D.dtype, device=gain_D.device)

    def embed(self, gain_D: Tensor) -> Tensor:
        """A [D, d]: what the whole norm's output of that gain is, by what the cut norm's output keeps of it."""
        if self.directions is not None:
            return widened(gain_D)[:, None] * self._matrix(gain_D)
        identity = torch.eye(len(gain_D), dtype=widened(gain_D).dtype, device=gain_D.device)
        return identity[:, self.channels.to(gain_D.device)]

    def share(self, other: Basis, size: int) -> float:
        """Share of these axes, of a stream of ``size`` channels, that lies in the span of the other's."""
        identity = torch.eye(size, dtype=torch.float64)
        mine, theirs = self.states(identity), other.states(identity)
        return float((mine.T @ theirs).square().sum() / mine.shape[1])

    def _matrix(self, like: Tensor) -> Tensor:
        assert self.directions is not None
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return self.directions.to(device=like.device, dtype=wide)
