"""What samples say of a model: success among k answers, the best of k, and how sure a difference between models is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
_CHUNK_VALUES = 2**22
"""Indices that are drawn at a time: 32 MiB."""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k answers, drawn from ``samples`` of which so many are correct, is correct.

    1 - C(n - c, k) / C(n, k), without bias for the chance under fresh answers (Chen et al., 2021, arXiv:2107.03374,
    equation 1).

    Raises:
        ValueError: k is below 1 or above the number of samples.
    """
    _check_k(samples, k)
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def best_of_k(values: Sequence[float], k: int) -> float:
    """Mean of the best of k values over all ways to draw k of them without putting any back.

    With x_1 <= … <= x_n it is the sum of C(i - 1, k - 1) / C(n, k) x_i: x_i is the best where the other k - 1 come
    from the i - 1 below it. As an average over subsets of fresh answers it has no bias for the expected best of k
    (Hoeffding, 1948, U-statistics).

    Raises:
        ValueError: k is below 1 or above the number of values.
    """
    _check_k(len(values), k)
    ordered = sorted(values)
    weights = [math.comb(place, k - 1) / math.comb(len(values), k) for place in range(len(values))]
    return math.fsum(weight * value for weight, value in zip(weights, ordered, strict=True))


def _check_k(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k must be in 1..{samples}, the number of samples, got {k}")


def powers(samples: int) -> list[int]:
    """1, 2, 4, … below the number of samples, and the number itself."""
    found = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return [*found, samples]


def bins(values: Sequence[float], count: int = 20) -> dict[str, list[float]]:
    """A histogram of equal bins from the least to the largest value: ``edges`` (one more than) ``counts``."""
    counts, edges = np.histogram(np.asarray(values, dtype=np.float64), bins=count)
    return {"edges": [float(edge) for edge in edges], "counts": [int(number) for number in counts]}


@dataclass(frozen=True)
class Gap:
    """How much a model's figure is above another's, and the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided: twice the share of resamples on the other side of nought; at least 2 over their number."""


def paired_bootstrap(
    numerators: tuple[npt.ArrayLike, npt.ArrayLike],
    denominators: tuple[npt.ArrayLike, npt.ArrayLike],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Gap:
    """The second model's ratio of sums minus the first's, over resampled rows.

    Rows are drawn with replacement, the same for both models, so what is hard for both drops out (Efron, 1979, Annals
    of Statistics 7(1); the interval is from the 2.5 % to the 97.5 % quantile). A resample whose denominator is nought
    is left out.

    Raises:
        ValueError: the two do not have the same rows, or there is none.
    """
    first, second, under_first, under_second = (
        np.asarray(values, dtype=np.float64) for values in (*numerators, *denominators)
    )
    rows = len(first)
    if not rows or not len(second) == len(under_first) == len(under_second) == rows:
        raise ValueError("a paired difference needs both models measured on the same rows, at least one")
    dice = np.random.default_rng(seed)
    size = max(1, _CHUNK_VALUES // rows)
    gaps = []
    for begin in range(0, resamples, size):
        drawn = dice.integers(0, rows, size=(min(size, resamples - begin), rows))
        with np.errstate(divide="ignore", invalid="ignore"):
            gap = second[drawn].sum(1) / under_second[drawn].sum(1) - first[drawn].sum(1) / under_first[drawn].sum(1)
        gaps.append(gap[np.isfinite(gap)])
    told = np.concatenate(gaps)
    value = float(second.sum() / under_second.sum() - first.sum() / under_first.sum())
    if not len(told):
        return Gap(value, math.nan, math.nan, 1.0)
    low, high = (float(bound) for bound in np.quantile(told, [0.025, 0.975]))
    side = min(float((told <= 0).mean()), float((told >= 0).mean()))
    return Gap(value, low, high, min(1.0, 2 * max(side, 1 / len(told))))
