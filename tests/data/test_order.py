"""The order of samples is a permutation per epoch, a pure function, and free."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.data import order


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_size_and_key_is_a_permutation(size: int, key: int) -> None:
    assert sorted(order.permute(np.arange(size), size, key)) == list(range(size))


@given(data=st.data(), num_rows=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_a_stretch_of_samples_does_not_depend_on_where_one_starts(
    data: st.DataObject, num_rows: int, seed: int
) -> None:
    start, middle, stop = sorted(data.draw(st.lists(st.integers(0, 5 * num_rows), min_size=3, max_size=3)))
    parts = [order.rows(seed, num_rows, start, middle), order.rows(seed, num_rows, middle, stop)]
    np.testing.assert_array_equal(np.concatenate(parts), order.rows(seed, num_rows, start, stop))


@given(num_rows=st.integers(1, 300), epoch=st.integers(0, 1000))
def test_each_epoch_has_every_row_once(num_rows: int, epoch: int) -> None:
    rows = order.rows(7, num_rows, epoch * num_rows, (epoch + 1) * num_rows)
    assert sorted(rows) == list(range(num_rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(order.rows(seed, 50, epoch * 50, epoch * 50 + 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("size", [2, 3, 5, 16, 100])
def test_every_row_comes_first_equally_often(size: int) -> None:
    """Over keys, the place of an element is uniform: chi-square of ``size - 1`` degrees stays within five sigma."""
    draws = 2000
    counts = np.bincount([order.permute(np.array([0]), size, key)[0] for key in range(draws)], minlength=size)
    chi_square = float(((counts - draws / size) ** 2 / (draws / size)).sum())
    assert chi_square < size - 1 + 5 * np.sqrt(2 * size)


def test_neighbours_are_torn_apart() -> None:
    """The mean distance of two independent uniform places is a third of the size."""
    rows = order.permute(np.arange(10_000), 10_000, key=3)
    assert abs(np.abs(np.diff(rows)).mean() / 10_000 - 1 / 3) < 0.01


def test_a_trillion_rows_cost_nothing() -> None:
    rows = order.rows(0, 10**12, 5 * 10**11, 5 * 10**11 + 100)
    assert len(set(rows.tolist())) == 100
    assert 0 <= rows.min() < rows.max() < 10**12


def test_the_order_of_a_run_never_changes_between_versions() -> None:
    """Frozen digits: a run that is resumed under a later version must go on with the rows that were planned."""
    frozen = [4, 9, 7, 5, 1, 8, 3, 6, 2, 0, 2, 5, 4, 8, 3, 6, 1, 0, 9, 7]
    assert order.rows(0, 10, 0, 20).tolist() == frozen
