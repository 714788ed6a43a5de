"""Which documents are held out and which are trained on: decided by their content, never by where they stand.

Shape letters: D = documents, S = sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamita.data import order

Int = NDArray[np.int64]


@dataclass(kw_only=True)
class ValidationConfig:
    """Documents that are held out of training."""

    fraction: float = 0.01
    """Probability that a document is held out; at least one is where it is above 0 and there are two."""
    max_documents: int | None = None
    """Hold out no more than so many."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if not 0 <= self.fraction < 1:
            raise ValueError(f"validation.fraction must be at least 0 and below 1, got {self.fraction}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"validation.max_documents must be at least 1, got {self.max_documents}")


def priority(digest_D: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A pseudo-random number for each document, from its content and the seed alone."""
    return order.mix(digest_D ^ order.mix(np.array(seed, dtype=np.uint64)))


def first_copies(digest_D2: NDArray[np.uint64]) -> Int:
    """Indices of the documents that no earlier one equals, in order."""
    by_digest = np.lexsort((digest_D2[:, 1], digest_D2[:, 0]))  # stable, and several times faster than np.unique
    sorted_D2 = digest_D2[by_digest]
    is_first_D = np.ones(len(digest_D2), dtype=bool)
    is_first_D[1:] = (sorted_D2[1:] != sorted_D2[:-1]).any(axis=1)
    return np.sort(by_digest[is_first_D])


def hold_out(priority_D: NDArray[np.uint64], config: ValidationConfig) -> NDArray[np.bool_]:
    """Which of the documents are held out.

    Without ``max_documents`` each is decided for itself: adding documents to a corpus moves none that were there.
    """
    # 53 bits are what a float holds exactly.
    held_D = (priority_D >> np.uint64(11)) < np.uint64(config.fraction * 2**53)
    if config.fraction > 0 and not held_D.any():
        held_D[priority_D.argmin()] = True
    if held_D.all():
        held_D[priority_D.argmax()] = False  # something must be left to train on
    if config.max_documents is not None and held_D.sum() > config.max_documents:
        candidates = np.flatnonzero(held_D)
        released = candidates[np.argsort(priority_D[candidates], kind="stable")[config.max_documents :]]
        held_D[released] = False
    return held_D


def check_weights(weights: Mapping[str, float | None]) -> None:
    """Raise ``ValueError`` where some sources have a weight and some have none."""
    lacking = [name for name, weight in weights.items() if weight is None]
    if lacking and len(lacking) < len(weights):
        raise ValueError(f"sources.{lacking[0]}.weight is unset, but other sources have a weight: set all or none")


def mixture(
    source_D: Int,
    length_D: Int,
    priority_D: NDArray[np.uint64],
    weights: Mapping[str, float | None],
    *,
    max_tokens: int | None = None,
) -> Int:
    """Indices of the training documents to keep so that each source has its share of the tokens.

    With weights ``w_s`` of sources that hold ``t_s`` tokens, the result has about ``T w_s / sum(w)`` of each, where
    ``T`` is the largest number that needs no document twice, ``min_s t_s sum(w) / w_s``, or ``max_tokens`` if that is
    less. A source gives whole documents in pseudo-random order while its share holds them. Without weights the
    natural shares are kept.

    Raises:
        ValueError: a source has no document to train on, or a share is too small for a single one.
    """
    check_weights(weights)
    tokens_S = np.bincount(source_D, weights=length_D, minlength=len(weights))
    for name, tokens in zip(weights, tokens_S, strict=True):
        if not tokens:
            raise ValueError(f"source {name!r} has no document left to train on: all are held out, or are copies")
    share_S = np.array([tokens if w is None else w for tokens, w in zip(tokens_S, weights.values(), strict=True)])
    share_S = share_S / share_S.sum()
    total = float((tokens_S / share_S).min())
    total = total if max_tokens is None else min(total, max_tokens)
    kept = []
    for index, name in enumerate(weights):
        here = np.flatnonzero(source_D == index)
        here = here[np.argsort(priority_D[here], kind="stable")]
        # A little slack: the product of two floats may fall just short of the whole source.
        quota = total * share_S[index] + 0.01
        fits = int(np.searchsorted(np.cumsum(length_D[here]), quota, side="right"))
        if not fits:
            raise ValueError(
                f"source {name!r}: its share of {total * share_S[index]:.1f} tokens is less than its first document "
                f"({length_D[here[0]]} tokens); raise max_tokens or change the weights"
            )
        kept.append(here[:fits])
    return np.sort(np.concatenate(kept))
