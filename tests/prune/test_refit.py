"""Laws of the closed forms: each is the optimum that it claims to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamita.prune import refit


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fitted(x: Tensor, y: Tensor, weight: Tensor | None = None, *, ridge: float = 0.0, parts: int = 1) -> Tensor:
    squares = refit.LeastSquares(x.shape[1], y.shape[1], "cpu")
    weights = [None] * parts if weight is None else weight.chunk(parts)
    for part_x, part_y, part_w in zip(x.chunk(parts), y.chunk(parts), weights, strict=True):
        squares.add(part_x, part_y, part_w)
    return squares.solve(ridge)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_fit_is_lstsq(parts: int) -> None:
    x, y = draw(60, 9), draw(60, 5, seed=1)
    torch.testing.assert_close(fitted(x, y, parts=parts), torch.linalg.lstsq(x, y).solution.T)


def test_tokens_count_by_their_weight() -> None:
    x, y, weight = draw(60, 9), draw(60, 5, seed=1), draw(60, seed=2).square()
    root = weight.sqrt()[:, None]
    torch.testing.assert_close(fitted(x, y, weight), torch.linalg.lstsq(root * x, root * y).solution.T)


def test_the_ridge_is_that_of_rows_of_zeros_below() -> None:
    x, y = draw(60, 9), draw(60, 5, seed=1)
    lam = 0.01 * (x.T @ x).diagonal().mean()
    below = torch.linalg.lstsq(torch.cat([x, lam.sqrt() * torch.eye(9)]), torch.cat([y, torch.zeros(9, 5)]))
    torch.testing.assert_close(fitted(x, y, ridge=0.01), below.solution.T)


def test_silent_inputs_are_given_nothing() -> None:
    assert not fitted(torch.zeros(6, 3).double(), draw(6, 2), ridge=1e-4).any()


def test_fewer_tokens_than_inputs_are_fitted_with_a_ridge() -> None:
    x, y = draw(5, 9), draw(5, 2, seed=1)
    torch.testing.assert_close(x @ fitted(x, y, ridge=1e-9).T, y, rtol=1e-5, atol=1e-5)


def test_values_are_narrowed_as_well_as_any_rank_allows() -> None:
    """The squared error is the sum of the squared singular values that were dropped."""
    value, out, x = draw(8, 20), draw(12, 8, seed=1), draw(50, 20, seed=2)
    down, up = refit.narrow_values(value, out, x.T @ x, 3)
    error = (x @ value.T @ (torch.eye(8) - up @ down).T @ out.T).square().sum()
    singular = torch.linalg.svdvals(out @ value @ x.T)
    torch.testing.assert_close(error, singular[3:].square().sum())


def test_values_that_nobody_reads_do_not_break_the_fit() -> None:
    value, out, x = draw(8, 20), draw(12, 8, seed=1), draw(50, 20, seed=2)
    out[:, 5] = 0.0
    down, up = refit.narrow_values(value, out, x.T @ x, 7)
    torch.testing.assert_close(out @ up @ down @ value @ x.T, out @ value @ x.T)


def test_what_least_squares_leaves_is_the_squared_error_of_its_solution() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y, weight = (torch.randn(50, n, dtype=torch.float64, generator=draw) for n in (6, 4, 1))
    weight = weight[:, 0].square()
    squares = refit.LeastSquares(6, 4, "cpu")
    squares.add(x[:20], y[:20], weight[:20])
    squares.add(x[20:], y[20:], weight[20:])
    solution = squares.solve(1e-9)
    gap = (weight * (y - x @ solution.T).square().sum(-1)).sum() / (weight * y.square().sum(-1)).sum()
    assert squares.left == pytest.approx(float(gap), rel=1e-6)
