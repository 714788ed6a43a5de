"""Packing keeps every token once, wastes almost nothing, and is as good as the textbook's best fit."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.data.pack import Packing, PackingConfig, best_fit, pack

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=120)


def packed(lengths: list[int] | np.ndarray, sequence_length: int, max_padding: float = 0.02) -> Packing:
    length = np.asarray(lengths, dtype=np.int64)
    return pack(np.cumsum(length) - length, length, sequence_length, PackingConfig(max_padding=max_padding))


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    """Best-fit-decreasing as a textbook has it, in O(pieces x bins); returns the number of bins."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda index: spaces[index])] -= length
        else:
            spaces.append(capacity - length)
    return len(spaces)


@given(lengths=LENGTHS, sequence_length=st.integers(2, 40), max_padding=st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_every_token_is_in_exactly_one_place(lengths: list[int], sequence_length: int, max_padding: float) -> None:
    packing = packed(lengths, sequence_length, max_padding)
    tokens = [t for s, n in zip(packing.start, packing.length, strict=True) for t in range(s, s + n)]
    assert sorted(tokens) == list(range(sum(lengths)))
    assert packing.length.min() >= 1
    used = np.bincount(packing.row, weights=packing.length, minlength=packing.num_rows)
    assert used.size == packing.num_rows
    assert used.min() >= 1
    assert used.max() <= sequence_length


@given(lengths=LENGTHS, sequence_length=st.integers(2, 40))
def test_no_piece_reaches_over_the_end_of_its_document(lengths: list[int], sequence_length: int) -> None:
    packing = packed(lengths, sequence_length)
    document = np.repeat(np.arange(len(lengths)), lengths)
    np.testing.assert_array_equal(document[packing.start], document[packing.start + packing.length - 1])


@given(lengths=LENGTHS, sequence_length=st.integers(2, 40), max_padding=st.sampled_from([0.0, 0.02, 0.3]))
def test_padding_is_within_its_bound_wherever_that_is_possible(
    lengths: list[int], sequence_length: int, max_padding: float
) -> None:
    packing = packed(lengths, sequence_length, max_padding)
    fewest = -(-sum(lengths) // sequence_length)
    assert packing.padding <= max_padding + 1e-9 or packing.num_rows == fewest


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=150))
def test_grouped_best_fit_needs_as_many_bins_as_the_textbook(lengths: list[int]) -> None:
    bins, num_bins = best_fit(np.array(lengths), 30)
    assert num_bins == naive_best_fit(lengths, 30)
    assert set(bins.tolist()) == set(range(num_bins))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=100))
def test_a_document_that_fits_a_row_is_whole_where_padding_is_free(lengths: list[int]) -> None:
    packing = packed(lengths, 30, max_padding=1.0)
    assert sorted(packing.length.tolist()) == sorted(lengths)


@pytest.mark.parametrize("sequence_length", [256, 2048, 8192])
def test_padding_is_under_two_percent_for_documents_as_they_are(sequence_length: int) -> None:
    """Log-normal lengths with a median of 400 tokens and a heavy tail, as web text has."""
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.2, 20_000).astype(np.int64) + 1
    packing = packed(lengths, sequence_length)
    assert packing.padding < 0.02
    uncut = packed(lengths, sequence_length, max_padding=1.0)
    assert packing.length.size <= 1.01 * uncut.length.size


def test_padding_is_under_two_percent_for_the_worst_lengths() -> None:
    """Documents just above half a row fit together with nothing: uncut they would waste nearly half."""
    lengths = np.full(1000, 130)
    assert packed(lengths, 256, max_padding=1.0).padding > 0.49
    assert packed(lengths, 256).padding < 0.02


def test_a_document_longer_than_a_row_is_cut_into_whole_rows_and_a_rest() -> None:
    packing = packed([25], 10)
    assert sorted(packing.length.tolist()) == [5, 10, 10]
    assert sorted(packing.start.tolist()) == [0, 10, 20]


def test_the_first_rows_are_a_fair_sample() -> None:
    """Long documents fill rows of their own; they must not all stand at the front."""
    lengths = np.concatenate([np.full(100, 2560), np.full(1000, 256)])
    packing = packed(lengths, 256)
    from_long = packing.start[: packing.num_rows // 10] < 256_000
    assert 0.3 < from_long.mean() < 0.7


def test_a_million_documents_take_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 1_000_000).astype(np.int64) + 1
    begin = time.perf_counter()
    packing = packed(lengths, 4096)
    assert time.perf_counter() - begin < 30
    assert packing.padding < 0.02


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_share_outside_zero_to_one_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"packing\.max_padding must be in 0\.\.1"):
        PackingConfig(max_padding=value)


def test_a_row_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence_length must be at least 2, got 1"):
        packed([3], 1)
