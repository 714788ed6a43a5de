"""Resemblance is the Jaccard index of shingles; the fast search finds what comparing every pair finds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.align import duplicates


def test_resemblance_is_the_share_of_common_shingles() -> None:
    first, second = duplicates.shingles("a rose is a rose is a rose", 4), duplicates.shingles("A rose; is a flower.", 4)
    assert len(first) == 3  # Broder's own example: three runs, two of them repeated
    assert duplicates.resemblance(first, second) == 1 / 4


@given(
    texts=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=8).map(" ".join), max_size=12),
    threshold=st.sampled_from([0.3, 0.5, 0.8, 1.0]),
    words=st.integers(1, 3),
)
def test_the_search_finds_what_every_pair_finds(texts: list[str], threshold: float, words: int) -> None:
    sets = [duplicates.shingles(text, words) for text in texts]
    kept: list[int] = []
    expected: list[int | None] = []
    for place, one in enumerate(sets):
        same = next((other for other in kept if duplicates.resemblance(one, sets[other]) >= threshold), None)
        expected.append(same)
        kept += [place] if same is None else []
    assert duplicates.near_duplicates(texts, threshold=threshold, words=words) == expected


def test_a_thousand_texts_are_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(0)
    texts = [" ".join(dice.choice("abcdefghij") * 3 for _ in range(30)) for _ in range(1000)]
    texts.append(texts[7] + " zzz")
    compared, resemblance = [], duplicates.resemblance
    monkeypatch.setattr(duplicates, "resemblance", lambda a, b: (compared.append(1), resemblance(a, b))[1])
    assert duplicates.near_duplicates(texts, threshold=0.8, words=5) == [None] * 1000 + [7]
    assert len(compared) < 1000
