"""Texts that say nearly the same as an earlier one.

Two texts resemble each other by the share of word runs ("shingles") that they have in common: the Jaccard index
r(A, B) = |S(A) & S(B)| / |S(A) | S(B)| of their sets of w-word shingles (Broder, 1997, On the resemblance and
containment of documents, section 2). The index is exact, not sketched: two sets with r >= t share a shingle among the
|S| - ceil(t |S|) + 1 rarest of each (prefix filter; Bayardo et al., 2007, Scaling up all pairs similarity search), so
few pairs are compared.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def shingles(text: str, words: int) -> frozenset[tuple[str, ...]]:
    """Runs of so many words, in small letters and without marks; a shorter text is one shingle."""
    found = re.findall(r"\w+", text.lower())
    return frozenset(tuple(found[place : place + words]) for place in range(max(1, len(found) - words + 1)))


def resemblance(first: frozenset[tuple[str, ...]], second: frozenset[tuple[str, ...]]) -> float:
    """The Jaccard index of two sets that are not empty."""
    return len(first & second) / len(first | second)


def near_duplicates(texts: Sequence[str], *, threshold: float, words: int) -> list[int | None]:
    """For each text the place of the earliest kept text that it resembles by at least the threshold, or None: kept.

    Texts are taken in order, and one that was left out is no reason to leave out another.
    """
    sets = [shingles(text, words) for text in texts]
    frequency = Counter(shingle for one in sets for shingle in one)
    kept_by_shingle: dict[tuple[str, ...], list[int]] = {}
    found: list[int | None] = []
    for place, one in enumerate(sets):
        rarest = sorted(one, key=lambda shingle: (frequency[shingle], shingle))
        # A hair below the threshold: 0.8 * 5 in floating point must not ask for five of five.
        rarest = rarest[: len(one) - math.ceil(threshold * len(one) - 1e-9) + 1]
        candidates = sorted({other for shingle in rarest for other in kept_by_shingle.get(shingle, ())})
        same = next((other for other in candidates if resemblance(one, sets[other]) >= threshold), None)
        found.append(same)
        if same is None:
            for shingle in rarest:
                kept_by_shingle.setdefault(shingle, []).append(place)
    return found
