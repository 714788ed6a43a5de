"""Laws of second-order elimination: at every step the unit leaves that a brute-force search would remove."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llamita.prune import obs

RIDGE = 1e-6


def layer(units: int, outputs: int = 7, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated units' covariance and their output matrix."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(units, units, generator=draw, dtype=torch.float64)
    z = torch.randn(tokens, units, generator=draw, dtype=torch.float64) @ mix
    return z.T @ z / tokens, torch.randn(outputs, units, generator=draw, dtype=torch.float64)


def error(covariance: Tensor, weight: Tensor, kept: list[int], ridge: float = RIDGE) -> float:
    """Least squared error of the output when only ``kept`` are there: the dense oracle."""
    damped = obs.damp(covariance, ridge)
    whole = (weight @ damped * weight).sum()
    cross = weight @ damped[:, kept]
    return float(whole - (cross * torch.linalg.solve(damped[kept][:, kept], cross.T).T).sum())


def greedy(covariance: Tensor, weight: Tensor, blocks: list[list[int]], families: int) -> tuple[list[int], list[float]]:
    """Remove the block whose absence costs least, by solving anew for every candidate."""
    left, order, costs, before = list(range(len(blocks))), [], [], 0.0
    members = len(blocks) // families
    lost = [0] * families
    while left:
        allowed = [b for b in left if lost[b // members] == min(lost[c // members] for c in left)]
        after = {
            b: error(covariance, weight, list(itertools.chain(*(blocks[c] for c in left if c != b)))) for b in allowed
        }
        best = min(after, key=lambda b: after[b])
        order.append(best)
        costs.append(after[best] - before)
        before = after[best]
        left.remove(best)
        lost[best // members] += 1
    return order, costs


@pytest.mark.parametrize("lazy", [1, 3, 128])
@pytest.mark.parametrize("seed", range(5))
def test_units_leave_as_a_brute_force_search_removes_them(
    lazy: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obs, "LAZY_UNITS", lazy)
    covariance, weight = layer(10, seed=seed)
    order, costs = obs.unit_order(obs.Inverse.of(covariance, RIDGE), weight)
    wanted, increases = greedy(covariance, weight, [[unit] for unit in range(10)], 1)
    assert order.tolist() == wanted
    torch.testing.assert_close(costs, torch.tensor(increases, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("families", [1, 2, 3])
def test_blocks_leave_as_brute_force_removes_them(families: int) -> None:
    covariance, weight = layer(12)
    order, costs = obs.block_order(obs.Inverse.of(covariance, RIDGE), weight, blocks=6, families=families)
    blocks = [[2 * block, 2 * block + 1] for block in range(6)]
    wanted, increases = greedy(covariance, weight, blocks, families)
    assert order.tolist() == wanted
    torch.testing.assert_close(costs, torch.tensor(increases, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_every_family_keeps_as_many_blocks_as_every_other() -> None:
    covariance, weight = layer(24)
    order, _ = obs.block_order(obs.Inverse.of(covariance, RIDGE), weight, blocks=12, families=4)
    for removed in (4, 8):
        left = [block // 3 for block in range(12) if block not in order[:removed].tolist()]
        assert all(left.count(family) == 3 - removed // 4 for family in range(4))


def test_a_unit_that_another_repeats_leaves_first_and_costs_nothing() -> None:
    covariance, weight = layer(8)
    twice = torch.cat([torch.eye(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[3:4]])
    order, costs = obs.unit_order(obs.Inverse.of(twice @ covariance @ twice.T, 1e-9), weight @ twice.T)
    assert int(order[0]) in (3, 8)
    assert float(costs[0]) < 1e-6 * float(costs[-1])


def test_a_silent_unit_leaves_before_one_that_speaks() -> None:
    covariance, weight = layer(8)
    covariance[2] = covariance[:, 2] = 0.0
    assert int(obs.unit_order(obs.Inverse.of(covariance, 1e-4), weight)[0][0]) == 2


def test_leverage_is_the_diagonal_of_the_ridge_projection() -> None:
    covariance, _ = layer(9)
    lam = 0.3 * covariance.diagonal().mean()
    dense = (covariance @ torch.linalg.inv(covariance + lam * torch.eye(9, dtype=torch.float64))).diagonal()
    torch.testing.assert_close(obs.Inverse.of(covariance, 0.3).leverage(), dense)


def test_ranks_rise_in_the_order_of_leaving() -> None:
    assert obs.ranks(torch.tensor([2, 0, 1])).tolist() == [1.0, 2.0, 0.0]


def test_silence_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"calibration\.tokens"):
        obs.Inverse.of(torch.zeros(3, 3), 1e-4)
