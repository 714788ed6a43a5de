"""What is held out depends on content alone; weights are shares of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llamita.data.split import ValidationConfig, first_copies, hold_out, mixture, priority


def digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


@given(count=st.integers(2, 300), extra=st.integers(1, 50), seed=st.integers(0, 100))
def test_new_documents_move_none_that_were_there(count: int, extra: int, seed: int) -> None:
    digest = digests(count + extra)[:, 0]
    config = ValidationConfig(fraction=0.2)
    before, after = hold_out(priority(digest[:count], seed), config), hold_out(priority(digest, seed), config)
    if before.sum() > 1:  # a single one may stand in for none
        np.testing.assert_array_equal(before, after[:count])


@given(seed=st.integers(0, 100), data=st.data())
def test_the_order_of_documents_does_not_matter(seed: int, data: st.DataObject) -> None:
    digest = digests(60)[:, 0]
    shuffle = np.array(data.draw(st.permutations(range(60))))
    config = ValidationConfig(fraction=0.3, max_documents=7)
    held = hold_out(priority(digest, seed), config)
    np.testing.assert_array_equal(hold_out(priority(digest[shuffle], seed), config), held[shuffle])


def test_the_fraction_is_that_of_the_documents() -> None:
    held = hold_out(priority(digests(20_000)[:, 0], 3), ValidationConfig(fraction=0.1))
    assert abs(held.mean() - 0.1) < 5 * np.sqrt(0.09 / 20_000)


def test_other_seeds_hold_out_other_documents() -> None:
    digest = digests(1000)[:, 0]
    one, two = (hold_out(priority(digest, seed), ValidationConfig(fraction=0.5)) for seed in (1, 2))
    assert 0.4 < (one == two).mean() < 0.6


def test_no_more_than_the_most_are_held_out() -> None:
    values = priority(digests(1000)[:, 0], 0)
    held = hold_out(values, ValidationConfig(fraction=0.5, max_documents=10))
    assert held.sum() == 10
    assert values[held].max() < values[~held].min()


def test_one_document_is_held_out_of_a_small_corpus_and_none_of_a_single_document() -> None:
    assert hold_out(priority(digests(5)[:, 0], 0), ValidationConfig(fraction=1e-9)).sum() == 1
    assert hold_out(priority(digests(1)[:, 0], 0), ValidationConfig(fraction=0.5)).sum() == 0
    assert hold_out(priority(digests(5)[:, 0], 0), ValidationConfig(fraction=0)).sum() == 0


def test_of_equal_documents_the_first_is_kept() -> None:
    digest = digests(4)
    assert first_copies(digest[[2, 0, 2, 1, 0, 3, 3]]).tolist() == [0, 1, 3, 5]
    halves = np.array([[1, 2], [1, 1], [2, 1], [1, 2], [2, 1]], dtype=np.uint64)
    assert first_copies(halves).tolist() == [0, 1, 2]


@given(
    lengths=st.lists(st.lists(st.integers(1, 20), min_size=30, max_size=80), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.5, 2), min_size=4, max_size=4),
    max_tokens=st.none() | st.integers(300, 3000),
)
def test_a_weight_is_a_share_of_the_tokens(
    lengths: list[list[int]], weights: list[float], max_tokens: int | None
) -> None:
    """To within the one document that no longer fits, no source has more than its share of the largest total."""
    source = np.repeat(np.arange(len(lengths)), [len(one) for one in lengths])
    length = np.concatenate(lengths)
    shares = np.array(weights[: len(lengths)]) / sum(weights[: len(lengths)])
    named: dict[str, float | None] = {f"s{index}": weights[index] for index in range(len(lengths))}
    total = min(sum(one) / share for one, share in zip(lengths, shares, strict=True))
    total = total if max_tokens is None else min(total, max_tokens)
    assume(min(total * shares) >= 20)  # else a share may be too small for one document, which is refused
    kept = mixture(source, length, priority(digests(length.size)[:, 0], 0), named, max_tokens=max_tokens)
    assert len(set(kept.tolist())) == kept.size
    for index, share in enumerate(shares):
        got = length[kept[source[kept] == index]].sum()
        assert total * share - 20 < got <= total * share + 0.01


def test_the_largest_mixture_uses_up_one_source() -> None:
    source, length = np.array([0] * 10 + [1] * 100), np.full(110, 5)
    kept = mixture(source, length, priority(digests(110)[:, 0], 0), {"small": 0.25, "large": 0.75})
    assert np.bincount(source[kept]).tolist() == [10, 30]


def test_without_weights_everything_is_taken() -> None:
    source, length = np.array([0, 0, 1]), np.array([5, 6, 700])
    numbers = priority(digests(3)[:, 0], 0)
    assert mixture(source, length, numbers, {"a": None, "b": None}).tolist() == [0, 1, 2]


def test_fewer_tokens_are_part_of_what_more_tokens_take() -> None:
    length = np.random.default_rng(0).integers(1, 50, 200)
    numbers, source = priority(digests(200)[:, 0], 0), np.zeros(200, dtype=np.int64)
    few, more = (set(mixture(source, length, numbers, {"a": None}, max_tokens=n).tolist()) for n in (500, 2000))
    assert few < more
    assert sum(length[list(few)]) <= 500


def test_weights_for_some_sources_only_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sources\.b\.weight is unset, but other sources have a weight"):
        mixture(np.array([0, 1]), np.array([5, 5]), priority(digests(2)[:, 0], 0), {"a": 1.0, "b": None})


def test_a_share_without_a_document_is_refused() -> None:
    numbers = priority(digests(3)[:, 0], 0)
    with pytest.raises(ValueError, match=r"source 'a': its share of 10\.0 tokens is less than its first document"):
        mixture(np.zeros(3, dtype=np.int64), np.full(3, 100), numbers, {"a": None}, max_tokens=10)
    with pytest.raises(ValueError, match="source 'b' has no document left to train on"):
        mixture(np.zeros(3, dtype=np.int64), np.full(3, 100), numbers, {"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(("name", "value"), [("fraction", 1.0), ("fraction", -0.1), ("max_documents", 0)])
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"validation\.{name} must be .*, got {value}"):
        ValidationConfig(**{name: value})
