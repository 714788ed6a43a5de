"""Estimators equal their definitions by enumeration; an interval holds what it is said to hold."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.align import estimators


@given(n=st.integers(1, 8), data=st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    answers = [True] * c + [False] * (n - c)
    subsets = [any(subset) for subset in itertools.combinations(answers, k)]
    assert estimators.pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=8), data=st.data())
def test_best_of_k_is_the_mean_best_of_all_subsets(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    subsets = [max(subset) for subset in itertools.combinations(values, k)]
    assert estimators.best_of_k(values, k) == pytest.approx(statistics.fmean(subsets), abs=1e-9)


def test_best_of_one_is_the_mean_and_best_of_all_the_largest() -> None:
    values = [3.0, -1.0, 7.5, 2.0]
    assert estimators.best_of_k(values, 1) == pytest.approx(statistics.fmean(values))
    assert estimators.best_of_k(values, 4) == 7.5


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_at_most_the_number_of_samples(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        estimators.best_of_k([1.0] * 4, k)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        estimators.pass_at_k(4, 1, k)


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (10, [1, 2, 4, 8, 10])])
def test_powers_go_up_to_the_number_itself(n: int, expected: list[int]) -> None:
    assert estimators.powers(n) == expected


def test_the_interval_holds_the_true_difference_19_times_in_20() -> None:
    """300 experiments of 60 paired rows with a true difference of 0.3."""
    dice = np.random.default_rng(0)
    ones, held = np.ones(60), 0
    for experiment in range(300):
        hard = dice.normal(size=60)
        first, second = hard + dice.normal(size=60), hard + 0.3 + dice.normal(size=60)
        gap = estimators.paired_bootstrap((first, second), (ones, ones), seed=experiment, resamples=400)
        held += gap.low <= 0.3 <= gap.high
    assert 0.90 < held / 300 < 0.98


def test_the_interval_is_as_wide_as_the_normal_one_and_pairing_narrows_it() -> None:
    dice = np.random.default_rng(1)
    hard = dice.normal(size=400) * 10
    first, second, ones = hard + dice.normal(size=400), hard + dice.normal(size=400), np.ones(400)
    gap = estimators.paired_bootstrap((first, second), (ones, ones), seed=0)
    assert gap.value == pytest.approx(float((second - first).mean()))
    half = 1.96 * float((second - first).std(ddof=1)) / 20
    assert (gap.high - gap.low) / 2 == pytest.approx(half, rel=0.05)
    assert estimators.paired_bootstrap((first, second), (ones, ones), seed=0) == gap


def test_equal_models_do_not_differ_and_ratios_are_of_sums() -> None:
    nll, tokens = [4.0, 9.0, 1.0], [2.0, 3.0, 1.0]
    same = estimators.paired_bootstrap((nll, nll), (tokens, tokens), seed=0)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    other = estimators.paired_bootstrap((nll, [8.0, 18.0, 2.0]), (tokens, tokens), seed=0)
    assert other.value == pytest.approx(14 / 6)
    assert other.p_value == pytest.approx(2 / estimators.RESAMPLES)


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        estimators.paired_bootstrap(([1.0], [1.0, 2.0]), ([1.0], [1.0, 1.0]), seed=0)


def test_a_resample_without_a_denominator_is_left_out() -> None:
    gap = estimators.paired_bootstrap(([1.0, 0.0], [0.0, 0.0]), ([1.0, 0.0], [1.0, 0.0]), seed=0)
    assert (gap.low, gap.high) == (-1, -1)
    assert not math.isnan(gap.value)


def test_a_histogram_counts_every_value() -> None:
    told = estimators.bins([0.0, 0.1, 1.0, 1.0], 4)
    assert told == {"edges": [0, 0.25, 0.5, 0.75, 1], "counts": [2, 0, 0, 2]}
